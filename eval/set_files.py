"""The files of an item set: which they are, and how their rows are read.

location (file, folder, pattern, zip, hub dataset) → files → rows of fields, each with a column `file`
"""

import json
import logging
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from mlmkit.errors import UserError
from mlmkit.lines import BadRows, Lines, is_blank
from mlmkit.locations import Source, Split, file_errors, file_format, find_files, name_stem, open_file, readable_files
from mlmkit.tables import DELIMITERS, Row, csv_rows, table_rows, unit
from mlmkit.toml import Rule, one_of

log = logging.getLogger(__name__)

ALTERNATING, GROUPED = "alternating", "grouped"
LARGEST_UNPACKED = 256 << 20  # bytes, of a zip; BLiMP has 27 MB
APPLIES_TO = {  # the formats that a setting of `[files]` changes the reading of
    "first": {ALTERNATING},
    "delimiter": {*DELIMITERS},
    "quoting": {*DELIMITERS},
    "encoding": {ALTERNATING, "jsonl", *DELIMITERS},
}


def _is_encoding(name: str) -> bool:
    try:
        return "".encode(name) is not None
    except (LookupError, ValueError):
        return False


@dataclass(frozen=True)
class FileReading:
    """How the files of a set are read: `[files]` of its declaration.

    `format` replaces what the suffixes say. In an `alternating` file every two lines are a pair, which become the
    columns `sentence_good` and `sentence_bad`; `first` says which of them is first, the good one by default. `quoting`:
    whether a quotation mark at the beginning of a csv or tsv field encloses the field. By default it does in csv; in
    tsv such a field is refused, because both readings are common. `encoding` is UTF-8 by default. A `grouped` file is
    one JSON object with lists of rows; a row's column `group` is the key of its list.
    """

    format: Annotated[str, one_of("jsonl", "csv", "tsv", "parquet", "arrow", ALTERNATING, GROUPED)] = ""
    first: Annotated[str, one_of("good", "bad")] = ""
    delimiter: Annotated[str, Rule(lambda text: len(text) == 1 and text not in '"\r\n', "one character")] = ""
    quoting: bool | None = None
    encoding: Annotated[str, Rule(_is_encoding, "an encoding that Python knows")] = ""


class _File(NamedTuple):
    path: str  # of what is read: the file itself, or a copy that was unpacked or decoded
    shown: str  # what messages call it
    format: str


def set_rows(location: str, reading: FileReading = FileReading()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row of the files at a location: where it stands, for messages, and its fields.

    `file` is the name of its file without suffixes, unless the row has a field of that name. Text files are left out
    and logged, unless `reading` gives a format. It does not apply to hub datasets, whose rows have no `file`. Raises
    `UserError` for what cannot be read, and for a setting without effect.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for file in _set_files(location, reading, scratch):
            stem = {} if file.format == "hub" else {"file": name_stem(file.shown)}
            try:
                if reading.encoding and file.format in APPLIES_TO["encoding"]:
                    file = _in_utf8(file, reading.encoding, scratch)
                for number, row in _file_rows(file, reading):
                    yield f"{file.shown}: {unit(file.format)} {number}", row | stem | row
            except UserError as error:
                raise UserError(str(error).replace(file.path, file.shown)) from None


# ---------------------------------------------------------------- files


def _set_files(location: str, reading: FileReading, scratch: str) -> list[_File]:
    """The files that hold items. Zips are unpacked into the folder `scratch`."""
    unpacked = [each for file in find_files(Source(location)) for each in _unpacked(file, scratch)]
    files = [_File(path, shown, file_format(path, reading.format)[0]) for path, shown in unpacked]
    tables, texts = ([file for file in files if (file.format == "text") is is_text] for is_text in (False, True))
    if not tables:
        raise UserError(
            f"{texts[0].shown} is text: items are read from .jsonl, .csv, .tsv, .parquet and .arrow files, zips of "
            'them, and text with two lines per pair (format = "alternating" in [files]: docs/own-sets.md)'
        )
    if texts:
        log.info("%s: text files are left out (%d, the first: %s)", location, len(texts), texts[0].shown)
    formats = {file.format for file in tables}
    for name, needed in APPLIES_TO.items():
        if getattr(reading, name) not in ("", None) and not formats & (needed | {"hub"}):
            raise UserError(f"{location}: files.{name} has no effect on {', '.join(sorted(formats))}: leave it out")
    return tables


def _unpacked(file: str, scratch: str) -> Iterator[tuple[str, str]]:
    """The path of each file in a zip, once unpacked, and what to call it; of any other file, its own path."""
    if Path(file).suffix.lower() != ".zip":
        yield file, file
        return
    advice = "unpack it yourself and name the folder, because it cannot be read here"  # encrypted, or deflate64, say
    with (
        file_errors(file, lambda: advice),
        open_file(file, seekable=True) as stream,
        zipfile.ZipFile(stream) as archive,
    ):
        visible = (each for each in archive.infolist() if not each.is_dir() and not _is_hidden(each.filename))
        members = {f"{file}/{each.filename}": each for each in visible}
        names = readable_files(file, sorted(members))
        if sum(members[name].file_size for name in names) > LARGEST_UNPACKED:
            raise ValueError(f"more than {LARGEST_UNPACKED >> 20} MiB when unpacked")
        for name in names:
            yield archive.extract(members[name], tempfile.mkdtemp(dir=scratch)), name


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in Path(name).parts)


def _in_utf8(file: _File, encoding: str, scratch: str) -> _File:
    copy = Path(scratch, "utf-8")
    with open_file(file.path) as stream, file_errors(file.path, lambda: f"cannot be read as {encoding}"):
        copy.write_bytes(stream.read().decode(encoding).encode())
    return file._replace(path=str(copy))


# ---------------------------------------------------------------- rows


def _file_rows(file: _File, reading: FileReading) -> Iterator[Row]:
    split = Split(file.path)
    if file.format == ALTERNATING:
        return _alternating_rows(split, bad_first=reading.first == "bad")
    if file.format == GROUPED:
        return _grouped_rows(split)
    if file.format not in DELIMITERS:
        return table_rows(split, file.format, "", BadRows())
    delimiter = reading.delimiter or DELIMITERS[file.format]
    if file.format == "tsv" and reading.quoting is None:
        _refuse_quotation_marks(split, delimiter)
    return csv_rows(split, delimiter, BadRows(), quoting=reading.quoting is not False)


def _refuse_quotation_marks(split: Split, delimiter: str) -> None:
    """Raise `UserError` if a field begins with a quotation mark: it may be text, or enclose the field."""
    lines = Lines(split, BadRows())
    for line, _ in lines:
        if line.startswith('"') or f'{delimiter}"' in line:
            raise UserError(
                f"{split.file}: line {lines.number}: a field begins with a quotation mark: say in [files] whether it "
                "encloses the field (quoting = true) or is part of the text (quoting = false)"
            )


def _alternating_rows(split: Split, *, bad_first: bool) -> Iterator[Row]:
    """The pairs of a text with two lines per pair. Blank lines may separate pairs, but not the two lines."""
    names = ("sentence_bad", "sentence_good") if bad_first else ("sentence_good", "sentence_bad")
    lines = Lines(split, BadRows())
    first = ""
    for line, _ in lines:
        if first and not is_blank(line):
            yield lines.number - 1, dict(zip(names, (first, line), strict=True))
            first = ""
        elif first:
            break
        elif not is_blank(line):
            first = line
    if first:
        raise UserError(f"{split.file}: no second line follows {first!r}: every pair needs two lines")


def _grouped_rows(split: Split) -> Iterator[Row]:
    with (
        open_file(split.file) as stream,
        file_errors(split.file, lambda: "it must be one JSON object of lists of rows"),
    ):
        groups = json.load(stream)
        rows = [{"group": group} | row for group, members in groups.items() for row in members]
    return enumerate(rows, start=1)
