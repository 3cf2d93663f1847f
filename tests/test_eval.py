"""Evaluation against its definitions, recomputed here from the tokens it writes down."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import KINDS, PORTUGUESE, PROOF, paragraphs, run, run_json
from transformers import AutoModelForMaskedLM, AutoTokenizer

from mlmkit.artifact import DYNAMIC_INT8, hash_files, read_manifest, write_manifest
from mlmkit.backends import Batch, Scored, load
from mlmkit.corpus import tokenize
from mlmkit.errors import CheckError, UserError
from mlmkit.eval.api import evaluate
from mlmkit.eval.metrics import FAMILIES
from mlmkit.eval.rows import VARIANTS, pseudo_rows
from mlmkit.eval.score_texts import pseudo_log_likelihood
from mlmkit.eval.scoring import score_rows
from mlmkit.eval.statistics import bootstrap
from mlmkit.export.export import export
from mlmkit.files import read_record
from mlmkit.locations import Source
from mlmkit.masking import DIGEST_MODULUS, MaskRecipe, corrupt, document_key, format_digest, mask_digest
from mlmkit.windows import overlapping_windows

TIMES = ("date", "seconds", "timing", "command")
CAPACITY = 62  # tokens of a document that a row of the test models holds


@pytest.fixture(scope="session")
def short_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few documents, one of them longer than the models take."""
    path = tmp_path_factory.mktemp("short") / "short.txt"
    documents = [*PORTUGUESE, "a [MASK] in </s> text", " ".join(paragraphs()[:6])[:900], "Yes."]
    path.write_text("".join(f"{line}\n" for line in documents), encoding="utf-8")
    return path


class Dense:
    """The plain transformers model, one row at a time."""

    def __init__(self, folder: Path) -> None:
        self.network = AutoModelForMaskedLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def log_probs(self, ids: list[int]) -> torch.Tensor:
        cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        with torch.no_grad():
            return self.network(torch.tensor([[cls, *ids, sep]])).logits[0, 1:-1].log_softmax(-1)

    def pseudo(self, text: str, variant: str) -> list[float]:
        """The log-probability of each token, masked alone or with the other tokens that the variant masks."""
        encoding = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        ids, words, scores = encoding["input_ids"], encoding.word_ids(), []
        for i, id in enumerate(ids):
            hidden = {"original": {i}, "together": range(len(ids)), "left-to-right": range(i, len(ids))}
            hidden["within-word"] = {
                i,
                *(j for j in range(i, len(ids)) if words[j] is not None and words[j] == words[i]),
            }
            shown = [self.tokenizer.mask_token_id if j in hidden[variant] else ids[j] for j in range(len(ids))]
            scores.append(self.log_probs(shown)[i, id].item())
        return scores


def window_of(length: int, offset: int) -> tuple[int, int]:
    """Brute force: the window of a document whose centre is nearest to the token, the earlier on a tie."""
    windows = overlapping_windows(np.array([length]), CAPACITY)
    spans = list(zip(windows.start.tolist(), windows.length.tolist(), strict=True))
    return min(spans, key=lambda span: (abs(2 * offset - (2 * span[0] + span[1] - 1)), span[0]))


@pytest.mark.parametrize("backend", ["torch", "onnx"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_can_be_recomputed(kind, backend, short_file, checkpoint, artifact, tmp_path):
    """Masks, scores and metrics from `tokens.parquet`, the texts and the plain model alone."""
    model = load(str(checkpoint(kind) if backend == "torch" else artifact(kind)))
    evaluation = evaluate(model, short_file, metrics=("masked", "pseudo"), mask_seed=3, output=tmp_path / "result")
    rows = pq.read_table(tmp_path / "result" / "tokens.parquet").to_pylist()
    dense, texts = Dense(checkpoint(kind)), short_file.read_text(encoding="utf-8").split("\n")[:-1]
    documents = [dense.ids(text) for text in texts]
    assert max(map(len, documents)) > CAPACITY

    for metric in ("masked", "pseudo"):
        of_metric = [row for row in rows if row["metric"] == metric]
        places = [(row["document"], row["offset"]) for row in of_metric]
        assert places == sorted(set(places))
        context = set(dense.tokenizer.all_special_ids) - {dense.tokenizer.unk_token_id}
        scorable = [(d, i) for d, ids in enumerate(documents) for i, id in enumerate(ids) if id not in context]
        assert metric == "masked" or places == scorable
        assert metric == "pseudo" or dense.tokenizer.unk_token_id not in {row["token_id"] for row in of_metric}
        shown = [list(ids) for ids in documents]
        if metric == "masked":
            for row in of_metric:
                shown[row["document"]][row["offset"]] = row["input_id"]
        for row in of_metric:
            d, i = row["document"], row["offset"]
            assert row["token_id"] == documents[d][i]
            start, length = window_of(len(documents[d]), i)
            ids = shown[d][start : start + length]
            if metric == "pseudo":
                assert row["input_id"] == dense.tokenizer.mask_token_id
                ids = [*ids[: i - start], dense.tokenizer.mask_token_id, *ids[i - start + 1 :]]
            log_probs = dense.log_probs(ids)[i - start]
            assert row["log_prob"] == pytest.approx(log_probs[row["token_id"]].item(), abs=1e-4)
            lower = (log_probs > row["log_prob"] + 1e-4).sum() - 1
            upper = (log_probs > row["log_prob"] - 1e-4).sum() - 1
            assert max(lower, 0) <= row["rank"] <= max(upper, 0) or lower + 1 == row["rank"]

    masked = [row for row in rows if row["metric"] == "masked"]
    cross_entropy = -sum(row["log_prob"] for row in masked) / len(masked)
    pseudo = [row["log_prob"] for row in rows if row["metric"] == "pseudo"]
    recomputed = {
        "masked_cross_entropy": cross_entropy,
        "masked_perplexity": math.exp(cross_entropy),
        "masked_accuracy": sum(row["rank"] == 0 for row in masked) / len(masked),
        "mean_reciprocal_rank": sum(1 / (1 + row["rank"]) for row in masked) / len(masked),
        "pseudo_log_likelihood": sum(pseudo),
        "pseudo_perplexity": math.exp(-sum(pseudo) / len(pseudo)),
    }
    words, characters, size = (
        sum(map(len, units)) for units in ([t.split() for t in texts], texts, map(str.encode, texts))
    )
    per_text = {
        "bits_per_byte": -sum(pseudo) / math.log(2) / size,
        "pseudo_perplexity_per_word": math.exp(-sum(pseudo) / words),
        "pseudo_perplexity_per_character": math.exp(-sum(pseudo) / characters),
    }
    lost = "" if kind == "roberta" else "MASKYes"  # what the WordPiece has no token for, 0.7 % of the text
    for name, value in (recomputed | (dict.fromkeys(per_text) if lost else per_text)).items():
        assert evaluation.metrics[name]["value"] == (value if value is None else pytest.approx(value)), name
    assert evaluation.result["unknown"] == {
        "tokens": len(lost) and 2,
        "characters": len(lost),
        "token_share": (len(lost) and 2) / sum(map(len, documents)),
        "character_share": len(lost) / characters,
    }
    assert evaluation.result["corpus"]["windowed_documents"] == sum(len(ids) > CAPACITY for ids in documents)


def test_masks_and_digest_are_those_of_mask_v1(short_file, checkpoint):
    """For each document alone, with the tokens and words that transformers gives; test_masking proves mask-v1."""
    model, recipe, seed = load(str(checkpoint("roberta"))), MaskRecipe(0.3, 0.5, 0.3, whole_word=True), 2**64 - 1
    evaluation = evaluate(model, short_file, recipe=recipe, mask_seed=seed)
    tokenizer, expected, digest = AutoTokenizer.from_pretrained(checkpoint("roberta")), {}, 0
    for d, text in enumerate(short_file.read_text(encoding="utf-8").split("\n")[:-1]):
        encoding = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        ids, words = np.array(encoding["input_ids"]), np.array(encoding.word_ids())
        lengths, keys = np.array([len(ids)]), np.array([document_key(text)], dtype=np.uint64)
        corruption = corrupt(ids, lengths, keys, recipe, model.tokenizer.masking, seed=seed, words=words)
        expected |= {(d, i): corruption.input_ids[i] for i in corruption.selected.tolist()}
        digest += mask_digest(corruption, lengths, keys)
    tokens = evaluation.tokens.to_pylist()
    assert {(row["document"], row["offset"]): row["input_id"] for row in tokens} == expected
    assert evaluation.result["mask_digest"] == format_digest(digest % DIGEST_MODULUS)


@pytest.fixture
def two_threads(monkeypatch) -> None:
    """How ONNX Runtime divides an operation among threads must not show in the scores."""
    monkeypatch.setattr("mlmkit.backends.onnx.cores", lambda: 2)


@pytest.mark.parametrize("kind", ["bert", "convbert"])
def test_batches_change_no_bit_on_onnx_runtime(kind, short_file, artifact, two_threads):
    """As docs/evaluation.md promises for the CPU, also where scores depend on padding (ConvBERT's convolutions)."""
    model, metrics = load(str(artifact(kind))), ("masked", "pseudo")
    assert model.info.sees_padding == (kind == "convbert")
    whole, *cuts = (evaluate(model, short_file, metrics=metrics, batch_tokens=n) for n in (0, 1, 70, 300))
    for cut in cuts:
        assert cut.tokens.equals(whole.tokens)
        without = [{key: value for key, value in one.result.items() if key not in TIMES} for one in (cut, whole)]
        assert without[0] == without[1]


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_scores_are_the_same_bits_whatever_the_batch(kind, artifact, two_threads):
    """Alone and among others, behind padding, and one position at a time."""
    model = load(str(artifact(kind)))
    assert model.device == "cpu"
    generator = np.random.default_rng(0)
    for length in (1, 9, 40):
        row = generator.integers(10, 600, size=length)
        mates = generator.integers(10, 600, size=(32, 60))
        positions = np.arange(length)
        alone = model.score(Batch(row[None], np.ones((1, length), np.int64), positions, row))
        for i in positions:
            single = model.score(Batch(row[None], np.ones((1, length), np.int64), positions[[i]], row[[i]]))
            assert single.log_prob[0] == alone.log_prob[i]
        for size in (1, 7, 32):
            ids, mask = mates[:size].copy(), np.ones((size, 60), np.int64)
            ids[-1, :length], mask[-1, length:] = row, 0
            among = model.score(Batch(ids, mask, positions + (size - 1) * 60, row))
            assert np.array_equal(among.log_prob, alone.log_prob)
            assert np.array_equal(among.rank, alone.rank)


def test_torch_scores_move_in_their_last_bits_at_most(checkpoint, short_file):
    model = load(str(checkpoint("bert")))
    whole, cut = (evaluate(model, short_file, metrics="pseudo", batch_tokens=n) for n in (0, 70))
    assert evaluate(model, short_file, metrics="pseudo").tokens.equals(whole.tokens)  # the same batches
    assert cut.result["mask_digest"] == whole.result["mask_digest"]
    difference = np.abs(cut.tokens["log_prob"].to_numpy() - whole.tokens["log_prob"].to_numpy())
    assert difference.max() <= 1e-5


def test_another_order_of_documents_has_the_same_digest(short_file, checkpoint, tmp_path):
    model = load(str(checkpoint("bert")))
    turned = tmp_path / "turned.txt"
    turned.write_text("".join(f"{line}\n" for line in short_file.read_text(encoding="utf-8").split("\n")[-2::-1]))
    first, second = (evaluate(model, path) for path in (short_file, turned))
    assert first.result["mask_digest"] == second.result["mask_digest"]
    assert first.result["corpus"]["fingerprint"] != second.result["corpus"]["fingerprint"]
    value = "masked_cross_entropy"
    assert first.metrics[value]["value"] == pytest.approx(second.metrics[value]["value"], abs=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_token_is_masked_alone_or_with_the_rest_of_its_word(variant, checkpoint):
    texts = ["The interpreter distinguishes representations.", "The 日本語 日本語 is executed."]  # six unknown tokens
    model, dense = load(str(checkpoint("bert"))), Dense(checkpoint("bert"))
    for scored, text in zip(pseudo_log_likelihood(model, texts, variant=variant), texts, strict=True):
        assert scored.token_ids.tolist() == dense.ids(text)
        assert scored.log_prob.tolist() == pytest.approx(dense.pseudo(text, variant), abs=1e-4)
    assert dense.ids(texts[1]).count(dense.tokenizer.unk_token_id) == 6
    assert dense.pseudo(texts[0], "original") != dense.pseudo(texts[0], "within-word")


def test_pseudo_sample_is_mask_v1s_choice_and_estimates_the_whole(text_file, artifact):
    model = load(str(artifact("bert")))
    whole = evaluate(model, text_file, metrics="pseudo")
    part = evaluate(model, text_file, metrics="pseudo", pseudo_sample=0.3)
    corpus = tokenize(paragraphs(), model.tokenizer)
    recipe = MaskRecipe(mask_prob=0.3)
    chosen = corrupt(corpus.ids, corpus.lengths, corpus.keys, recipe, model.tokenizer.masking, seed=0).selected
    flat = corpus.starts[part.tokens["document"].to_numpy()] + part.tokens["offset"].to_numpy()
    assert flat.tolist() == chosen.tolist()
    exact, estimate = (each.metrics["pseudo_log_likelihood"]["value"] for each in (whole, part))
    assert exact is not None and estimate is not None
    spread = float(np.std(whole.tokens["log_prob"].to_numpy())) / math.sqrt(len(flat)) * len(whole.tokens)
    assert abs(estimate - exact) < 5 * spread


@pytest.mark.parametrize(
    ("probabilities", "losses", "mean"), [((0.7, 0.4), (0.36, 0.92), 0.636), ((0.9, 0.7), (0.105, 0.357), 0.231)]
)
def test_worked_examples_of_the_loss(probabilities, losses, mean):
    log_prob = np.log(np.array(probabilities, dtype=np.float32))
    assert [round(-float(value), 3) for value in log_prob] == pytest.approx(losses, abs=0.005)
    tokens = pa.table({"log_prob": log_prob, "rank": [0, 7], "top_log_prob": np.log(np.array([0.7, 0.5], np.float32))})
    masked = FAMILIES["masked"]
    totals = masked.token_columns(tokens).sum(axis=0)
    metrics = {name: float(estimator(totals)) for name, estimator in masked.estimators.items()}
    assert metrics["masked_cross_entropy"] == pytest.approx(-np.log(probabilities).mean(), rel=1e-6)
    assert metrics["masked_cross_entropy"] == pytest.approx(mean, abs=0.001)
    assert metrics["masked_perplexity"] == pytest.approx(1 / math.sqrt(math.prod(probabilities)), rel=1e-6)
    assert metrics["masked_accuracy"] == metrics["masked_top5_accuracy"] == 0.5
    assert metrics["mean_reciprocal_rank"] == pytest.approx((1 + 1 / 8) / 2)
    # One token in the bin of confidence 0.7, right; one in that of 0.5, wrong.
    assert metrics["expected_calibration_error"] == pytest.approx((0.3 + 0.5) / 2, abs=1e-6)


def test_intervals_are_those_of_the_bootstrap():
    """For a mean of independent documents the percentile interval is close to the normal one."""
    generator = np.random.default_rng(0)
    sums = np.column_stack([generator.normal(3, 1, 400), np.ones(400)])
    mean = {"mean": lambda totals: totals[..., 0] / totals[..., 1]}
    found = bootstrap(sums, mean)["mean"]
    assert found["value"] == pytest.approx(sums[:, 0].mean())
    half = 1.96 * sums[:, 0].std() / 20
    assert found["low"] == pytest.approx(found["value"] - half, abs=0.02)
    assert found["high"] == pytest.approx(found["value"] + half, abs=0.02)
    assert bootstrap(sums, mean)["mean"] == found


def test_a_resample_without_a_scored_token_has_no_value():
    """Counted as zero it would pull the interval of a rare event down to a perfect score."""
    sums = np.zeros((20, 2))
    sums[[3, 7]] = 5.0, 2.0
    mean = {"mean": lambda totals: totals[..., 0] / totals[..., 1]}
    assert bootstrap(sums, mean)["mean"] == {"value": 2.5, "low": 2.5, "high": 2.5}
    sums[7] = 0.0  # one document says nothing of others
    assert bootstrap(sums, mean)["mean"] == {"value": 2.5, "low": None, "high": None}


def test_a_number_that_overflows_is_null_in_valid_json(short_file, checkpoint, tmp_path):
    path = tmp_path / "unspaced.txt"
    path.write_text("".join(line.replace(" ", "") * 40 + "\n" for line in paragraphs()[:3]), encoding="utf-8")
    evaluate(load(str(checkpoint("roberta"))), path, metrics="pseudo", output=tmp_path / "result")
    text = (tmp_path / "result" / "result.json").read_text()
    metrics = json.loads(text, parse_constant=lambda name: pytest.fail(name))["metrics"]
    per_word = metrics["pseudo_perplexity_per_word"]
    assert [per_word[key] for key in ("value", "low", "high")] == [None, None, None]
    assert metrics["bits_per_byte"]["value"] > 0


def test_a_document_without_tokens_scores_nothing(checkpoint):
    model = load(str(checkpoint("bert")))
    empty, full = pseudo_log_likelihood(model, ["\u200b", "Roma"])
    assert (empty.pseudo_log_likelihood, len(empty.log_prob)) == (None, 0)
    assert (full.pseudo_log_likelihood or 0) < 0


def test_scores_that_are_not_finite_are_named(checkpoint):
    model = load(str(checkpoint("bert")))
    corpus = tokenize(["Roma", "O rato roeu"], model.tokenizer)

    class Broken:
        tokenizer, info, device, name, manifest = model.tokenizer, model.info, "cpu", "broken", None

        def score(self, batch: Batch) -> Scored:
            scored = model.score(batch)
            return scored._replace(log_prob=np.where(batch.targets == corpus.ids[-1], np.nan, scored.log_prob))

    with pytest.raises(CheckError, match=f"document 1, token {corpus.lengths[1] - 1}"):
        score_rows(Broken(), corpus, pseudo_rows(corpus, model.tokenizer, CAPACITY))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": MaskRecipe(mask_prob=0.0)}, "select no token"),
        ({"metrics": ("bleu",)}, "no metric 'bleu'"),
        ({"metrics": ()}, "no metric is named"),
        ({"pseudo_sample": 0}, "sample must be"),
        ({"metrics": "pseudo", "variant": "l2r"}, "variant 'l2r'"),
        ({"mask_seed": ()}, "seed"),
        ({"mask_seed": (1, 1)}, "seed"),
        ({"mask_seed": -1}, "seed"),
        ({"mask_seed": 1.0}, "whole number"),
        ({"mask_seed": [0.5]}, "whole number"),
    ],
)
def test_unusable_options_are_named(options, message, checkpoint):
    with pytest.raises(UserError, match=message):
        evaluate(checkpoint("bert"), ["Roma"], **options)


def test_a_path_is_taken_wherever_text_is(checkpoint, short_file, tmp_path):
    model, texts, folder = Path(checkpoint("bert")), Path(short_file), tmp_path / "result"
    for data in (texts, Source(texts)):  # pyright: ignore[reportArgumentType]
        found = evaluate(load(model), data, output=folder, overwrite=True)
        assert read_record(folder / "result.json", "") == found.result
        assert found.result["model"]["path"] == str(model)
        assert found.result["corpus"]["source"]["location"] == str(texts)
    assert pseudo_log_likelihood(model, ["Roma"])[0].pseudo_log_likelihood
    manifest = export(model, tmp_path / "artifact", text=PROOF)
    assert load(tmp_path / "artifact").info.fingerprint == manifest.fingerprint


def test_a_dynamically_quantized_artifact_is_refused_unless_insisted_on(capsys, artifact, short_file, tmp_path):
    """Its activation scales span the batch, so a score depends on the rows beside it."""
    from onnxruntime.quantization import quantize_dynamic

    folder = Path(shutil.copytree(artifact("bert"), tmp_path / "int8"))
    quantize_dynamic(str(artifact("bert") / "model.onnx"), str(folder / "model.onnx"))
    manifest = read_manifest(artifact("bert"))
    write_manifest(folder, replace(manifest, precision=DYNAMIC_INT8, files=hash_files(folder)))
    arguments = ["eval", folder, "--set", short_file]
    for refused in (arguments, ["score", folder, short_file]):
        code, _, err = run(capsys, *refused)
        assert (code, "--allow-batch-coupling" in err) == (2, True)
    assert run_json(capsys, *arguments, "--allow-batch-coupling")["batch_coupling"] is True
    assert run_json(capsys, "eval", artifact("bert"), "--set", short_file)["batch_coupling"] is False
