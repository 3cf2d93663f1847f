"""Text files, jsonl, csv, parquet and hub datasets → rows → documents. A document is one text."""

import codecs
import contextlib
import csv
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from mlmkit.errors import UserError, first_line, require
from mlmkit.masking import document_key

HUB = "hub:"
FORMATS = ("text", "jsonl", "csv", "tsv", "parquet", "arrow")
TABLES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")
# How files that are not UTF-8 text begin, what they are, and how to get text from them.
NOT_UTF8 = (
    (rb"\x1f\x8b", "gzip", "unpack it (gzip -dc FILE > TEXT)"),
    (rb"BZh[1-9]1AY", "bzip2", "unpack it (bzip2 -dc FILE > TEXT)"),
    (rb"\xfd7zXZ", "xz", "unpack it (xz -dc FILE > TEXT)"),
    (rb"\x28\xb5\x2f\xfd", "zstd", "unpack it (zstd -dc FILE > TEXT)"),
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive", "unpack it (unzip FILE)"),
    (rb"%PDF-\d", "a PDF", "extract its text (pdftotext FILE)"),
    (rb"PAR1\x15", "parquet", "give it the suffix .parquet"),
    (rb"ARROW1\0|\xff{4}", "an Arrow file", "put it in a folder of its own and name hub:FOLDER"),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32", "convert it (iconv -f UTF-32 -t UTF-8 FILE > TEXT)"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16", "convert it (iconv -f UTF-16 -t UTF-8 FILE > TEXT)"),
)

Row = tuple[str, dict[str, Any]]  # where it stands, for messages, and its fields


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    `location` is a file or a dataset. By suffix a file is `.jsonl` or `.json` with one object per line, `.csv` or
    `.tsv` with a header, `.parquet`, or else text. A dataset is `hub:NAME[:CONFIG][@SPLIT][#FILES]`, on the hub or in a
    local folder that `datasets` can read; FILES is a pattern that picks files of a split too large to fetch whole.
    `text_field` is the column or key that holds the text. With `blank_line`, blank lines separate the documents of a
    text file; otherwise each line is a document. `strip` removes the white space around each text. `format` replaces
    the suffix. Only documents whose key, divided by 2**64, lies in `keys` are read: from its begin up to its end.
    """

    location: str | tuple[str, ...]
    text_field: str = "text"
    blank_line: bool = False
    strip: bool = False
    format: str = ""
    on_bad_row: str = "error"
    keys: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        given: Any = self.location
        several = [given] if isinstance(given, str | os.PathLike) else given
        locations = tuple(os.fspath(location) for location in several)
        object.__setattr__(self, "location", locations[0] if len(locations) == 1 else locations)
        if self.format not in ("", *FORMATS):
            raise UserError(f"no format {self.format!r}: choose {', '.join(FORMATS)}")
        if self.on_bad_row not in ("error", "skip"):
            raise UserError(f"on_bad_row is {self.on_bad_row!r}: choose error or skip")

    @property
    def locations(self) -> tuple[str, ...]:
        """The location, or all of several."""
        return self.location if isinstance(self.location, tuple) else (self.location,)

    @property
    def name(self) -> str:
        """The location, for messages."""
        first, *others = self.locations
        name = f"{first} and {len(others)} more" if others else first
        return name if self.keys[1] == 1 else f"{name} ({self.keys[1] - self.keys[0]:g} of it)"

    @property
    def suffix(self) -> str:
        """The suffix of the format, or "" for that of each location."""
        return f".{self.format}" if self.format else ""


def is_selected(key: int, keys: tuple[float, float]) -> bool:
    """Whether a document key, divided by 2**64, lies in `keys`, from begin up to end. The arithmetic is exact."""
    return keys[0] * 2.0**64 <= key < keys[1] * 2.0**64


def why_empty(source: Source) -> str:
    """Why a source has no documents, for a message."""
    begin, end = source.keys
    if (begin, end) == (0.0, 1.0):
        return "it is empty or blank"
    taken = f"data.held_out = {begin or end:g} takes all documents: lower it, or name a held-out text"
    return taken if begin else f"data.held_out = {end:g} takes none of its documents: raise it, or name a held-out text"


def is_blank(text: str) -> bool:
    """Whether a text is empty or only white space, and so is not a document."""
    return not text or text.isspace()


def read_documents(source: Source) -> Iterator[str]:
    """Yield the documents in order, without blank texts.

    Raises `UserError`, naming the file and the line, for what cannot be read as text.
    """
    texts = (text for text in read_texts(source) if not is_blank(text))
    return (text for text in texts if is_selected(document_key(text), source.keys))


def read_texts(source: Source) -> Iterator[str]:
    """Like `read_documents`, but keeps blank texts so that callers can count them."""
    for location in source.locations:
        if is_table(source.suffix or location):
            rows = read_rows(location, source.text_field, source.suffix)
            texts = (_text(row, source.text_field, where) for where, row in rows)
        else:
            lines = read_lines(existing_file(location))
            texts = _blocks(lines) if source.blank_line else lines
        yield from (text.strip() for text in texts) if source.strip else texts


def _text(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        known = f"{where} has no field {field!r} (it has {', '.join(row)})"
        raise UserError(f"{known}: name one with --text-field (in training data.text_field), or rename it")
    return checked_text(row[field], f"{where}, field {field!r}")


def formats(source: Source) -> set[str]:
    """The formats of the files, without reading any."""
    several = [*source.locations]
    if Path(several[0]).is_dir():
        several = [str(path) for path in Path(several[0]).iterdir()]
    return {source.format or ("rows" if is_table(location) else "text") for location in several}


def is_table(location: str) -> bool:
    """Whether a location holds rows (see `read_rows`); otherwise it holds lines of text."""
    return location.startswith(HUB) or Path(f"a{location}").suffix.lower() in TABLES


def read_rows(location: str, column: str = "", suffix: str = "") -> Iterator[Row]:
    """Yield each row of a table. Parquet files and datasets read only `column`, if they have it.

    Raises `UserError`, naming the file and the row, for what cannot be read.
    """
    if location.startswith(HUB):
        return _hub_rows(location, column)
    path = existing_file(location)
    match suffix or path.suffix.lower():
        case ".parquet":
            return _parquet_rows(path, column)
        case ".csv" | ".tsv" as suffix:
            return csv_rows(path, "\t" if suffix == ".tsv" else ",")
        case _:
            return json_rows(location, read_lines(path))


def existing_file(location: str) -> Path:
    """Return the path. Raises `UserError` if it is missing, a folder, or unreadable."""
    path = Path(location)
    if path.is_dir():
        raise UserError(f"{location} is a folder: name a file in it, or {HUB}{location} to read it with datasets")
    if not path.exists():
        raise UserError(f"{location}: no such file (name a hub dataset as {HUB}NAME)")
    if not os.access(path, os.R_OK):
        raise UserError(f"{location}: no permission to read it")
    return path


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file: split at LF only, one CR before it removed, a byte-order mark skipped.

    mask-v1 fixes this; `str.splitlines` splits differently. Raises `UserError` for a file that is not UTF-8.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removesuffix(b"\n").removesuffix(b"\r") if line.endswith(b"\n") else line
            if number == 1:
                for beginning, kind, advice in NOT_UTF8:
                    if re.match(beginning, line):
                        raise UserError(f"{path} is {kind}, not UTF-8 text: {advice}")
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}: line {number}, byte {error.start + 1} is not UTF-8 (0x{line[error.start]:02x}): "
                    "if it is a text file, convert it (for example iconv -f LATIN1 -t UTF-8)"
                ) from None


def _blocks(lines: Iterable[str]) -> Iterator[str]:
    """Join the lines between blank lines with LF."""
    for is_blank_line, block in groupby(lines, key=is_blank):
        if not is_blank_line:
            yield "\n".join(block)


def json_rows(name: str, lines: Iterable[str]) -> Iterator[Row]:
    """Yield the JSON object of each line that is not blank. Raises `UserError`, naming the line, for anything else."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: {error}: write one object per line") from None
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object: write one object per line")
        yield where, row


def csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    """Yield the rows under the header. Raises `UserError`, naming the line, for a row that does not match it."""
    csv.field_size_limit((1 << 31) - 1)  # process-wide; the default is 128 KiB, which a document may exceed
    rows = csv.DictReader((f"{line}\n" for line in read_lines(path)), delimiter=delimiter, strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                raise csv.Error(f"it has {'more' if None in row else 'fewer'} fields than the header")
            yield f"{path}: line {rows.line_num}", row
    except csv.Error as error:
        advice = "quote texts that contain delimiters or line breaks, and double the quotes in them"
        raise UserError(f"{path}: line {rows.reader.line_num}: {error}: {advice}") from None


def _parquet_rows(path: Path, column: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        batches = file.iter_batches(columns=[column] if column in file.schema_arrow.names else None)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as parquet: {first_line(error)}") from None


def _hub_rows(location: str, column: str) -> Iterator[Row]:
    """Yield the rows of a dataset. A `*` for the configuration means all of them, sorted by name."""
    locations = [location]
    if re.match(f"{HUB}[^@#]+:\\*", location):
        require("train", "datasets")
        import datasets

        name = location.removeprefix(HUB).partition(":*")[0]
        with _hub_errors(location):
            names = sorted(datasets.get_dataset_config_names(name))
        locations = [location.replace(":*", f":{name}", 1) for name in names]
    for each in locations:
        dataset = load_hub(each)
        dataset = dataset.select_columns([column]) if column in (dataset.column_names or []) else dataset
        yield from ((f"{each}: row {number}", row) for number, row in enumerate(dataset))


def load_hub(location: str) -> Any:
    """Return the `datasets.Dataset` that `hub:NAME[:CONFIG][@SPLIT][#FILES]` names.

    Raises `UserError` if it cannot be loaded or `datasets` is not installed.
    """
    require("train", "datasets")
    import datasets

    location, _, files = location.partition("#")
    name, _, split = location.removeprefix(HUB).partition("@")
    name, _, config = name.partition(":")
    split = split or "train"
    with _hub_errors(location):
        return datasets.load_dataset(
            name,
            config or None,
            split=split,
            data_files={split: files} if files else None,
            verification_mode="no_checks" if files else None,  # the dataset card counts the rows of all files
        )


@contextlib.contextmanager
def _hub_errors(location: str) -> Iterator[None]:
    """Turn any error into a one-line `UserError`: datasets raises many kinds (a missing name or split, the network)."""
    import datasets

    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub", "fsspec"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError(f"{location}: cannot be loaded: {type(cause).__name__}: {first_line(cause)}") from None


def checked_text(value: object, where: str) -> str:
    """Return the value if it is valid Unicode text. Raises `UserError`, saying `where` it stands, if not."""
    if not isinstance(value, str):
        raise UserError(f"{where} holds {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where} holds half a surrogate pair, which is not valid Unicode") from None
    return value
