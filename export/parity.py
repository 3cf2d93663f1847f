"""Proof that an engine computes what its reference does: the same masked tokens of real text through both.

proof_text      the user's text, the training run's held-out text, or Python's documentation
parity_batches  that text tokenised and masked, in batches of several shapes
check_parity    the scores of these batches by both, compared: `Parity`, the report in the manifest
require_parity  the same, and an error if a difference exceeds its bound
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlmkit.artifact import DYNAMIC_INT8
from mlmkit.backends import Backend, Batch, Scored
from mlmkit.batching import pad
from mlmkit.corpus import Corpus, tokenize
from mlmkit.documents import read_documents
from mlmkit.errors import CheckError, DamagedError, UserError
from mlmkit.files import read_record
from mlmkit.locations import EVERY_KEY, Source
from mlmkit.masking import MaskRecipe, corrupt
from mlmkit.progress import progress
from mlmkit.pydocs import topics
from mlmkit.tokenizer import Tokenizer

log = logging.getLogger(__name__)

PYTHON_DOCS = "Python's documentation"
CALIBRATED = ("fp16", "int8")  # precisions that depend on the range of values on real text
DOCUMENTS = 1024  # read from the text
# How much of them is scored: tokens times the bytes of the weights. 5,000 tokens for BERT-base: half a minute on two
# cores.
WORK, FEWEST_TOKENS, MOST_TOKENS = 1 << 41, 1 << 9, 1 << 14
ROW, LONGEST = 512, 2048  # tokens; the attention of a longer row takes gigabytes on some engines
ROWS = 8
TOP = 5
UNKNOWN = 0.01  # more unknown characters than this share: the text is hardly one for this tokenizer


class Bounds(NamedTuple):
    """The largest differences that a precision may have, in nats.

    Of a single log-probability: `max_log_prob + relative_log_prob * |log P|`, where |log P| is the largest at its
    position, among the target and the candidates. Of all of them on average: `mean_log_prob`.
    """

    max_log_prob: float
    relative_log_prob: float
    mean_log_prob: float
    cross_entropy: float


BOUNDS = {  # docs/decisions.md has the measurements
    "fp32": Bounds(1e-4, 5e-5, 1e-4, 1e-4),
    "fp16": Bounds(0.05, 0.0, 0.01, 0.002),
    "bf16": Bounds(0.5, 0.0, 0.05, 0.01),
    "int8": Bounds(2.0, 0.0, 0.2, 0.03),
    DYNAMIC_INT8: Bounds(2.0, 0.0, 0.2, 0.03),
}


# ---------------------------------------------------------------- the text


@dataclass(frozen=True)
class ProofText:
    """The text of a proof, and the name under which the manifest reports it."""

    name: str
    texts: Sequence[str]

    def split(self, precision: str) -> tuple["ProofText | None", "ProofText"]:
        """The text to calibrate the precision on, None if it needs none, and the text to prove it on.

        A precision that is calibrated gets every other document for that.
        """
        if precision not in CALIBRATED:
            return None, self
        calibration, proof = (self.texts[1::2], self.texts[::2]) if len(self.texts) > 1 else (self.texts, self.texts)
        return ProofText(self.name, calibration), ProofText(self.name, proof)


def proof_text(checkpoint: str, given: str | None = None) -> ProofText:
    """The first documents of the file `given`, else of the training run's held-out text, else Python's documentation.

    Raises `UserError` for a text that cannot be read or has no documents.
    """
    if source := Source(given) if given else held_out_text(Path(checkpoint).resolve()):
        texts = list(islice(read_documents(source), DOCUMENTS))
        if not texts:
            raise UserError(f"{source.name} has no documents")
        return ProofText(given or f"the run's held-out text ({source.name})", texts)
    log.info("checking parity on Python's documentation, in English; for a text like yours, use --text")
    return ProofText(PYTHON_DOCS, topics())


def held_out_text(checkpoint: Path) -> Source | None:
    """A held-out text of the training run that the checkpoint belongs to, if it still exists."""
    for run in (checkpoint, checkpoint.parent, checkpoint.parent.parent):
        for result in sorted(run.glob("checkpoints/*/held-out*/result.json"), key=str, reverse=True):
            try:
                values = read_record(result, "it is ignored")["corpus"]["source"]
            except DamagedError as error:
                log.warning("%s", error)
                continue
            location = values.pop("locations", [values["location"]])
            options = {name: value for name, value in values.items() if name not in ("set", "location", "keys")}
            source = Source(tuple(location), **options, keys=tuple(values.get("keys", EVERY_KEY)))
            if all(Path(path).is_file() for path in location):
                return source
            log.warning("the run's held-out text %s no longer exists", source.name)
            return None
    return None


def require_calibration(precision: str, text: ProofText) -> None:
    """Raise `UserError` for int8 if no text was given: its scales must be measured on text like the user's."""
    if precision == "int8" and text.name == PYTHON_DOCS:
        raise UserError("int8 needs scales measured on text like yours: give some with --text")


def calibration_batches(text: ProofText, precision: str, reference: Backend, weight_bytes: int) -> list[Batch]:
    """Batches of the part of `text` that the precision is calibrated on, none if it needs none."""
    calibration_text = text.split(precision)[0]
    if calibration_text is None:
        return []
    corpus = tokenize(calibration_text.texts, reference.tokenizer)
    return parity_batches(corpus, reference.tokenizer, reference.info.max_length, weight_bytes)


def row_groups(batch: Batch, most: int) -> Iterator[Batch]:
    """The rows of a batch in batches of `most` rows, which keep their padding."""
    seq = batch.input_ids.shape[1]
    rows = batch.positions // seq
    for first in range(0, len(batch.input_ids), most):
        group, inside = slice(first, first + most), (rows >= first) & (rows < first + most)
        positions = batch.positions[inside] - first * seq
        yield Batch(batch.input_ids[group], batch.attention_mask[group], positions, batch.targets[inside])


def parity_batches(corpus: Corpus, tokenizer: Tokenizer, max_length: int, weight_bytes: int) -> list[Batch]:
    """Batches of several shapes from a text, masked by mask-v1 with seed 0.

    They hold as many tokens, padding included, as a model with weights of this size processes within `WORK`. Raises
    `UserError` if the masks select no token.
    """
    room = max_length - tokenizer.added_tokens
    corruption = corrupt(
        corpus.ids, corpus.lengths, corpus.keys, MaskRecipe(), tokenizer.masking, seed=0, words=corpus.words
    )
    if not len(corruption.selected):
        raise UserError("the text has no token to score in the parity check: give a longer one with --text")
    selected = np.zeros(len(corpus.ids), dtype=bool)
    selected[corruption.selected] = True
    targets = corpus.ids.astype(np.int64)

    def batch(spans: list[tuple[int, int]]) -> Batch:
        rows = [tokenizer.frame(corruption.input_ids[begin:end]) for begin, end in spans]
        input_ids, attention_mask = pad(rows, tokenizer.pad_id)
        width, prefix = input_ids.shape[1], len(tokenizer.prefix)
        masked = [np.flatnonzero(selected[begin:end]) for begin, end in spans]  # offsets in each row's text
        positions = np.concatenate([row * width + prefix + offsets for row, offsets in enumerate(masked)])
        chosen = np.concatenate([targets[begin:end][selected[begin:end]] for begin, end in spans])
        return Batch(input_ids, attention_mask, positions, chosen)

    lengths = np.minimum(corpus.lengths, min(room, ROW))
    spans = [(int(begin), int(begin + size)) for begin, size in zip(corpus.starts, lengths, strict=False) if size]
    groups = [spans[index : index + ROWS] for index in range(0, len(spans), ROWS)]
    tokens = np.cumsum([len(group) * max(end - begin for begin, end in group) for group in groups])
    budget = min(max(WORK // weight_bytes, FEWEST_TOKENS), MOST_TOKENS)
    groups = groups[: int(np.searchsorted(tokens, budget)) + 1]
    # Few texts have the model's full length, so the row of that length runs across texts.
    full_length = (0, min(room, LONGEST, len(corpus.ids)))
    first = int(corruption.selected[0])
    batches = map(batch, [*groups, spans[:1], [full_length], [(first, first + 1)]])
    return [made for made in batches if len(made.positions)]


# ---------------------------------------------------------------- the comparison


@dataclass(frozen=True)
class Parity:
    """Differences between an engine and its reference over `masked` targets of a text, in nats.

    `max_log_prob_difference` is the difference that comes nearest to its bound, which is `max_log_prob_bound`;
    `max_top_log_prob_*` are the same for the candidates. `cross_entropy` is the reference's; `cross_entropy_difference`
    is the engine's minus the reference's. `top_1_agreement` is the share of positions where the likeliest id is the
    same; `top_5_agreement` the share of the reference's five likeliest ids that are among the engine's five.
    `unknown_characters` is the share of the text's characters that the tokenizer does not know.
    """

    text: str
    unknown_characters: float
    batches: int
    masked: int
    max_log_prob_difference: float
    max_log_prob_bound: float
    mean_log_prob_difference: float
    max_top_log_prob_difference: float
    max_top_log_prob_bound: float
    cross_entropy: float
    cross_entropy_difference: float
    rank_agreement: float
    top_1_agreement: float
    top_5_agreement: float
    bounds: Bounds

    @property
    def passed(self) -> bool:
        """Whether every figure is finite and within its bound."""
        numbers = [value for value in asdict(self).values() if isinstance(value, float)]
        return bool(np.isfinite(numbers).all()) and is_within(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """The report as the manifest holds it."""
        return {**asdict(self), "bounds": self.bounds._asdict()}


def require_parity(
    reference: Backend, engine: Backend, text: ProofText, precision: str, weight_bytes: int, *, allow_drift: bool | None
) -> Parity:
    """Check parity on the part of `text` that the precision was not calibrated on.

    `weight_bytes`, the size of the weights, decides how much of it is scored. Raises `CheckError` if a difference
    exceeds its bound and `allow_drift` is not set, and `UserError` if the text has no token to score. `allow_drift` is
    None where no option allows it.
    """
    parity = check_parity(reference, engine, text.split(precision)[1], BOUNDS[precision], weight_bytes)
    if not parity.passed:
        failure = f"parity does not hold {parity_line(parity.as_dict())}"
        if not allow_drift:
            hint = "" if allow_drift is None else ". --allow-drift writes it anyway"
            raise CheckError(f"{failure}; nothing was written{hint}")
        log.warning("%s; written anyway, and the manifest says so", failure)
    return parity


def check_parity(reference: Backend, engine: Backend, text: ProofText, bounds: Bounds, weight_bytes: int) -> Parity:
    """Score the same masked texts with both: full batches, ragged ones, one row, the longest row, one token.

    Raises `UserError` if the text has no token to score.
    """
    corpus = tokenize(text.texts, reference.tokenizer)
    if corpus.unknown_share > UNKNOWN:
        log.warning("the tokenizer does not know %.1f%% of the characters of %s", 100 * corpus.unknown_share, text.name)
    batches = parity_batches(corpus, reference.tokenizer, reference.info.max_length, weight_bytes)
    scores = []
    with progress("checking parity", len(batches), "batches") as bar:
        for batch in batches:
            scores.append((reference.score(batch), engine.score(batch)))
            bar.advance()
    wanted, actual = (Scored(*map(np.concatenate, zip(*side, strict=True))) for side in zip(*scores, strict=True))
    differences = np.abs(actual.log_prob - wanted.log_prob)
    # Rounding grows with the logits, also where one token takes all the probability: its candidates show their size.
    largest = np.maximum(np.abs(wanted.log_prob), np.abs(wanted.top_log_prob).max(axis=1)).astype(np.float64)
    allowed = bounds.max_log_prob + bounds.relative_log_prob * np.nan_to_num(largest)
    max_difference, max_bound = _nearest_to_bound(differences, allowed)
    candidates = np.abs(actual.top_log_prob - wanted.top_log_prob)
    max_top_difference, max_top_bound = _nearest_to_bound(candidates, allowed[:, None])
    mean, actual_mean = (float(side.log_prob.mean(dtype=np.float64)) for side in (wanted, actual))
    top = wanted.top_id[:, :TOP, None] == actual.top_id[:, None, :TOP]
    return Parity(
        text=text.name,
        unknown_characters=corpus.unknown_share,
        batches=len(batches),
        masked=len(differences),
        max_log_prob_difference=max_difference,
        max_log_prob_bound=max_bound,
        mean_log_prob_difference=float(differences.mean(dtype=np.float64)),
        max_top_log_prob_difference=max_top_difference,
        max_top_log_prob_bound=max_top_bound,
        cross_entropy=-mean,
        cross_entropy_difference=mean - actual_mean,
        rank_agreement=float((actual.rank == wanted.rank).mean()),
        top_1_agreement=float(top[:, 0, 0].mean()),
        top_5_agreement=float(top.any(axis=2).mean()),
        bounds=bounds,
    )


def _nearest_to_bound(differences: NDArray[np.float32], allowed: NDArray[np.float64]) -> tuple[float, float]:
    """The difference that uses most of its bound, and that bound. NaN exceeds every bound."""
    nearest = np.nan_to_num(differences / allowed, nan=np.inf).argmax()
    return float(differences.flat[nearest]), float(np.broadcast_to(allowed, differences.shape).flat[nearest])


# ---------------------------------------------------------------- the report


def is_within(report: Mapping[str, Any]) -> bool:
    """Whether a manifest's report has all figures, and each is within its bound."""
    try:
        return all(value <= bound for _, value, bound in _figures(report))
    except (KeyError, TypeError):
        return False


def parity_line(report: Mapping[str, Any]) -> str:
    """A manifest's report as text: each figure beside its bound, with those beyond it marked."""
    try:
        figures = ", ".join(
            f"{name} {value:.1e} ({'bound' if value <= bound else 'BEYOND its bound of'} {bound:.1e})"
            for name, value, bound in _figures(report)
        )
        return (
            f"over {report['masked']} masked tokens of {report['text']}, in nats: {figures}; same best token "
            f"{report['top_1_agreement']:.2%}, of the best five {report['top_5_agreement']:.2%}"
        )
    except (KeyError, TypeError, ValueError):  # in a manifest from elsewhere
        return "in a report that cannot be read"


def _figures(report: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Name, value and bound of each figure that has a bound."""
    bounds = report["bounds"]
    return [
        ("mean |Δ log P|", report["mean_log_prob_difference"], bounds["mean_log_prob"]),
        ("largest", report["max_log_prob_difference"], report["max_log_prob_bound"]),
        ("largest of a candidate", report["max_top_log_prob_difference"], report["max_top_log_prob_bound"]),
        ("|Δ cross-entropy|", abs(report["cross_entropy_difference"]), bounds["cross_entropy"]),
    ]
