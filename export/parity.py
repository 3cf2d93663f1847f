"""Proof that an engine computes what the checkpoint does, on real text."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from mlmkit.backends import Backend, Batch
from mlmkit.batching import pad
from mlmkit.corpus import tokenize
from mlmkit.errors import UserError
from mlmkit.masking import MaskRecipe, corrupt
from mlmkit.tokenizer import Tokenizer

BOUND = 1e-4  # nats, on the largest difference, for float32
TEXTS = 64
ROWS = 8


@dataclass(frozen=True)
class Parity:
    """Differences between two backends over `masked` targets, in nats. `passed` if the largest is within `bound`."""

    batches: int
    masked: int
    max_log_prob_difference: float
    mean_log_prob_difference: float
    max_top_log_prob_difference: float
    rank_agreement: float
    top_1_agreement: float
    bound: float

    @property
    def passed(self) -> bool:
        """Written so that NaN fails."""
        return self.max_log_prob_difference <= self.bound and self.max_top_log_prob_difference <= self.bound

    def as_dict(self) -> dict[str, float | int]:
        """As the manifest carries it."""
        return asdict(self)


def check_parity(reference: Backend, engine: Backend, texts: Sequence[str]) -> Parity:
    """Score the same corrupted texts with both: a full batch, ragged ones, batch 1, the longest row, one token.

    Raises `UserError` when the texts have no token to score.
    """
    log_prob, top, ranks, best, batches = [], [], [], [], 0
    for batch in parity_batches(texts, reference.tokenizer, reference.info.max_length):
        expected, found = reference.predict(batch), engine.predict(batch)
        scored = engine.score(batch)
        both = np.stack([found.log_prob - expected.log_prob, scored.log_prob - expected.log_prob])
        log_prob.append(np.abs(both).max(axis=0))
        top.append(np.abs(found.top_log_prob - expected.top_log_prob).max(axis=1))
        ranks.append((found.rank == expected.rank) & (scored.rank == expected.rank))
        best.append(found.top_id[:, 0] == expected.top_id[:, 0])
        batches += 1
    differences = np.concatenate(log_prob)
    return Parity(
        batches=batches,
        masked=len(differences),
        max_log_prob_difference=float(differences.max()),
        mean_log_prob_difference=float(differences.mean()),
        max_top_log_prob_difference=float(np.concatenate(top).max()),
        rank_agreement=float(np.concatenate(ranks).mean()),
        top_1_agreement=float(np.concatenate(best).mean()),
        bound=BOUND,
    )


def parity_batches(texts: Sequence[str], tokenizer: Tokenizer, max_length: int) -> Iterator[Batch]:
    """Batches of several shapes from `texts`, corrupted by mask-v1 with seed 0."""
    corpus = tokenize(texts[:TEXTS], tokenizer)
    # Of many texts few have the model's full length: the row of that length is laid together from all of them.
    capacity = min(max_length - tokenizer.added_tokens, 512)
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

    spans = [
        (int(a), int(min(b, a + capacity))) for a, b in zip(corpus.starts, corpus.starts[1:], strict=False) if b > a
    ]
    if not len(corruption.selected):
        raise UserError("the parity check found no token to score in the given text: name a longer one with --text")
    first = int(corruption.selected[0])
    groups = [spans[index : index + ROWS] for index in range(0, len(spans), ROWS)]
    for group in [*groups, spans[:1], [(0, min(capacity, len(clean)))], [(first, first + 1)]]:
        if (made := batch(group)) is not None:
            yield made
