"""Proof that an engine computes what the checkpoint does, on real text."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from mlmkit.artifact import DYNAMIC_INT8
from mlmkit.backends import Backend, Batch
from mlmkit.batching import pad
from mlmkit.corpus import tokenize
from mlmkit.errors import CheckError, UserError
from mlmkit.masking import MaskRecipe, corrupt
from mlmkit.tokenizer import Tokenizer

log = logging.getLogger(__name__)

TEXTS, TOKENS = 512, 1 << 14  # what is read of the texts at most: a minute or two for BERT-base on two cores
ROW, LONGEST = 512, 2048  # tokens; a longer row's attention takes gigabytes on some engines
ROWS = 8
TOP = 5


class Bounds(NamedTuple):
    """What a precision may differ by, in nats: the largest and the mean difference of a target's log-probability.

    And the difference of cross-entropy.
    """

    max_log_prob: float
    mean_log_prob: float
    cross_entropy: float


# docs/decisions.md has the measurements behind these.
BOUNDS = {
    "fp32": Bounds(1e-4, 1e-4, 1e-4),
    "fp16": Bounds(0.05, 0.01, 0.002),
    "bf16": Bounds(0.5, 0.05, 0.01),
    "int8": Bounds(2.0, 0.2, 0.03),
    DYNAMIC_INT8: Bounds(2.0, 0.2, 0.03),
}


@dataclass(frozen=True)
class Parity:
    """Differences between an engine and its reference over `masked` targets, in nats.

    `cross_entropy` is the reference's, `cross_entropy_difference` what the engine adds to it. `top_1_agreement` is how
    often the likeliest id is the same; `top_5_agreement`, the share of the reference's five likeliest ids that are
    among the engine's.
    """

    batches: int
    masked: int
    max_log_prob_difference: float
    mean_log_prob_difference: float
    max_top_log_prob_difference: float
    cross_entropy: float
    cross_entropy_difference: float
    rank_agreement: float
    top_1_agreement: float
    top_5_agreement: float
    bounds: Bounds

    @property
    def passed(self) -> bool:
        """Written so that NaN fails."""
        return (
            max(self.max_log_prob_difference, self.max_top_log_prob_difference) <= self.bounds.max_log_prob
            and self.mean_log_prob_difference <= self.bounds.mean_log_prob
            and abs(self.cross_entropy_difference) <= self.bounds.cross_entropy
        )

    def as_dict(self) -> dict[str, Any]:
        """As the manifest carries it."""
        return {**asdict(self), "bounds": self.bounds._asdict()}


def parity_line(report: Mapping[str, Any]) -> str:
    """A report as the manifest carries it, in words."""
    return (
        f"over {report['masked']} masked tokens: log P differs by {report['mean_log_prob_difference']:.1e} nats in the "
        f"mean, {report['max_log_prob_difference']:.1e} at most; cross-entropy {report['cross_entropy']:.4f} "
        f"({report['cross_entropy_difference']:+.1e}); same best token {report['top_1_agreement']:.2%}, "
        f"of the best five {report['top_5_agreement']:.2%}"
    )


def require_parity(parity: Parity, allow_drift: bool) -> None:
    """Raise `CheckError` for differences beyond the bounds, unless the user wants the artifact all the same."""
    if parity.passed:
        return
    mean, largest, cross_entropy = parity.bounds.mean_log_prob, parity.bounds.max_log_prob, parity.bounds.cross_entropy
    beyond = (
        f"parity does not hold {parity_line(parity.as_dict())} (bounds: {mean:.0e} in the mean, {largest:.0e} at most, "
        f"cross-entropy {cross_entropy:.0e})"
    )
    if not allow_drift:
        raise CheckError(f"{beyond}; nothing was exported. --allow-drift exports it all the same")
    log.warning("%s; exported all the same, and the manifest says so", beyond)


def check_parity(reference: Backend, engine: Backend, texts: Sequence[str], bounds: Bounds) -> Parity:
    """Score the same corrupted texts with both: a full batch, ragged ones, batch 1, the longest row, one token.

    Raises `UserError` when the texts have no token to score.
    """
    expected, found, scored, batches = [], [], [], 0
    for batch in parity_batches(texts, reference.tokenizer, reference.info.max_length):
        expected.append(reference.predict(batch))
        found.append(engine.predict(batch))
        scored.append(engine.score(batch))
        batches += 1
    log_prob, rank, top_log_prob, top_id = (np.concatenate(parts) for parts in zip(*expected, strict=True))
    its_log_prob, its_rank, its_top_log_prob, its_top_id = (np.concatenate(p) for p in zip(*found, strict=True))
    scored_log_prob, scored_rank = (np.concatenate(parts) for parts in zip(*scored, strict=True))
    # Both graphs are held to the bounds: prediction, and scoring without the top-k.
    differences = np.maximum(np.abs(its_log_prob - log_prob), np.abs(scored_log_prob - log_prob))
    best = min(TOP, top_id.shape[1])
    return Parity(
        batches=batches,
        masked=len(differences),
        max_log_prob_difference=float(differences.max()),
        mean_log_prob_difference=float(differences.mean(dtype=np.float64)),
        max_top_log_prob_difference=float(np.abs(its_top_log_prob - top_log_prob).max()),
        cross_entropy=float(-log_prob.mean(dtype=np.float64)),
        cross_entropy_difference=float(log_prob.mean(dtype=np.float64) - scored_log_prob.mean(dtype=np.float64)),
        rank_agreement=float(((its_rank == rank) & (scored_rank == rank)).mean()),
        top_1_agreement=float((its_top_id[:, 0] == top_id[:, 0]).mean()),
        top_5_agreement=float((top_id[:, :best, None] == its_top_id[:, None, :best]).any(axis=2).mean()),
        bounds=bounds,
    )


def parity_batches(texts: Sequence[str], tokenizer: Tokenizer, max_length: int) -> Iterator[Batch]:
    """Batches of several shapes from `texts`, corrupted by mask-v1 with seed 0."""
    corpus = tokenize(texts[:TEXTS], tokenizer)
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
    enough = int(np.searchsorted(np.cumsum(lengths), TOKENS)) + 1
    ends = corpus.starts[: len(lengths)] + lengths
    spans = [(int(begin), int(end)) for begin, end in zip(corpus.starts, ends[:enough], strict=False) if end > begin]
    if not len(corruption.selected):
        raise UserError("the parity check found no token to score in the given text: name a longer one with --text")
    first = int(corruption.selected[0])
    groups = [spans[index : index + ROWS] for index in range(0, len(spans), ROWS)]
    # Of many texts few have the model's full length: the row of that length is laid together from all of them.
    for group in [*groups, spans[:1], [(0, min(longest, len(clean)))], [(first, first + 1)]]:
        if (made := batch(group)) is not None:
            yield made
