"""The training data as the model takes it: micro-batches of torch tensors, from any cursor on, for any rank."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlmkit.batching import pad
from mlmkit.corpus import Corpus
from mlmkit.packing import Pack, packed_inputs, pad_pack
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.config import Config
from mlmkit.train.order import Cursor
from mlmkit.train.packs import Packs, Rows
from mlmkit.train.workers import from_processes
from mlmkit.windows import ranges


@dataclass(frozen=True)
class MicroBatch:
    """What one forward takes. `positions` and `targets` `[masked]`; `tokens` counts real ones, padding never.

    `documents` names those in it, for messages: the source and the index in its order, from 0.
    """

    inputs: dict[str, Any]
    positions: Tensor
    targets: Tensor
    tokens: int
    documents: list[str]

    def to(self, device: torch.device) -> "MicroBatch":
        """On another device."""
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, positions=self.positions.to(device), targets=self.targets.to(device))


class TrainingData:
    """The micro-batches of a run, which depend on its texts, its configuration and the place alone.

    With `train.compile` every packed batch has `train.micro_batch_tokens` tokens, the last ones padding, and as many
    entries in `cu_seqlens`, so that torch compiles once. Raises `UserError` when there is nothing to train on.
    """

    def __init__(
        self, config: Config, corpora: Sequence[Corpus], tokenizer: Tokenizer, *, packed: bool, position_offset: int = 0
    ) -> None:
        self.packed, self.position_offset, self.pad_id = packed, position_offset, tokenizer.pad_id
        self.packs = Packs(config, corpora, tokenizer, packed=packed)

    def batches(
        self, cursor: Cursor, *, micro_batches: int, steps: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[tuple[Cursor, list[MicroBatch]]]:
        """The global batches from a place on until `steps` are done: the place after each, and this rank's part of it.

        Of the `micro_batches` of a global batch a rank takes `[rank::world]`. `workers` processes build them, or this
        one; the batches are the same.
        """
        items = partial(
            self.packs.global_batches, cursor, micro_batches=micro_batches, steps=steps, rank=rank, world=world
        )
        with closing(from_processes(items, workers) if workers else items()) as built:
            for after, packs in built:
                yield after, [self.lay_out(rows) for rows in packs]

    def lay_out(self, rows: Rows) -> MicroBatch:
        """As one row, or as padded ones."""
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
            if most := self.packs.max_members:
                total, longest = self.packs.budget, self.packs.max_length
                packed = pad_pack(packed, total=total, most=most, longest=longest, pad_id=self.pad_id)
            inputs, positions = packed_inputs(packed), rows.positions
        else:
            input_ids, attention_mask = pad(np.split(rows.input_ids, ends[:-1]), self.pad_id)
            inputs = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(attention_mask)}
            row = np.searchsorted(ends, rows.positions, side="right")
            positions = rows.positions + row * longest - (ends - rows.lengths)[row]
        targets = torch.from_numpy(rows.targets)
        return MicroBatch(inputs, torch.from_numpy(positions), targets, int(ends[-1]), rows.documents)
