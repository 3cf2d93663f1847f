"""Which windows share a micro-batch, and their rows once framed and corrupted by mask-v1. NumPy only, no torch.

Everything is a function of corpora, configuration and cursor. Every rank computes the same packs, and builds only the
rows that it trains on.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlmkit.batching import bucketed, pack
from mlmkit.corpus import word_indices
from mlmkit.errors import UserError
from mlmkit.masking import MaskRecipe, corrupt
from mlmkit.stored import StoredCorpus
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.config import Config, DataConfig
from mlmkit.train.order import NOWHERE, Cursor, Order, Position, Stream
from mlmkit.train.schedule import Schedule, make_schedule
from mlmkit.train.spans import SPAN, CorpusWindows
from mlmkit.windows import ranges


@dataclass(frozen=True)
class Block:
    """Windows in training order: `source` and `pass_number` `[windows]` int64, `spans` `[windows]` of dtype `SPAN`."""

    source: NDArray[np.int64]
    pass_number: NDArray[np.int64]
    spans: NDArray

    @property
    def length(self) -> NDArray[np.int64]:
        """Tokens of each window."""
        return self.spans["length"]

    def take(self, members: list[int]) -> "Block":
        """Some of the windows."""
        return Block(self.source[members], self.pass_number[members], self.spans[members])


@dataclass(frozen=True)
class Rows:
    """Framed and corrupted windows, end to end: `input_ids` `[tokens]`, `lengths` `[rows]`.

    `positions` `[masked]`, ascending, index `input_ids`; `targets` `[masked]` are the original ids there. `documents`
    names the documents as "corpus.txt:1234": source, and index in corpus order from 0.
    """

    input_ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    positions: NDArray[np.int64]
    targets: NDArray[np.int64]
    documents: list[str]


def passes_per_epoch(data: DataConfig, corpora: Sequence[StoredCorpus]) -> tuple[float, ...]:
    """How often an epoch shows each text, for `data.weights` or `data.temperature`.

    With temperature t, a text of n tokens gets n ** t / Σ n ** t of an epoch that is as long as with t = 1 (Conneau and
    Lample 2019, section 3.1).
    """
    if data.temperature is None:
        return data.source_weights or (1.0,) * len(corpora)
    sizes = np.array([corpus.tokens for corpus in corpora], float)
    shares = sizes**data.temperature
    return tuple((shares / shares.sum() * sizes.sum() / sizes).tolist())


def _refuse_repeats(corpora: Sequence[StoredCorpus]) -> None:
    names: dict[str, str] = {}
    for corpus in corpora:
        if corpus.fingerprint and corpus.fingerprint in names:
            twice = f"{names[corpus.fingerprint]} and {corpus.name}"
            raise UserError(f"data.train names the same text twice ({twice}): leave one out, and set its weight")
        names[corpus.fingerprint] = corpus.name


def phase_schedule(config: Config, corpora: Sequence[StoredCorpus], tokenizer: Tokenizer) -> Schedule:
    """The schedule of a phase; the windows of its texts are counted only if its length is in epochs."""
    if config.train.epochs:
        return RowBuilder(config, corpora, tokenizer, packed=True).schedule
    return make_schedule(config, 0)


class RowBuilder:
    """Packs windows up to a token budget, frames included, and builds their rows.

    `position` is where the run stands, and `cursor` is the same point in this phase's order. Without `packed`, windows
    of similar length share a batch that fits the budget with its padding. Raises `UserError` when there is nothing to
    train on, or the schedule does not fit.
    """

    def __init__(
        self,
        config: Config,
        corpora: Sequence[StoredCorpus],
        tokenizer: Tokenizer,
        *,
        packed: bool,
        position: Position = NOWHERE,
    ) -> None:
        self.max_length, self.budget = config.model.max_length, config.train.micro_batch_tokens
        self.capacity = self.max_length - tokenizer.added_tokens
        if self.capacity < 1:
            raise UserError(
                f"model.max_length ({self.max_length}) leaves no room beside {tokenizer.added_tokens} special tokens"
            )
        self.corpora, self.masking, self.seed = corpora, config.masking, config.train.seed
        for corpus, windows in zip(corpora, self.windows, strict=True):
            if not len(windows):
                raise UserError(f"the training text has no tokens: {corpus.name}")
        _refuse_repeats(corpora)
        self.vocabulary, self.added = tokenizer.masking, tokenizer.added_tokens
        self.prefix, self.suffix = np.array(tokenizer.prefix, np.int64), np.array(tokenizer.suffix, np.int64)
        # Twice the mean number of documents per pack. On paragraphs of Wikipedia the mean was 76 and the most 94.
        mean = np.mean([corpus.tokens / len(corpus) for corpus in corpora]) + self.added
        self.max_members = (
            int(2 * self.budget / min(mean, self.max_length)) + 8 if config.train.compile and packed else None
        )
        self.fill = partial(pack, max_members=self.max_members) if packed else bucketed
        self.packed, self.passes = packed, passes_per_epoch(config.data, corpora)
        streams = [Stream(c.fingerprint, self.capacity, len(w)) for c, w in zip(corpora, self.windows, strict=True)]
        if sum(stream.size * weight for stream, weight in zip(streams, self.passes, strict=True)) < 1:
            raise UserError("data.weights leave less than one document per epoch: raise them")
        self.schedule = make_schedule(config, self.epoch_tokens)
        is_same = position.identity == self.identity
        seen = position.streams if is_same else position.remaining
        self.cursor = position.cursor if is_same else replace(position.cursor, epoch=0, block=0, packs=0)
        self.order = Order(tuple(stream.after(seen) for stream in streams), self.passes, self.seed)
        texts = {stream.text for stream in streams}
        self.others = tuple(stream for stream in seen if stream.text not in texts)

    @property
    def epoch_tokens(self) -> float:
        """Tokens per epoch, special tokens included."""
        sizes = [
            corpus.tokens + self.added * len(windows)
            for corpus, windows in zip(self.corpora, self.windows, strict=True)
        ]
        return sum(size * weight for size, weight in zip(sizes, self.passes, strict=True))

    @cached_property
    def words_per_token(self) -> float:
        """Words, separated by white space, per token, special tokens included: the mean over an epoch."""
        sizes = zip(self.corpora, self.passes, strict=True)
        return sum(corpus.sizes["words"] * weight for corpus, weight in sizes) / self.epoch_tokens

    @cached_property
    def windows(self) -> list[CorpusWindows]:
        """The windows of each corpus."""
        return [CorpusWindows(corpus, self.capacity) for corpus in self.corpora]

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the packs, as JSON: if it is the same in the next phase, its cursor continues."""
        return {
            "texts": [corpus.fingerprint for corpus in self.corpora],
            "passes": list(self.passes),
            "packing": [self.capacity, self.budget, self.packed, self.max_members],
        }

    def position(self, cursor: Cursor) -> Position:
        """What a checkpoint keeps at `cursor`."""
        windows = self.block(cursor.epoch, cursor.block)
        packs = self.fill((windows.length + self.added).tolist(), self.budget)
        used = [index for members in islice(packs, cursor.packs) for index in members]
        unused = np.delete(np.arange(len(windows.length)), used)
        remaining = self.order.remaining(cursor.epoch, cursor.block, unused)
        return Position(cursor, self.identity, (*self.order.streams, *self.others), (*remaining, *self.others))

    def global_batches(
        self, cursor: Cursor, *, rank: int = 0, world: int = 1, index: int = 0, every: int = 1
    ) -> Generator[tuple[Cursor, list[Rows]], None, None]:
        """Yield the cursor after each global batch, with this rank's packs of it, from `cursor` to the phase's end.

        Worker `index` of `every` builds every `every`-th batch only.
        """
        packs, first = self.packs(cursor), cursor.step
        while not self.schedule.is_over(cursor):
            batch = list(islice(packs, self.schedule.micro_batches(cursor)))
            tokens = sum(int(block.length[members].sum()) + self.added * len(members) for _, block, members in batch)
            after = replace(
                batch[-1][0],
                step=cursor.step + 1,
                phase_steps=cursor.phase_steps + 1,
                phase_tokens=cursor.phase_tokens + tokens,
                tokens=cursor.tokens + tokens,
                words=cursor.words + tokens * self.words_per_token,
            )
            if (cursor.step - first) % every == index:
                recipe = self.schedule.recipe(cursor, after)
                yield after, [self.build(block.take(members), recipe) for _, block, members in batch[rank::world]]
            cursor = after

    def packs(self, cursor: Cursor) -> Iterator[tuple[Cursor, Block, list[int]]]:
        """Yield packs without end, starting at `cursor`: the cursor after each, its block, and its windows there."""
        epoch, block, taken = cursor.epoch, cursor.block, cursor.packs
        while True:
            for number in range(block, self.order.blocks(epoch)):
                windows = self.block(epoch, number)
                packs = self.fill((windows.length + self.added).tolist(), self.budget)
                for count, members in enumerate(islice(packs, taken, None), taken + 1):
                    yield replace(cursor, epoch=epoch, block=number, packs=count), windows, members
                taken = 0
            epoch, block = epoch + 1, 0

    def block(self, epoch: int, number: int) -> Block:
        """The windows of a block."""
        source, pass_number, window = self.order.block(epoch, number)
        spans = np.empty(len(source), SPAN)
        for index, windows in enumerate(self.windows):
            here = np.flatnonzero(source == index)
            spans[here] = windows.locate(window[here])
        return Block(source, pass_number, spans)

    def build(self, windows: Block, recipe: MaskRecipe) -> Rows:
        """Frame and corrupt windows, each with its pass as the epoch of mask-v1."""
        lengths = windows.length + self.added
        ends = np.cumsum(lengths)
        begins = ends - lengths
        input_ids = np.empty(ends[-1], np.int64)
        input_ids[begins[:, None] + np.arange(len(self.prefix))] = self.prefix
        input_ids[ends[:, None] - len(self.suffix) + np.arange(len(self.suffix))] = self.suffix
        originals, is_target = input_ids.copy(), np.zeros(len(input_ids), bool)
        for source, number in sorted(set(zip(windows.source.tolist(), windows.pass_number.tolist(), strict=True))):
            here = np.flatnonzero((windows.source == source) & (windows.pass_number == number))
            content = ranges(begins[here] + len(self.prefix), windows.length[here])
            originals[content], input_ids[content], selected = self._corrupt(
                source, number, windows.spans[here], recipe
            )
            is_target[content[selected]] = True
        positions = np.flatnonzero(is_target)
        documents = zip(windows.source.tolist(), windows.spans["document"].tolist(), strict=True)
        names = (f"{self.corpora[source].name}:{document}" for source, document in documents)
        return Rows(input_ids, lengths, positions, originals[positions], list(dict.fromkeys(names)))

    def _corrupt(
        self, source: int, number: int, spans: NDArray, recipe: MaskRecipe
    ) -> tuple[NDArray[np.integer], NDArray[np.int64], NDArray[np.int64]]:
        """Original ids of the windows, their corrupted ids, and the indices of the selected ones."""
        windows, whole_word = self.windows[source], recipe.whole_word
        ids = windows.ids(spans)
        corruption = corrupt(
            ids,
            spans["length"],
            spans["key"],
            recipe,
            self.vocabulary,
            seed=self.seed,
            epoch=number,
            starts=spans["start"],
            words=word_indices(windows.word_begins(spans), spans["length"]) if whole_word else None,
            word_starts=windows.word_starts(spans) if whole_word else None,
        )
        return ids, corruption.input_ids, corruption.selected
