"""Tokenise texts into the shards of a `StoredCorpus`, resumable after a kill, by any number of processes or machines.

    plan_corpus   the files, cut into splits; FOLDER/plan.json
    make_shards   one split → its shards; each is created atomically, and a repeated call makes what is missing
    finish        all shards → FOLDER/tokens.json, which completes the corpus

The shards depend on the files, the reading options and the tokenizer only: not on who makes them, or how often that is
interrupted.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike, NDArray

from mlmkit.corpus import TEXT_SIZES, Stretch, encode_documents
from mlmkit.documents import no_documents, read_pieces
from mlmkit.errors import UserError
from mlmkit.files import atomic, hash_tree, read_record, remove, sweep, write_record
from mlmkit.lines import BadRows
from mlmkit.locations import PLAN, Source, Split, file_state, find_files, split_file
from mlmkit.stored import DOCUMENT, TOKENS, StoredCorpus
from mlmkit.tokenizer import Tokenizer

FORMAT = 1
SHARD = "shard.json"
# A text of n bytes is cut into 256 splits, but none below 16 MiB, which is seconds of work, or above 1 GiB, so that a
# kill loses minutes.
SPLITS, SMALLEST_SPLIT, LARGEST_SPLIT = 256, 16 << 20, 1 << 30
SHARD_TOKENS = 1 << 28  # a split that cannot be cut, such as a compressed file, gives several shards of this size
MOST_TOKENS = 1 << 32  # of a document, and so of a shard
ROWS_COPIED = 1 << 18
COUNTS = ("documents", "tokens", "unknown_tokens", "special_tokens", "words_begun", "blank", *TEXT_SIZES)


@dataclass(frozen=True)
class Plan:
    """What is tokenised, and how: the content of `plan.json`.

    `files` has the size and time of modification of each file. `splits` are in groups, each tokenised by itself: small
    files share one. With `words`, the shards say where words begin.
    """

    source: Source
    tokenizer: str  # its fingerprint
    words: bool
    files: dict[str, list[Any]]
    splits: tuple[tuple[Split, ...], ...]

    @classmethod
    def read(cls, folder: Path) -> "Plan":
        """Read a folder's plan. Raises `DamagedError`."""
        values = read_record(folder / PLAN, f"delete {folder} and tokenise again")
        source: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values["source"].items()
        }
        splits = tuple(tuple(Split(*split) for split in group) for group in values["splits"])
        return cls(Source(**source), values["tokenizer"], values["words"], values["files"], splits)

    def record(self) -> dict[str, Any]:
        """The plan as JSON holds it."""
        splits = [[[split.file, split.begin, split.end] for split in group] for group in self.splits]
        return {"format": FORMAT, **asdict(self), "splits": splits}


def plan_corpus(source: Source, tokenizer: Tokenizer, folder: Path, *, words: bool, restart: bool = False) -> Plan:
    """Write the plan of a corpus to `folder`, if it is not there yet, and return it.

    Raises `UserError` for files that cannot be found, and if `folder` was begun with another plan, unless told to
    `restart` then.
    """
    files = {file: file_state(file) for file in find_files(source)}
    total = sum(size for size, _ in files.values())
    size = min(max(total // SPLITS, SMALLEST_SPLIT), LARGEST_SPLIT)
    splits = chain.from_iterable(split_file(file, source, size) for file in files)
    plan = Plan(source, tokenizer.fingerprint, words, files, tuple(_groups(splits, files, size)))
    if (folder / PLAN).exists() and (before := Plan.read(folder)) != plan:
        if not restart:
            names = {"tokenizer": "another tokenizer", "words": "another choice of --words"}
            difference = next(name for name in vars(plan) if getattr(before, name) != getattr(plan, name))
            difference = names.get(difference, "other files or reading options")
            raise UserError(f"{folder} was begun with {difference}: delete it, or name another folder")
        remove(folder)
    if not (folder / PLAN).exists():
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        write_record(folder / PLAN, plan.record())
    return plan


def _groups(splits: Iterable[Split], files: dict[str, list[Any]], size: int) -> Iterator[tuple[Split, ...]]:
    """Group consecutive whole files while they are smaller than `size` bytes together. Any other split is alone."""
    group: list[Split] = []
    room = size
    for split in splits:
        is_whole = not split.begin and split.end is None
        # A size of 0 says that it is not known, or costs nothing to read alone.
        taken = files[split.file][0] if is_whole and files[split.file][0] else size
        if group and taken > room:
            yield tuple(group)
            group, room = [], size
        group.append(split)
        room -= taken
    if group:
        yield tuple(group)


def make_shards(folder: Path, index: int, tokenizer: Tokenizer) -> None:
    """Tokenise group `index` of the plan's splits, continuing after the shards that exist.

    Raises `UserError` for text that cannot be read.
    """
    plan = Plan.read(folder)
    done = list(_records(folder, index))
    if done and done[-1]["is_last"]:
        return
    bad_rows = BadRows(plan.source.on_bad_row)
    pieces = chain.from_iterable(read_pieces(plan.source, split, bad_rows) for split in plan.splits[index])
    texts = sum(record["texts"] for record in done)
    for _ in range(texts):
        while not next(pieces, ("", True))[1]:  # a text that became shorter is noticed in `finish`
            pass
    stretches = encode_documents(pieces, tokenizer, words=plan.words, keys=plan.source.keys)
    for number in count(len(done)):
        with atomic(folder / "shards" / _name(index, number), folder=True, keep=True) as partial:
            counts, is_last = _write_shard(partial, stretches, tokenizer, words=plan.words)
            counts |= {"bad_rows": bad_rows.count, "first_bad_row": bad_rows.first} if is_last else {}
            write_record(partial / SHARD, {**counts, "is_last": is_last, "files": hash_tree(partial)})
        if is_last:
            return


def _name(index: int, number: int) -> str:
    return f"{index:05d}-{number:03d}"


def _records(folder: Path, index: int) -> Iterator[dict[str, Any]]:
    """The records of a split's shards."""
    for number in count():
        path = folder / "shards" / _name(index, number) / SHARD
        if not path.exists():
            return
        yield {"name": path.parent.name, **read_record(path, f"delete {path.parent} and tokenise again")}


def is_made(folder: Path, index: int) -> bool:
    """Whether all shards of a split exist."""
    return any(record["is_last"] for record in _records(folder, index))


def finish(folder: Path) -> StoredCorpus:
    """Complete a corpus of which all shards are made, and return it.

    Raises `UserError` if a shard is missing, there are no documents, or a file was changed while it was read.
    """
    plan = Plan.read(folder)
    if (folder / TOKENS).exists():
        return StoredCorpus.open(folder, plan.source.name)
    shards: list[dict[str, Any]] = []
    for index in range(len(plan.splits)):
        records = list(_records(folder, index))
        if not records or not records[-1]["is_last"]:
            raise UserError(f"{folder}: split {index} is not tokenised: run the same command again")
        shards += records
    for file, state in plan.files.items():
        if file_state(file) != state:
            raise UserError(f"{file} was changed while it was being read: run the same command again")
    sweep(folder / "shards", age=0)
    totals = {name: sum(shard[name] for shard in shards) for name in COUNTS}
    if not totals["documents"]:
        raise no_documents(plan.source)
    bad_rows = sum(shard.get("bad_rows", 0) for shard in shards)
    first_bad_row = next((shard["first_bad_row"] for shard in shards if shard.get("bad_rows")), "")
    listed = [{name: shard[name] for name in ("name", "documents", "tokens", "files")} for shard in shards]
    record = {"format": FORMAT, "tokenizer": plan.tokenizer, "has_words": plan.words, **totals, "shards": listed}
    record |= {"bad_rows": bad_rows, "first_bad_row": first_bad_row}
    hashed = blake2b(digest_size=16)
    for keys in StoredCorpus(folder, plan.source.name, record).key_blocks():
        hashed.update(keys.tobytes())
    write_record(folder / TOKENS, {**record, "fingerprint": hashed.hexdigest()})
    return StoredCorpus.open(folder, plan.source.name)


def warn_of_losses(corpus: StoredCorpus) -> None:
    """Say how many rows were skipped."""
    BadRows("skip", corpus.record["bad_rows"], corpus.record["first_bad_row"]).warn(corpus.name)


# ---------------------------------------------------------------- one shard


def _write_shard(
    folder: Path, stretches: Iterator[Stretch], tokenizer: Tokenizer, *, words: bool
) -> tuple[dict[str, Any], bool]:
    """Write stretches until the shard is full. Returns its counts, and whether these were the last stretches."""
    is_special, unknown = tokenizer.masking.is_special, tokenizer.unk_id
    counts: dict[str, Any] = dict.fromkeys((*COUNTS, "texts"), 0)
    largest, is_last, open_tokens = 0, True, 0  # tokens of a document that has not ended
    with ExitStack() as stack:
        ids, documents, sizes, begins = (
            stack.enter_context(GrowingArray(folder / name, kind, shape))
            for name, kind, shape in (
                ("ids.npy", tokenizer.id_type, ()),
                ("documents.npy", DOCUMENT, ()),
                ("sizes.raw", "<u8", (len(TEXT_SIZES),)),
                ("words.raw", "u1", ()),
            )
        )
        for stretch in stretches:
            counts["texts"] += stretch.texts
            counts["blank"] += stretch.blank
            ids.append(stretch.ids)
            begins.append(stretch.word_begins if words else stretch.word_begins[:0])
            ends = counts["tokens"] + np.cumsum(stretch.lengths)
            open_tokens += len(stretch.ids) - int(stretch.lengths.sum())
            if counts["tokens"] + open_tokens >= MOST_TOKENS:
                raise UserError("a document has 2**32 tokens or more: split it")
            if stretch.is_dropped:
                ids.truncate(counts["tokens"])
                begins.truncate(counts["tokens"] if words else 0)
                open_tokens = 0
            documents.append(np.rec.fromarrays([ends, stretch.keys], dtype=DOCUMENT))
            sizes.append(stretch.text_sizes)
            largest = max(largest, int(stretch.text_sizes.max(initial=0)))
            counts["tokens"], counts["documents"] = len(ids) - open_tokens, len(documents)
            if len(ids) >= SHARD_TOKENS and not open_tokens:
                is_last = False
                break
        for block in ids.blocks():
            counts["special_tokens"] += int(is_special[block].sum())
            counts["unknown_tokens"] += int((block == unknown).sum()) if unknown is not None else 0
        with GrowingArray(folder / "sizes.npy", np.min_scalar_type(largest).newbyteorder("<"), sizes.shape) as smaller:
            for block in sizes.blocks():
                smaller.append(block)
                for name, total in zip(TEXT_SIZES, block.sum(axis=0).tolist(), strict=True):
                    counts[name] += total
        if words:
            with GrowingArray(folder / "words.npy", "u1", ()) as bits:
                for block in begins.blocks():  # a multiple of eight, except the last
                    bits.append(np.packbits(block, bitorder="little"))
                    counts["words_begun"] += int(block.sum())
    for raw in folder.glob("*.raw"):
        raw.unlink()
    return counts, is_last


class GrowingArray:
    """A `.npy` file to which rows are appended."""

    def __init__(self, path: Path, dtype: DTypeLike, shape: Sequence[int]) -> None:
        self.dtype, self.shape, self._rows = np.dtype(dtype), tuple(shape), 0
        self._file = path.open("w+b")
        self._write_header()
        self._begin = self._file.tell()
        self._row_bytes = self.dtype.itemsize * int(np.prod(self.shape))

    def _write_header(self) -> None:
        self._file.seek(0)
        shape = (self._rows, *self.shape)  # NumPy pads the header so that it may grow along the first axis
        npy.write_array_header_1_0(
            self._file, {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        )

    def __enter__(self) -> "GrowingArray":
        return self

    def __exit__(self, *_: object) -> None:
        self._write_header()
        self._file.close()

    def __len__(self) -> int:
        return self._rows

    def append(self, rows: NDArray) -> None:
        """Write rows `[rows, *shape]` at the end."""
        self._file.write(np.ascontiguousarray(rows, self.dtype).tobytes())
        self._rows += len(rows)

    def truncate(self, rows: int) -> None:
        """Keep the first `rows` only."""
        self._rows = rows
        self._file.seek(self._begin + rows * self._row_bytes)
        self._file.truncate()

    def blocks(self) -> Iterator[NDArray]:
        """Yield the rows, in arrays of `ROWS_COPIED`."""
        self._file.seek(self._begin)
        while block := self._file.read(ROWS_COPIED * self._row_bytes):
            yield np.frombuffer(block, self.dtype).reshape(-1, *self.shape)
