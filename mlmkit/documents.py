"""Text files, jsonl, csv, parquet and datasets of the hub → rows → documents. A document is a text."""

import codecs
import contextlib
import csv
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlmkit.errors import UserError, require

HUB = "hub:"
TABLES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")
_READ_ARROW = "import pyarrow as pa; from pyarrow.parquet import write_table as write"
_TO_PARQUET = f"make it parquet (python -c \"{_READ_ARROW}; write(pa.ipc.{{}}('FILE').read_all(), 'NEW.parquet')\")"
# How a file begins that is no UTF-8 text, what it is, and what makes something readable of it.
NO_UTF8 = (
    (rb"\x1f\x8b", "gzip", "unpack it (gzip -dc FILE > TEXT)"),
    (rb"BZh[1-9]1AY", "bzip2", "unpack it (bzip2 -dc FILE > TEXT)"),
    (rb"\xfd7zXZ", "xz", "unpack it (xz -dc FILE > TEXT)"),
    (rb"\x28\xb5\x2f\xfd", "zstd", "unpack it (zstd -dc FILE > TEXT)"),
    (rb"PK\x03\x04", "a zip archive", "unpack it (unzip FILE)"),
    (rb"%PDF-\d", "a PDF", "extract its text (pdftotext FILE)"),
    (rb"PAR1\x15", "parquet", "give it the suffix .parquet"),
    (rb"ARROW1\0", "an Arrow file", _TO_PARQUET.format("open_file")),
    (rb"\xff{4}", "an Arrow file", _TO_PARQUET.format("open_stream")),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32", "convert it (iconv -f UTF-32 -t UTF-8 FILE > TEXT)"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16", "convert it (iconv -f UTF-16 -t UTF-8 FILE > TEXT)"),
)


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    `location` is a file (`.jsonl` or `.json` of one object per line, `.csv` and `.tsv` with a header, `.parquet`,
    anything else is text) or
    `hub:NAME[:CONFIG][@SPLIT][#FILES]` for a dataset of the hub or a local folder that `datasets` can read; FILES is a
    pattern of the split's files, where the whole would be too much to fetch. `text_field` is the column or key that
    holds the text. `blank_line` makes blocks of lines the documents of a text file. `strip` drops the white space
    around each text.
    """

    location: str
    text_field: str = "text"
    blank_line: bool = False
    strip: bool = False


def read_documents(source: Source) -> Iterator[str]:
    """The documents, in order. A text of white space only is no document.

    Raises `UserError`, naming the file and the line, when something cannot be read as text.
    """
    return (text for text in read_texts(source) if text and not text.isspace())


def read_texts(source: Source) -> Iterator[str]:
    """The same with the texts of white space only, which are no documents, for who counts them."""
    return (text.strip() for text in _read(source)) if source.strip else _read(source)


def _read(source: Source) -> Iterator[str]:
    if is_table(source.location):
        field = source.text_field
        for place, row in read_rows(source.location, field):
            if field not in row:
                known = f"{place} has no field {field!r} (it has {', '.join(row)})"
                raise UserError(f"{known}: name one with --text-field (in training data.text_field), or rename it")
            yield checked_text(row[field], f"{place}, field {field!r}")
    else:
        lines = read_lines(existing_file(source.location))
        yield from _blocks(lines) if source.blank_line else lines


def is_table(location: str) -> bool:
    """Whether this is read by `read_rows`; otherwise it is lines of text."""
    return location.startswith(HUB) or Path(location).suffix.lower() in TABLES


def read_rows(location: str, column: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a table with its place, for messages. With `column`, only that one where this saves reading.

    Raises `UserError` naming what cannot be read.
    """
    if location.startswith(HUB):
        for configuration in hub_configurations(location):
            dataset = load_hub(configuration)
            if column in (dataset.column_names or []):
                dataset = dataset.select_columns([column])
            yield from ((f"{configuration}: row {number}", row) for number, row in enumerate(dataset))
        return
    path = existing_file(location)
    match path.suffix.lower():
        case ".parquet":
            yield from _parquet_rows(path, column)
        case ".csv":
            yield from _csv_rows(path, ",")
        case ".tsv":
            yield from _csv_rows(path, "\t")
        case _:
            yield from json_rows(location, read_lines(path))


def existing_file(location: str) -> Path:
    """The path, or `UserError` if it is missing, a folder or unreadable."""
    path = Path(location)
    if path.is_dir():
        raise UserError(f"{location} is a folder: name a file in it, or {HUB}{location} to read it with datasets")
    if not path.exists():
        raise UserError(f"{location}: no such file (a dataset of the hub is written {HUB}NAME)")
    if not os.access(path, os.R_OK):
        raise UserError(f"{location}: no permission to read it")
    return path


def read_lines(path: Path) -> Iterator[str]:
    """Lines of UTF-8, split at LF alone, one CR before it dropped: mask-v1 fixes this, and `str.splitlines` differs.

    A byte-order mark at the beginning is not part of the text. Raises `UserError` for what is not UTF-8.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removesuffix(b"\n").removesuffix(b"\r") if line.endswith(b"\n") else line
            if number == 1:
                for beginning, kind, remedy in NO_UTF8:
                    if re.match(beginning, line):
                        raise UserError(f"{path} is {kind}, not UTF-8 text: {remedy}")
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                is_binary = b"\0" in line + file.peek()
                remedy = "is it a text file?" if is_binary else "convert it (for example iconv -f LATIN1 -t UTF-8)"
                raise UserError(
                    f"{path}: line {number}, byte {error.start + 1} is not UTF-8 (0x{line[error.start]:02x}): {remedy}"
                ) from None


def _blocks(lines: Iterable[str]) -> Iterator[str]:
    """Blocks of lines between lines of white space, joined by LF."""
    block: list[str] = []
    for line in lines:
        if line and not line.isspace():
            block.append(line)
        elif block:
            yield "\n".join(block)
            block = []
    if block:
        yield "\n".join(block)


def json_rows(place: str, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The object in each line that is not white space. Raises `UserError` naming the line that holds none."""
    for number, line in enumerate(lines, start=1):
        if not line or line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: line {number} is not JSON: {error}: write an object in each line") from None
        if not isinstance(row, dict):
            raise UserError(f"{place}: line {number} is no JSON object: write an object in each line")
        yield f"{place}: line {number}", row


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit((1 << 31) - 1)  # of the whole process; by default 128 KiB, which a document may exceed
    rows = csv.DictReader((f"{line}\n" for line in read_lines(path)), delimiter=delimiter, strict=True)
    try:
        for row in rows:
            place = f"{path}: line {rows.line_num}"
            if None in row or None in row.values():
                raise csv.Error(f"it has {'more' if None in row else 'fewer'} fields than the header")
            yield place, row
    except csv.Error as error:
        advice = "put texts with delimiters or line breaks in quotes, and write a quote in them twice"
        raise UserError(f"{path}: line {rows.reader.line_num}: {error}: {advice}") from None


def _parquet_rows(path: Path, column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        file = pq.ParquetFile(path)
        for batch in file.iter_batches(columns=[column] if column in file.schema_arrow.names else None):
            for row in batch.to_pylist():
                yield f"{path}: row {number}", row
                number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}") from None


def hub_configurations(location: str) -> list[str]:
    """The location itself, or one for each configuration of the dataset, by name, where it says `*`."""
    if not re.match(f"{HUB}[^@#]+:\\*", location):
        return [location]
    require("train", "datasets")
    import datasets

    name = location.removeprefix(HUB).partition(":*")[0]
    with _hub_errors(location):
        return [location.replace(":*", f":{found}", 1) for found in sorted(datasets.get_dataset_config_names(name))]


def load_hub(location: str) -> Any:
    """The split that `hub:NAME[:CONFIG][@SPLIT][#FILES]` names, as a `datasets.Dataset`. Raises `UserError`."""
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
            verification_mode="no_checks" if files else None,  # the card counts the rows of all files
        )


@contextlib.contextmanager
def _hub_errors(location: str) -> Iterator[None]:
    """datasets raises many kinds, for many causes (a missing name, split, network): say which, in one line."""
    import datasets

    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub", "fsspec"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error
        first_line = next(iter(str(cause).splitlines()), "")
        raise UserError(f"{location}: cannot be loaded: {type(cause).__name__}: {first_line}") from None


def checked_text(value: object, place: str) -> str:
    """The value, if it is Unicode text. Raises `UserError` naming its place otherwise."""
    if not isinstance(value, str):
        raise UserError(f"{place} holds {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{place} holds half a surrogate pair, which is no Unicode text") from None
    return value
