"""Minimal pairs: which of two sentences does the model prefer, and by how many of them is it right.

A pair is two documents, the better sentence first; what is scored is their pseudo-log-likelihood.
"""

import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlmkit.corpus import tokenize
from mlmkit.documents import checked_text, csv_rows, is_table, json_rows, read_rows
from mlmkit.errors import UserError
from mlmkit.eval.material import InMemory
from mlmkit.tokenizer import Tokenizer
from mlmkit.windows import ranges

SCORINGS = ("all", "shared")
LARGEST_UNPACKED = 256 << 20  # bytes, of a zip; BLiMP has 27 MB


@dataclass(frozen=True)
class Pair:
    """`good` should be the more probable. `phenomenon` and `paradigm` are its coarser and finer group, "" for none."""

    good: str
    bad: str
    phenomenon: str = ""
    paradigm: str = ""
    id: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether neither sentence is white space only."""
        return bool(self.good.strip() and self.bad.strip())


@dataclass(frozen=True)
class PairColumns:
    """Where a row holds a pair. `a.b` reaches into nested rows, `a|b` takes the first that is there.

    With `label`, `good` and `bad` name a list, and the parallel list `label` says which entry is which. `scoring`:
    `all` scores whole sentences, `shared` the tokens that both share alone (CrowS-Pairs).
    """

    good: str = "sentence_good"
    bad: str = "sentence_bad"
    phenomenon: str = ""
    paradigm: str = ""
    id: str = ""
    label: str = ""
    good_label: int | str = 1
    bad_label: int | str = 0
    scoring: str = "all"

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise UserError(f"no scoring {self.scoring!r} of pairs: choose {' or '.join(SCORINGS)}")


def read_pairs(location: str, columns: PairColumns) -> list[Pair]:
    """Pairs from a `.jsonl`, `.csv`, `.tsv` or `.parquet` file, a `.zip` of `.jsonl` files, or `hub:...`, `*` for every
    configuration.

    Raises `UserError` naming the row that has no pair.
    """
    pairs = [_pair(row, columns, place) for place, row in _rows(location)]
    if not any(pair.is_whole for pair in pairs):
        raise UserError(f"{location}: there are no pairs in it")
    return pairs


def keep_pairs(pairs: Iterable[Pair], listing: Path) -> list[Pair]:
    """The pairs that a table names, with columns `UID` (paradigm) and `pairIDs` (separated by commas)."""
    rows = [row for _, row in csv_rows(listing, "\t")]
    if not rows or not {"UID", "pairIDs"} <= rows[0].keys():
        raise UserError(f"{listing}: not a table of pairs to keep: it needs columns UID and pairIDs")
    wanted = {(row["UID"], id) for row in rows for id in row["pairIDs"].split(",")}
    kept = [pair for pair in pairs if (pair.paradigm, pair.id) in wanted]
    if len(kept) < len(wanted):
        raise UserError(f"{listing} names {len(wanted)} pairs, of which {len(kept)} are there")
    return kept


def _pair(row: dict[str, Any], columns: PairColumns, place: str) -> Pair:
    good, bad = _value(row, columns.good, place), _value(row, columns.bad, place)
    if columns.label:
        labels = _value(row, columns.label, place)
        if not all(isinstance(found, list) and len(found) == len(good) for found in (good, bad, labels)):
            raise UserError(f"{place}: {columns.good!r} and {columns.label!r} are not lists of one length")
        if columns.good_label not in labels or columns.bad_label not in labels:
            raise UserError(f"{place}: no sentence is labelled {columns.good_label!r} or {columns.bad_label!r}")
        good, bad = good[labels.index(columns.good_label)], bad[labels.index(columns.bad_label)]
    named = {name: str(_value(row, getattr(columns, name), place)) for name in ("phenomenon", "paradigm", "id")}
    for name, value in named.items():
        checked_text(value, f"{place}, field {getattr(columns, name)!r}")
    good, bad = checked_text(good, f"{place}, {columns.good!r}"), checked_text(bad, f"{place}, {columns.bad!r}")
    return Pair(good, bad, **named)


def _value(row: dict[str, Any], column: str, place: str) -> Any:
    if not column:
        return ""
    for alternative in column.split("|"):
        value: Any = row
        for key in alternative.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return value
    known = f"{place} has no field {column!r} (it has {', '.join(map(str, row))})"
    raise UserError(f"{known}: name the columns in a set of your own (docs/evaluation.md)")


def _rows(location: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if Path(location).suffix.lower() == ".zip":
        return _zip_rows(location)
    if is_table(location):
        return read_rows(location)
    raise UserError(f"{location}: pairs are read from .jsonl, .csv, .tsv, .parquet and .zip files")


def _zip_rows(location: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with zipfile.ZipFile(location) as archive:
            if sum(member.file_size for member in archive.infolist()) > LARGEST_UNPACKED:
                raise ValueError(f"more than {LARGEST_UNPACKED >> 20} MiB when unpacked")
            for name in sorted(archive.namelist()):
                if name.lower().endswith(".jsonl") and not name.startswith("__MACOSX"):
                    with io.TextIOWrapper(archive.open(name), encoding="utf-8-sig", newline="\n") as lines:
                        yield from json_rows(f"{location}/{name}", lines)
    # RuntimeError: encrypted, or compressed in a way that Python does not know
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, EOFError, OSError, ValueError) as error:
        cause = str(error) or type(error).__name__
        raise UserError(f"{location}: cannot be read: {cause}: unpack it, and name the .jsonl file in it") from None


# ---------------------------------------------------------------- as documents to be scored


class PairMaterial(InMemory):
    """Pairs as a corpus: documents 2i and 2i + 1 are the better and the worse sentence of pair i.

    Pairs with a sentence of white space only are left out, and counted as `empty_texts`.
    """

    def __init__(self, given: Sequence[Pair], tokenizer: Tokenizer, origin: dict[str, Any], scoring: str) -> None:
        self.pairs, self.scoring, self._origin = [pair for pair in given if pair.is_whole], scoring, origin
        pairs = self.pairs
        texts = [text for pair in pairs for text in (pair.good, pair.bad)]
        corpus, self._tokenizer = tokenize(texts, tokenizer), tokenizer
        # Groups are part of what is measured: other labels on the same sentences are another corpus.
        labels = json.dumps([(pair.phenomenon, pair.paradigm, pair.id) for pair in pairs] + [scoring])
        fingerprint = blake2b((corpus.fingerprint + labels).encode(), digest_size=16).hexdigest()
        super().__init__(replace(corpus, fingerprint=fingerprint, empty_texts=len(given) - len(pairs)))

    def describe(self) -> dict[str, Any]:
        return {**self._origin, "scoring": self.scoring}

    def chosen(self) -> NDArray[np.int64] | None:
        """With `shared`, the tokens that the two sentences have in common.

        They are what `difflib.SequenceMatcher` calls equal between the two token sequences with their special tokens,
        as in the script of Nangia et al. 2020.
        """
        if self.scoring == "all":
            return None
        corpus, spans, begins = self._corpus, [], len(self._tokenizer.prefix)
        for pair in range(len(self.pairs)):
            starts, ends = corpus.starts[2 * pair : 2 * pair + 2], corpus.starts[2 * pair + 1 : 2 * pair + 3]
            framed = [self._tokenizer.frame(corpus.ids[a:b]).tolist() for a, b in zip(starts, ends, strict=True)]
            for match in SequenceMatcher(None, *framed).get_matching_blocks():
                for start, end, place in zip(starts, ends, (match.a, match.b), strict=True):
                    first = max(int(start) + place - begins, int(start))
                    spans.append((first, min(int(start) + place - begins + match.size, int(end)) - first))
        begin, size = np.array(spans, dtype=np.int64).reshape(-1, 2).T
        return np.sort(ranges(begin, np.maximum(size, 0)))

    def columns(self, begin: int, end: int) -> dict[str, pa.Array]:
        pairs = [self.pairs[document // 2] for document in range(begin, end)]
        same = [self._ids(document & ~1) == self._ids(document | 1) for document in range(begin, end)]
        return {
            "pair": pa.array(np.arange(begin, end) // 2),
            "is_good": pa.array(np.arange(begin, end) % 2 == 0),
            "same_ids": pa.array(same),
            "phenomenon": pa.array([pair.phenomenon for pair in pairs]),
            "paradigm": pa.array([pair.paradigm for pair in pairs]),
            "id": pa.array([pair.id for pair in pairs]),
        }

    def _ids(self, document: int) -> bytes:
        return self._corpus.ids[self._corpus.starts[document] : self._corpus.starts[document + 1]].tobytes()
