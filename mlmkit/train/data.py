"""The order of the data: epoch → permutation of windows → packs → global batches, corrupted by mask-v1.

Everything here is a function of the corpus, the configuration and the step, so a resumed run needs the step alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlmkit.batching import bucketed, pack, pad
from mlmkit.corpus import Corpus, cut_windows, ranges
from mlmkit.errors import UserError
from mlmkit.masking import MaskRecipe, corrupt
from mlmkit.packing import Pack, packed_inputs
from mlmkit.tokenizer import Tokenizer


@dataclass(frozen=True)
class MicroBatch:
    """What one forward takes. `positions` and `targets` `[masked]`; `tokens` counts real ones, padding never."""

    inputs: dict[str, Any]
    positions: Tensor
    targets: Tensor
    tokens: int

    def to(self, device: torch.device) -> "MicroBatch":
        """On another device."""
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.inputs.items()}
        return MicroBatch(inputs, self.positions.to(device), self.targets.to(device), self.tokens)


class TrainingData:
    """Micro-batches of a corpus, in an order that depends on `seed` and the epoch only."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        recipe: MaskRecipe,
        *,
        max_length: int,
        micro_batch_tokens: int,
        seed: int,
        packed: bool,
        position_offset: int = 0,
    ) -> None:
        self.corpus, self.tokenizer, self.recipe, self.seed = corpus, tokenizer, recipe, seed
        self.packed, self.position_offset = packed, position_offset
        self.budget = micro_batch_tokens
        if max_length <= tokenizer.added_tokens:
            raise UserError(f"rows of {max_length} tokens have no room beside {tokenizer.added_tokens} special tokens")
        self.windows = cut_windows(corpus.lengths, max_length - tokenizer.added_tokens)
        if not len(self.windows):
            raise UserError("the training text has no tokens")

    def epoch(self, epoch: int) -> Iterator[list[int]]:
        """The windows of each micro-batch of an epoch."""
        key = np.array([self.seed, epoch], dtype=np.uint64)
        order = np.random.Generator(np.random.Philox(key=key)).permutation(len(self.windows))
        lengths = (self.windows.length[order] + self.tokenizer.added_tokens).tolist()
        plan = pack if self.packed else bucketed
        for members in plan(lengths, self.budget):
            yield order[members].tolist()

    def micro_batches(self) -> Iterator[tuple[int, list[int]]]:
        """Epoch after epoch without end: (epoch, windows)."""
        epoch = 0
        while True:
            for members in self.epoch(epoch):
                yield epoch, members
            epoch += 1

    def steps(self, micro_batches: int, *, skip: int = 0) -> Iterator[tuple[int, list[MicroBatch]]]:
        """Global batches of `micro_batches` each, with the epoch they begin in; the first `skip` are not built."""
        plan = islice(self.micro_batches(), skip * micro_batches, None)
        while True:
            members = list(islice(plan, micro_batches))
            yield members[0][0], [self.build(epoch, windows) for epoch, windows in members]

    def build(self, epoch: int, members: list[int]) -> MicroBatch:
        """Corrupt the windows and lay them out for the model."""
        document, start = self.windows.document[members], self.windows.start[members]
        length = self.windows.length[members]
        begin = self.corpus.starts[document] + start
        # Whole-word masking looks at a word's first token, which may lie before the window.
        lead = self._words_cut(begin, start) if self.recipe.whole_word else np.zeros_like(start)
        place = ranges(begin - lead, length + lead)
        corruption = corrupt(
            self.corpus.ids[place],
            length + lead,
            self.corpus.keys[document],
            self.recipe,
            self.tokenizer.masking,
            seed=self.seed,
            epoch=epoch,
            starts=start - lead,
            words=self.corpus.words[place] if self.recipe.whole_word else None,
        )
        inside = np.ones(len(place), dtype=bool)
        inside[ranges(np.cumsum(length + lead) - length - lead, lead)] = False
        is_target = np.zeros(len(place), dtype=bool)
        is_target[corruption.selected] = True
        input_ids, is_target = corruption.input_ids[inside], is_target[inside]
        targets = self.corpus.ids[place][inside][is_target].astype(np.int64)
        rows = [self.tokenizer.frame(ids) for ids in np.split(input_ids, np.cumsum(length)[:-1])]
        offset_in_row = ranges(np.zeros_like(length), length) + len(self.tokenizer.prefix)
        row = np.repeat(np.arange(len(members)), length)
        return self._lay_out(rows, row[is_target], offset_in_row[is_target], targets)

    def _words_cut(self, begin: NDArray[np.int64], start: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many tokens before each window belong to the word that the window begins in."""
        lead = np.zeros_like(start)
        words = self.corpus.words
        for index, (place, room) in enumerate(zip(begin.tolist(), start.tolist(), strict=True)):
            while lead[index] < room and words[place] >= 0 and words[place - lead[index] - 1] == words[place]:
                lead[index] += 1
        return lead

    def _lay_out(
        self,
        rows: list[NDArray[np.int64]],
        row: NDArray[np.int64],
        column: NDArray[np.int64],
        targets: NDArray[np.int64],
    ) -> MicroBatch:
        lengths = np.array([len(ids) for ids in rows])
        tokens, longest = int(lengths.sum()), int(lengths.max())
        if self.packed:
            starts = np.cumsum([0, *lengths])
            position_ids = ranges(np.zeros_like(lengths), lengths) + self.position_offset
            packed = Pack(
                torch.from_numpy(np.concatenate(rows))[None],
                torch.from_numpy(position_ids)[None],
                torch.from_numpy(starts.astype(np.int32)),
                longest,
            )
            inputs: dict[str, Any] = packed_inputs(packed)
            positions = starts[row] + column
        else:
            input_ids, attention_mask = pad(rows, self.tokenizer.pad_id)
            inputs = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(attention_mask)}
            positions = row * longest + column
        return MicroBatch(inputs, torch.from_numpy(positions), torch.from_numpy(targets), tokens)
