"""The gathered head gives the same scores as the dense model, in every architecture. Loading checkpoints."""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.architectures import build
from mlmkit.errors import UserError, as_user_error
from mlmkit.model import MaskedLM, sees_padding
from mlmkit.packing import enable_packing
from mlmkit.pretrained import load_pretrained, load_tokenizer

VOCABULARY = 200
SENTENCEPIECE = "cannot be loaded" if find_spec("sentencepiece") else "needs sentencepiece: pip install"
NAMES = (
    *("albert", "bert", "camembert", "convbert", "data2vec-text", "deberta-v2", "distilbert", "electra", "ernie"),
    *("eurobert", "ibert", "megatron-bert", "mobilebert", "modernbert", "mpnet", "nomic_bert", "rembert", "roberta"),
    *("roformer", "xlm-roberta", "xmod"),
)


def tiny(name: str, top_k: int = 10) -> MaskedLM:
    return MaskedLM(build(name), top_k)


def ragged() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(5, VOCABULARY, (3, 12), generator=generator)
    attention_mask = (torch.arange(12) < torch.tensor([[12], [7], [3]])).long()
    positions = torch.tensor([0, 5, 11, 13, 18, 24, 26])
    return input_ids, attention_mask, positions, torch.randint(5, VOCABULARY, (7,), generator=generator)


@pytest.mark.parametrize("name", NAMES)
def test_gathered_head_equals_the_dense_forward(name):
    model = tiny(name)
    input_ids, attention_mask, positions, targets = ragged()
    with torch.no_grad():
        found = model(input_ids, attention_mask, positions, targets)
        logits = model.network(input_ids=input_ids, attention_mask=attention_mask).logits
    assert logits.shape == (3, 12, VOCABULARY)  # without positions the model is unchanged
    expected = logits.flatten(0, 1)[positions].log_softmax(-1)
    chosen = expected.gather(1, targets[:, None])
    torch.testing.assert_close(found.log_prob, chosen[:, 0], atol=1e-5, rtol=0)
    top = expected.topk(10)
    torch.testing.assert_close(found.top_log_prob, top.values, atol=1e-5, rtol=0)
    assert (found.top_id == top.indices).all()
    gathered = model.logits(positions, input_ids=input_ids, attention_mask=attention_mask)
    others = (gathered >= gathered.gather(1, targets[:, None])).sum(1) - 1
    assert (found.rank == others).all()


@pytest.mark.parametrize("name", NAMES)
def test_who_sees_padding(name):
    """Probed too: MobileBERT with random weights embeds the padding, which neighbours see."""
    assert sees_padding(tiny(name), pad_id=3) == (name in {"convbert", "mobilebert"})


def test_a_head_that_needs_every_position_is_found_out():
    """Perceiver's head attends from its own positions to the hidden states, so it cannot use gathered rows."""
    model = tiny("perceiver")
    assert not model.gathers_before_head
    assert tiny("bert").gathers_before_head
    input_ids, attention_mask, positions, targets = ragged()
    with torch.no_grad():
        found = model(input_ids, attention_mask, positions, targets)
        logits = model.network(input_ids=input_ids, attention_mask=attention_mask).logits
    assert logits.shape == (3, 64, VOCABULARY)  # its maximum length, whatever the rows' length
    expected = logits[:, :12].flatten(0, 1)[positions].log_softmax(-1)
    torch.testing.assert_close(found.log_prob, expected.gather(1, targets[:, None])[:, 0], atol=1e-5, rtol=0)
    assert not enable_packing(model)


def test_a_head_that_mixes_positions_a_little_is_found_out():
    network: Any = tiny("bert").network
    network.get_output_embeddings().register_forward_hook(lambda _m, _i, logits: logits + 0.01 * logits.mean(1, True))
    assert not MaskedLM(network).gathers_before_head


def test_a_model_that_cannot_be_scored_with_is_refused():
    network: Any = tiny("bert").network
    drawing = network.get_output_embeddings().register_forward_hook(lambda _m, _i, logits: logits + torch.randn(()))
    with pytest.raises(UserError, match="different logits each time"):
        MaskedLM(network)
    drawing.remove()
    shortening = network.get_output_embeddings().register_forward_hook(lambda _m, _i, logits: logits[:, ::2])
    with pytest.raises(UserError, match="does not give logits per token"):
        MaskedLM(network)
    shortening.remove()
    network.register_forward_pre_hook(lambda _m, _i: (_ for _ in ()).throw(ValueError("pixel_values?\nmore")))
    with pytest.raises(UserError, match=r"cannot score from token ids alone: pixel_values\?$"):
        MaskedLM(network)


def test_ties_count_against_the_model():
    model = tiny("bert")
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.zero_()
        found = model(*ragged())
    assert found.rank.dtype == torch.int64
    assert (found.rank == VOCABULARY - 1).all()
    torch.testing.assert_close(found.log_prob, torch.full((7,), -torch.tensor(float(VOCABULARY)).log().item()))


def test_loss_is_the_mean_of_log_probabilities():
    model = tiny("bert")
    input_ids, attention_mask, positions, targets = ragged()
    with torch.no_grad():
        loss = model.loss_sum(positions, targets, input_ids=input_ids, attention_mask=attention_mask)
        found = model(input_ids, attention_mask, positions, targets)
    torch.testing.assert_close(loss, -found.log_prob.sum(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "length"), [("bert", 64), ("roberta", 62), ("distilbert", 64), ("ibert", 62)])
def test_longest_row_that_the_position_table_holds(name, length):
    model = tiny(name)
    assert model.max_length() == length
    assert model.max_length(16) == 16
    input_ids = torch.full((1, length), 9)
    with torch.no_grad():
        model(input_ids, torch.ones_like(input_ids), torch.tensor([length - 1]), torch.tensor([9]))
        with pytest.raises((IndexError, RuntimeError)):
            longer = torch.full((1, length + 1), 9)
            model(longer, torch.ones_like(longer), torch.tensor([0]), torch.tensor([9]))


# ------------------------------------------------------------------ loading


@pytest.mark.parametrize(
    ("absent", "present", "message"),
    [
        (("model.safetensors",), "", "has no model.safetensors: to convert a pytorch_model.bin, run there python -c"),
        (("tokenizer.json", "tokenizer_config.json"), "", "has no tokenizer.json: save or copy"),
        (("tokenizer.json", "tokenizer_config.json"), "spiece.model", SENTENCEPIECE),
        (("config.json",), "", "has no config.json"),
    ],
)
def test_a_folder_that_lacks_a_file_is_told_what_to_do(checkpoint, tmp_path, absent, present, message):
    folder = Path(shutil.copytree(checkpoint("modernbert"), tmp_path / "model"))
    for name in absent:
        (folder / name).unlink()
    if present:
        (folder / present).write_bytes(b"no model")
    with pytest.raises(UserError, match=message):
        load_pretrained(str(folder))


def test_a_tokenizer_without_a_mask_is_named_with_its_folder(checkpoint, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((checkpoint("bert") / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match=f"{tmp_path}: the tokenizer has no mask token: .*tokenizer_config.json"):
        load_tokenizer(str(tmp_path))


def test_the_advice_for_old_weights_works(checkpoint, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(checkpoint("bert"), tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError) as raised:
        load_pretrained(str(folder))
    command = re.search(r'python -c "(.*)"', str(raised.value))
    assert command
    monkeypatch.chdir(folder)
    exec(command[1], {})  # in a new interpreter the imports take seconds
    again = load_file(folder / "model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_an_error_that_announces_a_list_is_not_cut_off():
    with pytest.raises(UserError, match=r"^x: cannot be loaded: one of: \(1\) a \(2\) b$"), as_user_error("x"):
        raise ValueError("\none of: \n(1) a\n(2) b")
    with pytest.raises(UserError, match=r"^x: cannot be loaded: It is no file\.$"), as_user_error("x"):
        raise ValueError("It is no file.\n\nPages of advice")
