"""Which windows make a micro-batch, and what they are once mask-v1 has corrupted them. Arrays only, no torch.

All of it is a function of the corpora, the configuration and the cursor: planning is the same on every rank, and only
what a rank trains on is built there.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlmkit.batching import bucketed, pack
from mlmkit.corpus import Corpus, gather
from mlmkit.errors import UserError
from mlmkit.masking import MaskRecipe, corrupt
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.config import Config
from mlmkit.train.order import Cursor, Order
from mlmkit.windows import ranges, window_table


@dataclass(frozen=True)
class Block:
    """Windows in the order of the epoch: `source`, `number` (of the pass) and `length` `[windows]`, in tokens.

    `rows` `[windows, 4]` are those of `window_table`.
    """

    source: NDArray[np.int64]
    number: NDArray[np.int64]
    rows: NDArray[np.int64]

    @property
    def length(self) -> NDArray[np.int64]:
        """Tokens of each window."""
        return self.rows[:, 2]

    def take(self, members: list[int]) -> "Block":
        """Some of the windows."""
        return Block(self.source[members], self.number[members], self.rows[members])


@dataclass(frozen=True)
class Rows:
    """Framed and corrupted windows, end to end: `input_ids` `[tokens]`, `lengths` `[rows]`.

    `positions` `[masked]`, ascending, index `input_ids`; `targets` `[masked]` are the ids that stood there.
    `documents` names them, "corpus.txt:1234": the source, and the index in its order from 0.
    """

    input_ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    positions: NDArray[np.int64]
    targets: NDArray[np.int64]
    documents: list[str]


class Packs:
    """Packs of windows (or with `packed` false, batches of similar length) of a budget of tokens, frames included.

    Raises `UserError` when there is nothing to train on.
    """

    def __init__(self, config: Config, corpora: Sequence[Corpus], tokenizer: Tokenizer, *, packed: bool) -> None:
        self.max_length, self.budget = config.model.max_length, config.train.micro_batch_tokens
        self.capacity = self.max_length - tokenizer.added_tokens
        if self.capacity < 1:
            raise UserError(
                f"rows of {self.max_length} tokens have no room beside {tokenizer.added_tokens} special tokens"
            )
        self.corpora, self.masking, self.seed = corpora, config.masking, config.train.seed
        for corpus, windows in zip(corpora, self.windows, strict=True):
            if not len(windows):
                raise UserError(f"the training text has no tokens: {corpus.name}")
        passes = config.data.passes
        self.order = Order(tuple(len(windows) for windows in self.windows), passes, self.seed)
        if sum(size * weight for size, weight in zip(self.order.sizes, passes, strict=True)) < 1:
            raise UserError("data.weights leave less than one document for an epoch: raise them")
        self.vocabulary, self.added = tokenizer.masking, tokenizer.added_tokens
        self.prefix, self.suffix = np.array(tokenizer.prefix, np.int64), np.array(tokenizer.suffix, np.int64)
        # Packs are a sample of all lengths: on paragraphs of Wikipedia the fullest held 94 documents, 76 on average.
        mean = np.mean([len(corpus.ids) / max(len(corpus), 1) for corpus in corpora]) + self.added
        self.max_members = (
            int(2 * self.budget / min(mean, self.max_length)) + 8 if config.train.compile and packed else None
        )
        self.fill = partial(pack, max_members=self.max_members) if packed else bucketed

    @cached_property
    def windows(self) -> list[NDArray[np.int64]]:
        """The table of each corpus."""
        return [window_table(corpus, self.capacity) for corpus in self.corpora]

    def __getstate__(self) -> dict[str, Any]:
        """To another process without the tables, which it maps itself: a map is pickled with its content."""
        return {name: value for name, value in vars(self).items() if name != "windows"}

    def global_batches(
        self,
        cursor: Cursor,
        *,
        micro_batches: int,
        steps: int,
        rank: int = 0,
        world: int = 1,
        index: int = 0,
        every: int = 1,
    ) -> Generator[tuple[Cursor, list[Rows]], None, None]:
        """The global batches from a place on until `steps` are done: the place after each, and the packs of `rank`.

        Only every `every`-th from the `index`-th on is built. The mask rate of a step is that of its share of `steps`.
        """
        plan = self.plan(cursor)
        for step in range(cursor.step, steps):
            batch = list(islice(plan, micro_batches))
            if (step - cursor.step) % every == index:
                recipe = self.masking.recipe(step / max(steps - 1, 1))
                place = batch[-1][0]
                after = Cursor(step + 1, place.epoch, place.block, place.packs)
                yield after, [self.build(block.take(members), recipe) for _, block, members in batch[rank::world]]

    def plan(self, cursor: Cursor) -> Iterator[tuple[Cursor, Block, list[int]]]:
        """Packs without end from a place on: the place after each, its block, and its windows in the block."""
        epoch, block, taken = cursor.epoch, cursor.block, cursor.packs
        while True:
            for number in range(block, self.order.blocks(epoch)):
                windows = self.block(epoch, number)
                packs = self.fill((windows.length + self.added).tolist(), self.budget)
                for count, members in enumerate(islice(packs, taken, None), taken + 1):
                    yield Cursor(cursor.step, epoch, number, count), windows, members
                taken = 0
            epoch, block = epoch + 1, 0

    def block(self, epoch: int, number: int) -> Block:
        """The windows of a block."""
        source, pass_number, window = self.order.block(epoch, number)
        rows = np.empty((len(source), 4), np.int64)
        for index, windows in enumerate(self.windows):
            here = np.flatnonzero(source == index)
            rows[here] = gather(windows, window[here])
        return Block(source, pass_number, rows)

    def build(self, windows: Block, recipe: MaskRecipe) -> Rows:
        """Frame and corrupt windows, each with its pass as the epoch of mask-v1."""
        lengths = windows.length + self.added
        ends = np.cumsum(lengths)
        begins = ends - lengths
        input_ids = np.empty(ends[-1], np.int64)
        input_ids[begins[:, None] + np.arange(len(self.prefix))] = self.prefix
        input_ids[ends[:, None] - len(self.suffix) + np.arange(len(self.suffix))] = self.suffix
        originals, is_target = input_ids.copy(), np.zeros(len(input_ids), bool)
        for source, number in sorted(set(zip(windows.source.tolist(), windows.number.tolist(), strict=True))):
            here = np.flatnonzero((windows.source == source) & (windows.number == number))
            place = ranges(begins[here] + len(self.prefix), windows.length[here])
            originals[place], input_ids[place], selected = self._corrupt(source, number, windows.rows[here], recipe)
            is_target[place[selected]] = True
        positions = np.flatnonzero(is_target)
        documents = zip(windows.source.tolist(), windows.rows[:, 0].tolist(), strict=True)
        names = (f"{self.corpora[source].name}:{document}" for source, document in documents)
        return Rows(input_ids, lengths, positions, originals[positions], list(dict.fromkeys(names)))

    def _corrupt(
        self, source: int, number: int, rows: NDArray[np.int64], recipe: MaskRecipe
    ) -> tuple[NDArray[np.integer], NDArray[np.int64], NDArray[np.int64]]:
        """Ids of the windows, what the model sees in their place, and which of them are asked for."""
        corpus, (document, start, length, word_start) = self.corpora[source], rows.T
        place = ranges(gather(corpus.starts, document) + start, length)
        ids = gather(corpus.ids, place)
        corruption = corrupt(
            ids,
            length,
            gather(corpus.keys, document),
            recipe,
            self.vocabulary,
            seed=self.seed,
            epoch=number,
            starts=start,
            words=gather(corpus.words, place) if recipe.whole_word else None,
            word_starts=word_start,
        )
        return ids, corruption.input_ids, corruption.selected
