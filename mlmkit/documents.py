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
from itertools import groupby
from pathlib import Path
from typing import Any

from mlmkit.errors import UserError, first_line, require

HUB = "hub:"
TABLES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")
# How a file begins that is no UTF-8 text, what it is, and what makes something readable of it.
NO_UTF8 = (
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


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    `location` is a file (`.jsonl` or `.json` of one object per line, `.csv` or `.tsv` with a header, `.parquet`,
    anything else is text) or `hub:NAME[:CONFIG][@SPLIT][#FILES]` for a dataset of the hub or a local folder that
    `datasets` can read; FILES is a pattern of the split's files, where the whole would be too much to fetch.
    `text_field` is the column or key that holds the text. `blank_line` makes blocks of lines the documents of a text
    file. `strip` drops the white space around each text.
    """

    location: str
    text_field: str = "text"
    blank_line: bool = False
    strip: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "location", os.fspath(self.location))  # a Path will do


def read_documents(source: Source) -> Iterator[str]:
    """The documents, in order. A text of white space only is no document.

    Raises `UserError`, naming the file and the line, when something cannot be read as text.
    """
    return (text for text in read_texts(source) if text and not text.isspace())


def read_texts(source: Source) -> Iterator[str]:
    """The same with the texts of white space only, which are no documents, for who counts them."""
    if is_table(source.location):
        rows = read_rows(source.location, source.text_field)
        texts = (_text(row, source.text_field, place) for place, row in rows)
    else:
        lines = read_lines(existing_file(source.location))
        texts = _blocks(lines) if source.blank_line else lines
    return (text.strip() for text in texts) if source.strip else texts


def _text(row: dict[str, Any], field: str, place: str) -> str:
    if field not in row:
        known = f"{place} has no field {field!r} (it has {', '.join(row)})"
        raise UserError(f"{known}: name one with --text-field (in training data.text_field), or rename it")
    return checked_text(row[field], f"{place}, field {field!r}")


def is_table(location: str) -> bool:
    """Whether this is read by `read_rows`; otherwise it is lines of text."""
    return location.startswith(HUB) or Path(location).suffix.lower() in TABLES


def read_rows(location: str, column: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a table with its place, for messages. With `column`, only that one where this saves reading.

    Raises `UserError` naming what cannot be read.
    """
    if location.startswith(HUB):
        return _hub_rows(location, column)
    path = existing_file(location)
    match path.suffix.lower():
        case ".parquet":
            return _parquet_rows(path, column)
        case ".csv" | ".tsv" as suffix:
            return csv_rows(path, "\t" if suffix == ".tsv" else ",")
        case _:
            return json_rows(location, read_lines(path))


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
                if found := next((other for other in NO_UTF8 if re.match(other[0], line)), None):
                    raise UserError(f"{path} is {found[1]}, not UTF-8 text: {found[2]}")
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}: line {number}, byte {error.start + 1} is not UTF-8 (0x{line[error.start]:02x}): "
                    "if it is a text file, convert it (for example iconv -f LATIN1 -t UTF-8)"
                ) from None


def _blocks(lines: Iterable[str]) -> Iterator[str]:
    """Blocks of lines between lines of white space, joined by LF."""
    for is_blank, block in groupby(lines, key=lambda line: not line.strip()):
        if not is_blank:
            yield "\n".join(block)


def json_rows(place: str, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The object in each line that is not white space. Raises `UserError` naming the line that holds none."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: line {number} is not JSON: {error}: write an object in each line") from None
        if not isinstance(row, dict):
            raise UserError(f"{place}: line {number} is no JSON object: write an object in each line")
        yield f"{place}: line {number}", row


def csv_rows(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows under a header, each with its place. Raises `UserError` naming the line that does not fit it."""
    csv.field_size_limit((1 << 31) - 1)  # of the whole process; by default 128 KiB, which a document may exceed
    rows = csv.DictReader((f"{line}\n" for line in read_lines(path)), delimiter=delimiter, strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                raise csv.Error(f"it has {'more' if None in row else 'fewer'} fields than the header")
            yield f"{path}: line {rows.line_num}", row
    except csv.Error as error:
        advice = "put texts with delimiters or line breaks in quotes, and write a quote in them twice"
        raise UserError(f"{path}: line {rows.reader.line_num}: {error}: {advice}") from None


def _parquet_rows(path: Path, column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        batches = file.iter_batches(columns=[column] if column in file.schema_arrow.names else None)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as parquet: {first_line(error)}") from None


def _hub_rows(location: str, column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a dataset, or those of each of its configurations, by name, where the location says `*`."""
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
        raise UserError(f"{location}: cannot be loaded: {type(cause).__name__}: {first_line(cause)}") from None


def checked_text(value: object, place: str) -> str:
    """The value, if it is Unicode text. Raises `UserError` naming its place otherwise."""
    if not isinstance(value, str):
        raise UserError(f"{place} holds {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{place} holds half a surrogate pair, which is no Unicode text") from None
    return value
