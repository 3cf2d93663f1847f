"""Proof that an engine computes what the checkpoint does, on real text."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlmkit.artifact import DYNAMIC_INT8
from mlmkit.backends import Backend, Batch
from mlmkit.batching import pad
from mlmkit.console import progress
from mlmkit.corpus import Corpus, tokenize
from mlmkit.errors import CheckError, UserError
from mlmkit.export.proof_text import ProofText
from mlmkit.masking import MaskRecipe, corrupt
from mlmkit.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# What is read of a text: tokens times the bytes of the weights. 5,000 tokens for BERT-base: half a minute on two cores.
WORK, LEAST_TOKENS, MOST_TOKENS = 1 << 41, 1 << 9, 1 << 14
ROW, LONGEST = 512, 2048  # tokens; a longer row's attention takes gigabytes on some engines
ROWS = 8
TOP = 5
UNKNOWN = 0.01  # the share of unknown characters from which on the text is hardly one for this tokenizer


class Bounds(NamedTuple):
    """What a precision may differ by, in nats.

    A log-probability by `max_log_prob + relative_log_prob * |log P|`, as `numpy.isclose` has it, but with the largest
    |log P| of its position, among target and candidates; all of them by `mean_log_prob` in the mean; the cross-entropy
    by `cross_entropy`.
    """

    max_log_prob: float
    relative_log_prob: float
    mean_log_prob: float
    cross_entropy: float


# docs/decisions.md has the measurements behind these.
BOUNDS = {
    "fp32": Bounds(1e-4, 5e-5, 1e-4, 1e-4),
    "fp16": Bounds(0.05, 0.0, 0.01, 0.002),
    "bf16": Bounds(0.5, 0.0, 0.05, 0.01),
    "int8": Bounds(2.0, 0.0, 0.2, 0.03),
    DYNAMIC_INT8: Bounds(2.0, 0.0, 0.2, 0.03),
}


@dataclass(frozen=True)
class Parity:
    """Differences between an engine and its reference over `masked` targets of a text, in nats.

    `max_log_prob_difference` is the one that comes nearest to its bound, which is `max_log_prob_bound`; the same of the
    candidates, `max_top_log_prob_*`. `cross_entropy` is the reference's, `cross_entropy_difference` what the engine
    adds to it. `top_1_agreement` is how often the likeliest id is the same; `top_5_agreement`, the share of the
    reference's five likeliest ids that are among the engine's. `unknown_characters` is the share of the text's
    characters that the tokenizer does not know.
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
        """Whether every figure is a number, and within its bound."""
        numbers = [value for value in asdict(self).values() if isinstance(value, float)]
        return bool(np.isfinite(numbers).all()) and is_within(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """As the manifest carries it."""
        return {**asdict(self), "bounds": self.bounds._asdict()}


def _figures(report: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Each figure that has a bound: its name, the figure and the bound."""
    bounds = report["bounds"]
    return [
        ("mean |Δ log P|", report["mean_log_prob_difference"], bounds["mean_log_prob"]),
        ("largest", report["max_log_prob_difference"], report["max_log_prob_bound"]),
        ("largest of a candidate", report["max_top_log_prob_difference"], report["max_top_log_prob_bound"]),
        ("|Δ cross-entropy|", abs(report["cross_entropy_difference"]), bounds["cross_entropy"]),
    ]


def is_within(report: Mapping[str, Any]) -> bool:
    """Whether the figures of a report as the manifest carries it are there, and within their bounds."""
    try:
        return all(value <= bound for _, value, bound in _figures(report))
    except (KeyError, TypeError):
        return False


def parity_line(report: Mapping[str, Any]) -> str:
    """A report as the manifest carries it, in words: each figure beside its bound, those beyond it named."""
    try:
        return _parity_line(report)
    except (KeyError, TypeError, ValueError):  # of a stranger's manifest
        return "in a report that cannot be read"


def _parity_line(report: Mapping[str, Any]) -> str:
    figures = (
        f"{name} {value:.1e} ({'bound' if value <= bound else 'BEYOND its bound of'} {bound:.1e})"
        for name, value, bound in _figures(report)
    )
    return (
        f"over {report['masked']} masked tokens of {report['text']}, in nats: {', '.join(figures)}; "
        f"same best token {report['top_1_agreement']:.2%}, of the best five {report['top_5_agreement']:.2%}"
    )


def require_parity(parity: Parity, allow_drift: bool) -> None:
    """Raise `CheckError` for differences beyond the bounds, unless the user wants the artifact all the same."""
    if parity.passed:
        return
    beyond = f"parity does not hold {parity_line(parity.as_dict())}"
    if not allow_drift:
        raise CheckError(f"{beyond}; nothing was written. --allow-drift writes it all the same")
    log.warning("%s; written all the same, and the manifest says so", beyond)


def check_parity(reference: Backend, engine: Backend, text: ProofText, bounds: Bounds, weight_bytes: int) -> Parity:
    """Score the same corrupted texts with both: a full batch, ragged ones, batch 1, the longest row, one token.

    `weight_bytes`, the size of the weights, decides how much of the text is read. Raises `UserError` when the text has
    no token to score.
    """
    corpus = tokenize(text.texts, reference.tokenizer)
    if corpus.unknown_share > UNKNOWN:
        log.warning("the tokenizer does not know %.1f%% of the characters of %s", 100 * corpus.unknown_share, text.name)
    batches = parity_batches(corpus, reference.tokenizer, reference.info.max_length, weight_bytes)
    expected, found = [], []
    with progress() as bar:
        for batch in bar.track(batches, description="checking parity, batches"):
            expected.append(reference.score(batch))
            found.append(engine.score(batch))
    log_prob, rank, top_log_prob, top_id = (np.concatenate(parts) for parts in zip(*expected, strict=True))
    its_log_prob, its_rank, its_top_log_prob, its_top_id = (np.concatenate(p) for p in zip(*found, strict=True))
    differences = np.abs(its_log_prob - log_prob)
    best = min(TOP, top_id.shape[1])
    # The larger the logits, the more they are rounded, also where one token takes all: its candidates show them.
    allowed = bounds.max_log_prob + bounds.relative_log_prob * np.nan_to_num(
        np.maximum(np.abs(log_prob), np.abs(top_log_prob).max(axis=1)).astype(np.float64)
    )
    largest, bound = _nearest_to_bound(differences, allowed)
    top_largest, top_bound = _nearest_to_bound(np.abs(its_top_log_prob - top_log_prob), allowed[:, None])
    return Parity(
        text=text.name,
        unknown_characters=corpus.unknown_share,
        batches=len(batches),
        masked=len(differences),
        max_log_prob_difference=largest,
        max_log_prob_bound=bound,
        mean_log_prob_difference=float(differences.mean(dtype=np.float64)),
        max_top_log_prob_difference=top_largest,
        max_top_log_prob_bound=top_bound,
        cross_entropy=float(-log_prob.mean(dtype=np.float64)),
        cross_entropy_difference=float(log_prob.mean(dtype=np.float64) - its_log_prob.mean(dtype=np.float64)),
        rank_agreement=float((its_rank == rank).mean()),
        top_1_agreement=float((its_top_id[:, 0] == top_id[:, 0]).mean()),
        top_5_agreement=float((top_id[:, :best, None] == its_top_id[:, None, :best]).any(axis=2).mean()),
        bounds=bounds,
    )


def _nearest_to_bound(differences: NDArray[np.float32], allowed: NDArray[np.float64]) -> tuple[float, float]:
    """The difference that takes most of its bound, and that bound. NaN counts as beyond every bound."""
    nearest = np.nan_to_num(differences / allowed, nan=np.inf).argmax()
    return float(differences.flat[nearest]), float(np.broadcast_to(allowed, differences.shape).flat[nearest])


def parity_batches(corpus: Corpus, tokenizer: Tokenizer, max_length: int, weight_bytes: int) -> list[Batch]:
    """Batches of several shapes from a text, corrupted by mask-v1 with seed 0.

    As many, padding counted, as a model with weights of this size reads within `WORK`. Raises `UserError` where the
    masks select no token.
    """
    room = max_length - tokenizer.added_tokens
    usual, longest = min(room, ROW), min(room, LONGEST)
    corruption = corrupt(
        corpus.ids, corpus.lengths, corpus.keys, MaskRecipe(), tokenizer.masking, seed=0, words=corpus.words
    )
    clean = corpus.ids.astype(np.int64)
    chosen = np.zeros(len(clean), dtype=bool)
    chosen[corruption.selected] = True

    def batch(spans: list[tuple[int, int]]) -> Batch | None:
        rows = [tokenizer.frame(corruption.input_ids[begin:end]) for begin, end in spans]
        input_ids, attention_mask = pad(rows, tokenizer.pad_id)
        positions, targets = [], []
        for row, (begin, end) in enumerate(spans):
            offsets = np.flatnonzero(chosen[begin:end])
            positions.append(row * input_ids.shape[1] + len(tokenizer.prefix) + offsets)
            targets.append(clean[begin:end][offsets])
        flat = np.concatenate(positions)
        return Batch(input_ids, attention_mask, flat, np.concatenate(targets)) if len(flat) else None

    lengths = np.minimum(corpus.lengths, usual)
    spans = [(int(begin), int(begin + size)) for begin, size in zip(corpus.starts, lengths, strict=False) if size]
    if not len(corruption.selected):
        raise UserError("the parity check found no token to score in the given text: name a longer one with --text")
    first = int(corruption.selected[0])
    groups = [spans[index : index + ROWS] for index in range(0, len(spans), ROWS)]
    read = np.cumsum([len(group) * max(end - begin for begin, end in group) for group in groups])
    budget = min(max(WORK // weight_bytes, LEAST_TOKENS), MOST_TOKENS)
    groups = groups[: int(np.searchsorted(read, budget)) + 1]
    # Of many texts few have the model's full length: the row of that length is laid together from all of them.
    shapes = [*groups, spans[:1], [(0, min(longest, len(clean)))], [(first, first + 1)]]
    return [made for group in shapes if (made := batch(group)) is not None]
