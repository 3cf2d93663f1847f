"""Text files, jsonl, parquet and datasets of the hub → documents. A document is a text."""

import codecs
import contextlib
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
WITH_FIELDS = (".jsonl", ".json", ".ndjson", ".parquet")


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    `location` is a file (`.jsonl`, `.json` of one object a line, `.parquet`, anything else is text) or
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
    if source.location.startswith(HUB):
        yield from _read_hub(source)
        return
    path = existing_file(source.location)
    match path.suffix:
        case ".jsonl" | ".json" | ".ndjson":
            yield from _read_jsonl(path, source.text_field)
        case ".parquet":
            yield from _read_parquet(path, source.text_field)
        case _ if source.blank_line:
            yield from _blocks(read_lines(path))
        case _:
            yield from read_lines(path)


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
    """Lines of UTF-8, split at LF alone, one CR before it dropped: mask-v1 fixes this, and `str.splitlines` differs."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removesuffix(b"\n").removesuffix(b"\r") if line.endswith(b"\n") else line
            if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError(f"{path}: this is UTF-16: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}: line {number}, byte {error.start + 1} is not UTF-8 (0x{line[error.start]:02x}): "
                    "convert the file to UTF-8 (for example iconv -f LATIN1 -t UTF-8)"
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


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    for number, row in json_lines(str(path), read_lines(path)):
        if not isinstance(row, dict) or field not in row:
            known = f" (it has {', '.join(row)})" if isinstance(row, dict) else ""
            raise UserError(f"{path}: line {number} has no field {field!r}{known}: choose one with --text-field")
        yield checked_text(row[field], f"{path}: line {number}, field {field!r}")


def json_lines(place: str, lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """(number, value) of each line that is not white space. Raises `UserError` naming the line that is not JSON."""
    for number, line in enumerate(lines, start=1):
        if not line or line.isspace():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: line {number} is not JSON: {error}") from None


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        if field not in file.schema_arrow.names:
            columns = ", ".join(file.schema_arrow.names)
            raise UserError(f"{path}: no column {field!r} (it has {columns}): choose one with --text-field")
        row = 0
        for batch in file.iter_batches(columns=[field]):
            for value in batch.column(0).to_pylist():
                yield checked_text(value, f"{path}: row {row}, column {field!r}")
                row += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}") from None


def _read_hub(source: Source) -> Iterator[str]:
    dataset = load_hub(source.location)
    if source.text_field not in (dataset.column_names or []):
        columns = ", ".join(dataset.column_names or [])
        raise UserError(f"{source.location}: no column {source.text_field!r} (it has {columns}): use --text-field")
    for row, value in enumerate(dataset[source.text_field]):
        yield checked_text(value, f"{source.location}: row {row}")


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
