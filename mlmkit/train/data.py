"""The training data, from tokenised texts to the micro-batches of one rank:

    corpora ── order.py ──> windows, shuffled per epoch and computed block by block
    windows ── rows.py ───> packs of a token budget, framed with special tokens and corrupted by mask-v1
    rows ───── data.py ───> micro-batches of torch tensors, one packed row or several padded ones

Each stage is a function of corpora, configuration and cursor, so any rank resumes anywhere. With `data.workers`, other
processes build the rows, and the batches stay the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlmkit.batching import pad
from mlmkit.packing import Pack, packed_inputs, pad_pack
from mlmkit.stored import StoredCorpus
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.config import Config
from mlmkit.train.order import NOWHERE, Cursor, Position
from mlmkit.train.rows import RowBuilder, Rows
from mlmkit.train.workers import from_workers
from mlmkit.windows import ranges


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass. `positions` and `targets` are `[masked]` int64.

    `lengths` `[rows]` counts the real tokens of each window, special tokens included. `documents` names the documents
    for messages, as in `Rows`.
    """

    inputs: dict[str, Any]
    positions: Tensor
    targets: Tensor
    lengths: NDArray[np.int64]
    documents: list[str]

    @property
    def tokens(self) -> int:
        """Real tokens, special tokens included; padding never counts."""
        return int(self.lengths.sum())

    def to(self, device: torch.device) -> "MicroBatch":
        """A copy on another device."""
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, positions=self.positions.to(device), targets=self.targets.to(device))


class TrainingData:
    """The micro-batches of a run. Raises `UserError` when there is nothing to train on.

    With `train.compile`, every packed batch is padded to `train.micro_batch_tokens` tokens and a fixed number of
    entries in `cu_seqlens`, so that torch compiles once.
    """

    def __init__(
        self,
        config: Config,
        corpora: Sequence[StoredCorpus],
        tokenizer: Tokenizer,
        *,
        packed: bool,
        position_offset: int = 0,
        position: Position = NOWHERE,
    ) -> None:
        self.packed, self.position_offset, self.pad_id = packed, position_offset, tokenizer.pad_id
        self.rows = RowBuilder(config, corpora, tokenizer, packed=packed, position=position)

    def batches(
        self, cursor: Cursor, *, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[tuple[Cursor, list[MicroBatch]]]:
        """Yield the cursor after each global batch, with this rank's part of it, from `cursor` to the phase's end.

        Of the micro-batches of a global batch a rank takes `[rank::world]`. Raises `UserError` when a worker is killed.
        """
        items = partial(self.rows.global_batches, cursor, rank=rank, world=world)
        with closing(from_workers(items, workers) if workers else items()) as built:
            for after, packs in built:
                yield after, [self.lay_out(rows) for rows in packs]

    def lay_out(self, rows: Rows) -> MicroBatch:
        """Rows as tensors: end to end in one packed row, or padded."""
        ends = np.cumsum(rows.lengths)
        longest = int(rows.lengths.max())
        if self.packed:
            position_ids = ranges(np.zeros_like(rows.lengths), rows.lengths) + self.position_offset
            packed = Pack(
                torch.from_numpy(rows.input_ids)[None],
                torch.from_numpy(position_ids)[None],
                torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
                longest,
            )
            if most := self.rows.max_members:
                total, longest = self.rows.budget, self.rows.max_length
                packed = pad_pack(packed, total=total, most=most, longest=longest, pad_id=self.pad_id)
            inputs, positions = packed_inputs(packed), rows.positions
        else:
            input_ids, attention_mask = pad(np.split(rows.input_ids, ends[:-1]), self.pad_id)
            inputs = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(attention_mask)}
            row = np.searchsorted(ends, rows.positions, side="right")
            positions = rows.positions + row * longest - (ends - rows.lengths)[row]
        targets = torch.from_numpy(rows.targets)
        return MicroBatch(inputs, torch.from_numpy(positions), targets, rows.lengths, rows.documents)
