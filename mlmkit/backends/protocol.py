"""The protocol of everything that runs a model: a `Backend` scores a `Batch`. docs/architecture.md has the graph."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mlmkit.artifact import DYNAMIC_INT8, CheckedFile, Manifest, open_files, read_tokenizer
from mlmkit.batching import pad
from mlmkit.errors import UserError
from mlmkit.tokenizer import Tokenizer

# The tensors of the scoring graph (docs/architecture.md): type and number of axes.
INPUTS = {"input_ids": ("int64", 2), "attention_mask": ("int64", 2), "positions": ("int64", 1), "targets": ("int64", 1)}
OUTPUTS = {"log_prob": ("float32", 1), "rank": ("int64", 1), "top_log_prob": ("float32", 2), "top_id": ("int64", 2)}


class Batch(NamedTuple):
    """The scoring graph's inputs, all int64.

    `input_ids` (corrupted, with special tokens) and `attention_mask` (1 = token) are `[batch, seq]`. `positions`, flat
    indices into batch x seq, and `targets`, the ids to score there, are `[masked]`. Positions may repeat.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    positions: NDArray[np.int64]
    targets: NDArray[np.int64]


class Scored(NamedTuple):
    """The scoring graph's outputs.

    `log_prob` is the natural log of each target's probability, float32 `[masked]`. `rank` is the number of other ids
    with a logit at least as large, int64 `[masked]`. `top_log_prob` and `top_id`, float32 and int64 `[masked, k]`, are
    the k best ids at each position, best first.
    """

    log_prob: NDArray[np.float32]
    rank: NDArray[np.int64]
    top_log_prob: NDArray[np.float32]
    top_id: NDArray[np.int64]


@dataclass(frozen=True)
class ModelInfo:
    """Properties of a loaded model.

    `fingerprint` is that of the checkpoint's weights; its artifacts have the same one. `max_length` counts special
    tokens too. `sees_padding` means that a row's scores change with the padding after it, so that all rows of a batch
    must have the same length.
    """

    path: str
    fingerprint: str
    architecture: str
    vocabulary_size: int
    max_length: int
    precision: str
    top_k: int
    sees_padding: bool

    @property
    def couples_batch(self) -> bool:
        """Whether a row's scores change with the other rows of its batch: dynamic int8 computes its scales from all."""
        return self.precision == DYNAMIC_INT8


class Backend(Protocol):
    """A loaded model with its tokenizer. `name` is one of `BACKENDS`, `device` is `cpu` or `cuda`."""

    name: str
    device: str
    info: ModelInfo
    tokenizer: Tokenizer

    @property
    def manifest(self) -> Manifest | None:
        """The artifact's manifest as it was when it was loaded; None for a checkpoint."""
        ...

    def score(self, batch: Batch) -> Scored:
        """Score the targets and find the `info.top_k` best candidates at their positions. Thread-safe.

        Raises `CheckError` if the model cannot run the batch and `UserError` if the GPU is out of memory.
        """
        ...


def capacity(backend: Backend) -> int:
    """The most tokens of a text that fit in a row next to the special tokens. Raises `UserError` if none fits."""
    room = backend.info.max_length - backend.tokenizer.added_tokens
    if room < 1:
        raise UserError(
            f"{backend.info.path} takes {backend.info.max_length} tokens, and the special tokens need all of them"
        )
    return room


def score_together(backend: Backend, rows: Sequence[Batch]) -> list[Scored]:
    """The scores of each row, `[1, seq]` each, from one call of the backend. Raises what `Backend.score` raises."""
    if len(rows) == 1:
        return [backend.score(rows[0])]
    ends = np.cumsum([len(row.positions) for row in rows])[:-1]
    scored = backend.score(merge_rows(rows, backend.tokenizer.pad_id))
    return [Scored(*part) for part in zip(*(np.split(values, ends) for values in scored), strict=True)]


def merge_rows(rows: Sequence[Batch], pad_id: int) -> Batch:
    """One batch of rows `[1, seq]` of any lengths, padded on the right to the longest."""
    input_ids, _ = pad([row.input_ids[0] for row in rows], pad_id)
    attention_mask, _ = pad([row.attention_mask[0] for row in rows], 0)
    longest = input_ids.shape[1]
    return Batch(
        input_ids,
        attention_mask,
        np.concatenate([row.positions + number * longest for number, row in enumerate(rows)]),
        np.concatenate([row.targets for row in rows]),
    )


def open_artifact(path: str) -> tuple[Manifest, dict[str, CheckedFile], Tokenizer, ModelInfo]:
    """Check every file of an artifact. Returns its manifest, files, tokenizer and model properties.

    Raises `UserError` if a file has changed or the tokenizer does not fit the model.
    """
    manifest, files = open_files(Path(path))
    tokenizer = read_tokenizer(Path(path), manifest, files)
    described = {field.name: getattr(manifest, field.name) for field in fields(ModelInfo) if field.name != "path"}
    return manifest, files, tokenizer, ModelInfo(path=path, **described)
