"""The model that a run starts with: added tokens, other vocabularies, new heads, longer rows."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import paragraphs
from safetensors.torch import save_file
from training import same_weights, small_architecture, weights, write_config
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, BertTokenizer, RobertaTokenizer

from mlmkit.backends import load as load_backend
from mlmkit.corpus import tokenize
from mlmkit.distributed import Ranks
from mlmkit.errors import UserError
from mlmkit.masking import MaskRecipe, corrupt
from mlmkit.pretrained import load_pretrained, load_tokenizer
from mlmkit.tokenizer import Tokenizer
from mlmkit.train import loop
from mlmkit.train.checkpoints import load_optimizers, saved_checkpoints
from mlmkit.train.config import Config
from mlmkit.train.model_setup import build_model
from mlmkit.train.optimisers import build_optimizers
from mlmkit.train.step import freeze_unused
from mlmkit.train.vocabulary import add_tokens, row_sources

WORDS = ["Águia", "roupa", "COVID", "roupa", "", "Roma", "a"]


@pytest.fixture
def words(tmp_path) -> Path:
    (tmp_path / "words.txt").write_text("\n".join(WORDS), encoding="utf-8")
    return tmp_path / "words.txt"


@pytest.fixture(scope="session")
def tokenizers(tokenizer_folder, tmp_path_factory) -> dict[str, Path]:
    """Trained ones, and the classes of BERT and RoBERTa, which transformers builds from their vocabulary."""
    folders = {kind: tokenizer_folder(kind) for kind in ("wordpiece", "bpe")}
    for name, kind, of_class in (("bert", "wordpiece", BertTokenizer), ("roberta", "bpe", RobertaTokenizer)):
        model = json.loads((folders[kind] / "tokenizer.json").read_text())["model"]
        merges: dict[str, Any] = (
            {"merges": [tuple(pair) for pair in model["merges"]]} if kind == "bpe" else {"do_lower_case": True}
        )
        folders[name] = tmp_path_factory.mktemp(name)
        of_class(vocab=model["vocab"], **merges).save_pretrained(folders[name])
    return folders


def extended(folder: Path, words: Path, tmp_path: Path) -> tuple[Tokenizer, Tokenizer, Path]:
    add_tokens(AutoTokenizer.from_pretrained(folder), str(words)).save_pretrained(tmp_path / "extended")
    return load_tokenizer(str(folder)), load_tokenizer(str(tmp_path / "extended")), tmp_path / "extended"


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "bert", "roberta"])
def test_added_tokens_match_whole_words_only(tmp_path, words, tokenizers, kind):
    old, new, folder = extended(tokenizers[kind], words, tmp_path)
    assert all(new.token(id) == old.token(id) for id in range(old.vocabulary_size))
    assert new.special_ids == old.special_ids
    unrelated = [*paragraphs()[:-2], "Águias roupas COVIDs xroupa Roman Águiazinha"]
    before, after = old.encode(unrelated), new.encode(unrelated)
    assert all(
        np.array_equal(getattr(before, name), getattr(after, name)) for name in ("ids", "word_begins", "lengths")
    )

    text = "Águia a roupa (roupa) de Roma, COVID-19; Águia"
    ids, words = new.encode([text]).ids, tokenize([text], new).words
    added = ids >= old.vocabulary_size
    (spans,) = new.spans([text])
    spelled = [text[begin:end].strip() for (begin, end), is_added in zip(spans, added, strict=True) if is_added]
    assert spelled == ["Águia", "roupa", "roupa", "Roma", "COVID", "Águia"]
    assert (np.bincount(words)[words[added]] == 1).all(), "each is a word of its own"
    assert set(range(old.vocabulary_size, new.vocabulary_size)) <= set(new.masking.ordinary.tolist()), "drawable"
    masked = corrupt(ids, np.array([len(ids)]), np.array([7], dtype=np.uint64), MaskRecipe(1.0), new.masking, seed=0)
    assert np.flatnonzero(added).tolist() == [i for i in masked.selected if added[i]], "maskable"
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids.tolist()
    decoded = new.decode(ids.tolist())
    assert " roupa " in decoded and " roma," in decoded.lower(), "spaces are kept"
    assert decoded == text or kind in ("wordpiece", "bert")  # which put spaces around punctuation


def test_added_tokens_follow_the_tokenizer_s_spelling(tmp_path, tokenizers):
    (tmp_path / "words.txt").write_text("Roupa\nroupa\nÁguia\n", encoding="utf-8")
    _, new, _ = extended(tokenizers["bert"], tmp_path / "words.txt", tmp_path)
    ids = new.encode(["ROUPA roupa aguia ÁGUIA"]).ids.tolist()
    assert len(ids) == 4 and len(set(ids)) == 2


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ("the old man\n", "wordpiece", "'the old man' cannot be added: write one word"),
        ("[SEP]\n", "wordpiece", "no special token"),
        ("\u200b\n", "wordpiece", "cannot be added"),
        ("a\na\n", "wordpiece", "none of its 2 words is new"),
        ("\n\n", "bpe", "none of its 0 words is new"),
        ("COVID-19\n", "bpe", "'COVID-19' cannot be added: the tokenizer splits it into 3 words"),
    ],
)
def test_words_that_cannot_be_added_are_refused(tmp_path, tokenizers, content, kind, message):
    (tmp_path / "words.txt").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        extended(tokenizers[kind], tmp_path / "words.txt", tmp_path)


# ---------------------------------------------------------------- rows


def table(folder: Path) -> torch.Tensor:
    network: Any = AutoModelForMaskedLM.from_pretrained(folder)
    return network.get_input_embeddings().weight.detach()


def means(rows: torch.Tensor, sources: list[list[int]]) -> torch.Tensor:
    return torch.stack([rows[ids or slice(None)].mean(0) for ids in sources])


def built(tmp_path: Path, text_file: Path, folder: Path, *settings: str) -> tuple[Any, Tokenizer, Config]:
    config = write_config(tmp_path, text_file, "", f"model.init_from={folder}", "train.steps=4", *settings)
    loop.train(config, tmp_path / "run")
    tokenizer = load_tokenizer(str(tmp_path / "run" / "tokenizer"))
    return build_model(config, tokenizer), tokenizer, config


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
def test_rows_of_added_tokens_are_the_mean_of_their_pieces(tmp_path, text_file, words, checkpoint, kind):
    model, new, _ = built(tmp_path, text_file, checkpoint(kind), f"tokenizer.add={words}", "optim.lr=1e-9")
    old = load_tokenizer(str(checkpoint(kind)))
    before, after = table(checkpoint(kind)), model.network.get_input_embeddings().weight
    assert torch.equal(after[: len(before)], before)
    for id in range(old.vocabulary_size, new.vocabulary_size):
        pieces = old.encode([new.decode([id])]).ids
        expected = before if pieces.tolist() == [old.unk_id] else before[pieces]
        assert len(pieces) != 1 or len(expected) > 1
        assert torch.allclose(after[id], expected.mean(0))
    head, old_network = model.network.get_output_embeddings(), load_pretrained(str(checkpoint(kind)))[0].network
    old_head: Any = old_network.get_output_embeddings()
    assert head.weight is after
    assert torch.equal(head.bias[: len(before)], old_head.bias)
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "model").config.vocab_size == new.vocabulary_size
    assert torch.allclose(table(tmp_path / "run" / "model"), after, atol=1e-6)


def test_untied_heads_and_spare_rows_are_kept(tmp_path, text_file, words, checkpoint):
    config = AutoConfig.from_pretrained(checkpoint("modernbert"), vocab_size=608, tie_word_embeddings=False)
    network = AutoModelForMaskedLM.from_config(config)
    decoder: Any = network.get_output_embeddings()
    torch.nn.init.normal_(decoder.bias)
    network.save_pretrained(tmp_path / "untied")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint("modernbert") / name, tmp_path / "untied")
    model, new, _ = built(tmp_path, text_file, tmp_path / "untied", f"tokenizer.add={words}")
    assert new.vocabulary_size == 604 and model.vocabulary_size == 608
    sources = row_sources(new, load_tokenizer(str(tmp_path / "untied")))
    head = model.network.get_output_embeddings()
    assert torch.allclose(head.weight[:604], means(decoder.weight, sources)), "of its own rows"
    assert torch.allclose(head.bias[:604], means(decoder.bias, sources))
    assert torch.equal(head.weight[604:], decoder.weight[604:]) and not torch.equal(
        head.weight, table(tmp_path / "untied")
    )


SETTINGS = ("optim.lr=1e-9", "masking.mask_prob=0.3")


@pytest.mark.parametrize(("kind", "other"), [("bert", "bpe"), ("roberta", "wordpiece"), ("roberta", "bert")])
def test_a_new_tokenizer_takes_the_rows_of_shared_tokens(
    tmp_path, text_file, checkpoint, tokenizers, kind, other, caplog
):
    folder = checkpoint(kind)
    with caplog.at_level("INFO", logger="mlmkit"):
        model, new, _ = built(tmp_path, text_file, folder, f"tokenizer.path={tokenizers[other]}", *SETTINGS)
    old, before, after = load_tokenizer(str(folder)), table(folder), model.network.get_input_embeddings().weight
    byte_level, wordpiece = ("{}", "Ġ{}"), ("##{}", "{}")
    old_inside, old_first = wordpiece if kind == "bert" else byte_level
    new_inside, new_first = byte_level if other == "bpe" else wordpiece
    shared = 0
    for text in ("the", "in", "e", "s", "ing", "re", "of", "an"):
        for mine, theirs in ((new_inside, old_inside), (new_first, old_first)):
            row, source = new.token_id(mine.format(text)), old.token_id(theirs.format(text))
            if row is not None and source is not None:
                assert torch.equal(after[row], before[source]), text
                shared += 1
    assert shared > 6
    for name in ("mask_token", "cls_token", "sep_token", "pad_token", "unk_token"):
        assert torch.equal(after[new.token_id(new.named[name])], before[old.token_id(old.named[name])]), name
    sources = row_sources(new, old)
    assert torch.allclose(after, means(before, sources), atol=1e-6)
    counts = [len(source) for source in sources]
    copied, made_up = counts.count(1), counts.count(0)
    assert (
        f"{copied} rows copied, {len(counts) - copied - made_up} the mean of their old pieces, {made_up} "
        in caplog.text
    )
    assert caplog.text.count("rows copied") == 2, "by the run and by this test"

    # Saved, loaded by transformers, and the positions are those of the old model although the padding id moved.
    saved = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "model")
    assert saved.config.pad_token_id == new.pad_id and saved.config.vocab_size == new.vocabulary_size
    old_model = load_pretrained(str(folder))[0]
    ids = torch.tensor([[new.token_id(new.named["cls_token"]), new.mask_id, new.token_id(new.named["sep_token"])]])
    old_ids = torch.tensor([[old.token_id(old.named["cls_token"]), old.mask_id, old.token_id(old.named["sep_token"])]])
    hidden = [
        net.base_model(input_ids=x, attention_mask=torch.ones_like(x))[0]
        for net, x in ((saved.eval(), ids), (old_model.network, old_ids))
    ]
    assert torch.allclose(*hidden, atol=1e-4)
    assert load_pretrained(str(tmp_path / "run" / "model"))[0].max_length() == old_model.max_length()


def test_a_vocabulary_may_be_trained_for_an_old_model(tmp_path, text_file, checkpoint):
    model, new, _ = built(tmp_path, text_file, checkpoint("bert"), "tokenizer.vocab_size=300", "tokenizer.kind=bpe")
    assert model.vocabulary_size == new.vocabulary_size == 300 and new.mask_token == "<mask>"


def test_an_adapted_run_resumes_bit_identically(tmp_path, text_file, words, checkpoint, tokenizers):
    """From its checkpoint, and after a kill before the first one."""
    settings = (
        f"model.init_from={checkpoint('bert')}",
        f"tokenizer.path={tokenizers['bpe']}",
        f"tokenizer.add={words}",
    )
    config = write_config(tmp_path, text_file, "", *settings, "train.steps=4", "train.save_every=2")
    whole = loop.train(config, tmp_path / "whole")
    for name, lost in (("killed", "step-00000004"), ("early", "*")):
        run = Path(shutil.copytree(tmp_path / "whole", tmp_path / name))
        for folder in (run / "model", *run.glob(f"checkpoints/{lost}")):
            shutil.rmtree(folder)
        words.unlink(missing_ok=True)  # the run has its own tokenizer
        assert same_weights(loop.train(config, run), whole)


def test_a_rate_for_new_models_is_warned_of(tmp_path, text_file, checkpoint, caplog):
    for rate, warned in (("5e-4", False), ("1e-3", True)):
        settings = (f"model.init_from={checkpoint('bert')}", "train.steps=2", f"optim.lr={rate}")
        loop.train(write_config(tmp_path, text_file, "", *settings), tmp_path / rate)
        assert ("optim.lr (0.001) is a rate for new models" in caplog.text) == warned


# ---------------------------------------------------------------- heads


@pytest.fixture
def headless(tmp_path, checkpoint):
    def make(kind: str) -> Path:
        folder = Path(shutil.copytree(checkpoint(kind), tmp_path / f"headless-{kind}"))
        AutoModel.from_pretrained(folder).save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
def test_an_encoder_gets_a_new_head(tmp_path, text_file, headless, checkpoint, kind):
    folder = headless(kind)
    with pytest.raises(UserError, match=r"lacks weights for .* model\.new_head = true"):
        built(tmp_path, text_file, folder)
    model, tokenizer, config = built(tmp_path, text_file, folder, "model.new_head=true", "optim.lr=1e-9")
    encoder = load_pretrained(str(checkpoint(kind)))[0].network.base_model.state_dict()
    mine = model.network.base_model.state_dict()
    assert all(torch.equal(mine[name], encoder[name]) for name in encoder)
    head = model.network.get_output_embeddings()
    assert head.weight is model.network.get_input_embeddings().weight
    assert all(
        torch.equal(*pair)
        for pair in zip(model.state_dict().values(), build_model(config, tokenizer).state_dict().values(), strict=True)
    )
    other = write_config(tmp_path, text_file, "", f"model.init_from={folder}", "model.new_head=true", "train.seed=1")
    assert not all(
        torch.equal(*pair)
        for pair in zip(model.state_dict().values(), build_model(other, tokenizer).state_dict().values(), strict=True)
    )
    saved: Any = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "model")
    bias = saved.get_output_embeddings().bias
    assert bias.std() > 0.5, "fitted to the tokens' frequencies"
    resumed = build_model(config, tokenizer, saved_checkpoints(tmp_path / "run")[-1])
    assert same_state(resumed, load_pretrained(str(tmp_path / "run" / "model"))[0])


def same_state(one, other) -> bool:
    return all(torch.equal(*pair) for pair in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_heads_that_are_there_or_incomplete_are_refused(tmp_path, text_file, checkpoint):
    with pytest.raises(UserError, match=r"model\.new_head has no effect, as .*bert.* has a masked LM head"):
        built(tmp_path, text_file, checkpoint("bert"), "model.new_head=true")
    for lost in ("bert.encoder.layer.1.output.dense.weight", "cls.predictions.transform.dense.weight"):
        folder = Path(shutil.copytree(checkpoint("bert"), tmp_path / lost))
        kept = {name: value for name, value in weights(folder).items() if name != lost}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=f"not a masked LM checkpoint: it lacks weights for {lost}"):
            built(tmp_path, text_file, folder, "model.new_head=true")


# ---------------------------------------------------------------- positions


def theta(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["rope_parameters"]


def test_the_rotary_base_is_set_saved_and_kept(tmp_path, text_file, checkpoint):
    """By a new model, from a checkpoint, and at a phase boundary."""
    settings = ("model.rope_theta=50000", "train.steps=2")
    loop.train(
        write_config(tmp_path, text_file, small_architecture(tmp_path, model_type="modernbert"), *settings),
        tmp_path / "new",
    )
    model, tokenizer, _ = built(tmp_path, text_file, checkpoint("modernbert"), "model.rope_theta=50000")
    for run in ("new", "run"):
        values = theta(tmp_path / run / "model")
        assert values["full_attention"]["rope_theta"] == 50000 and values["sliding_attention"]["rope_theta"] == 10000
    before = load_pretrained(str(checkpoint("modernbert")))[0]
    assert before.network.config.rope_parameters["full_attention"]["rope_theta"] == 160000
    ids = torch.arange(100, 140).unsqueeze(0)
    reloaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "model").eval()
    mine = load_pretrained(str(tmp_path / "run" / "model"))[0]
    with torch.no_grad():
        assert torch.equal(mine.network(ids).logits, reloaded(ids).logits)
        assert not torch.allclose(model.network(ids).logits, before.network(ids).logits, atol=1e-3)

    last = saved_checkpoints(tmp_path / "run")[-1]
    kept, changed = (
        write_config(tmp_path, text_file, "", f"model.init_from={checkpoint('modernbert')}", *more)
        for more in ((), ("model.rope_theta=9000", "model.max_length=96"))
    )
    assert theta_of(build_model(kept, tokenizer, last)) == 50000
    phase = build_model(changed, tokenizer, last)
    assert (theta_of(phase), phase.max_length()) == (9000, 96)
    assert all(torch.equal(*pair) for pair in zip(phase.network.parameters(), mine.network.parameters(), strict=True))
    phase.network.save_pretrained(tmp_path / "phase")
    with torch.no_grad():
        again = AutoModelForMaskedLM.from_pretrained(tmp_path / "phase").eval()
        assert torch.equal(again(ids).logits, phase.network(ids).logits)


def theta_of(model) -> float:
    return model.network.config.rope_parameters["full_attention"]["rope_theta"]


def test_other_rotary_models_have_one_base(tmp_path, text_file):
    path = small_architecture(tmp_path, model_type="eurobert", num_key_value_heads=2, head_dim=16)
    loop.train(write_config(tmp_path, text_file, path, "model.rope_theta=50000", "train.steps=2"), tmp_path / "run")
    assert theta(tmp_path / "run" / "model")["rope_theta"] == 50000


@pytest.mark.parametrize("settings", [("model.architecture=bert-tiny",), ("model.init_from=BERT",)])
def test_a_rotary_base_needs_rotary_positions(tmp_path, text_file, checkpoint, settings):
    settings = [setting.replace("BERT", str(checkpoint("bert"))) for setting in settings]
    config = write_config(tmp_path, text_file, "bert-tiny", *settings, "model.rope_theta=50000")
    with pytest.raises(UserError, match=r"model\.rope_theta has no effect, as .*bert.* has no rotary positions"):
        loop.train(config, tmp_path / "run")


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_table_of_positions_is_stretched(tmp_path, text_file, checkpoint, kind):
    settings = ("model.max_length=127", "model.interpolate_positions=true")
    model, tokenizer, config = built(tmp_path, text_file, checkpoint(kind), *settings)
    offset = model.position_offset
    (name,) = (name for name in weights(checkpoint(kind)) if name.endswith("position_embeddings.weight"))
    before, after = weights(checkpoint(kind))[name], dict(model.network.named_parameters())[name]
    assert before.shape[0] == 64 + offset and after.shape[0] == 127 + offset
    assert torch.allclose(after[offset::2], before[offset:], atol=1e-6)
    assert torch.allclose(after[offset + 1 :: 2], (before[offset:-1] + before[offset + 1 :]) / 2, atol=1e-6)
    saved = load_backend(str(tmp_path / "run" / "model"), "torch", "cpu")
    assert (saved.info.max_length, saved.tokenizer.limit) == (127, 127)
    assert same_state(
        build_model(config, tokenizer, saved_checkpoints(tmp_path / "run")[-1]),
        load_pretrained(str(tmp_path / "run" / "model"))[0],
    )


@pytest.mark.parametrize(("kind", "length"), [("bert", 64), ("roberta", 32), ("modernbert", 96)])
def test_interpolating_nothing_is_refused(tmp_path, text_file, checkpoint, kind, length):
    with pytest.raises(UserError, match=r"model\.interpolate_positions has no effect"):
        built(tmp_path, text_file, checkpoint(kind), f"model.max_length={length}", "model.interpolate_positions=true")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimiser_starts_afresh_for_a_stretched_table(tmp_path, text_file, checkpoint, name, caplog):
    short = ("train.steps=4", f"model.init_from={checkpoint('bert')}", f"optim.name={name}")
    config = write_config(tmp_path, text_file, "", *short)
    loop.train(config, tmp_path / "run")
    last = saved_checkpoints(tmp_path / "run")[-1]
    longer = write_config(tmp_path, text_file, "", *short, "model.max_length=96", "model.interpolate_positions=true")
    model = build_model(longer, load_tokenizer(str(last)), last)
    freeze_unused(model)
    optimizers = build_optimizers(model, longer.optim)
    with caplog.at_level("INFO", logger="mlmkit"):
        load_optimizers(last, model, optimizers, Ranks())
    assert re.search("optimiser starts afresh for .*position_embeddings.weight, which", caplog.text)
    state = {
        name: optimizer.state[weight]
        for optimizer in optimizers
        for name, weight in model.named_parameters()
        if weight in optimizer.state
    }
    table = state.pop("network.bert.embeddings.position_embeddings.weight")
    assert table["exp_avg"].shape[0] == 96 and all(not value.any() for value in table.values())
    assert all(values["step"] == 4 for values in state.values() if "step" in values)
    assert all(value.any() for values in state.values() for value in values.values())
