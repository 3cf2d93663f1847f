"""The documents of a source. A document is one text.

locations.split_files    source → splits
read_pieces              a split → texts; a very long line comes in pieces
read_texts               all files → whole texts
read_documents           → the selected texts that are not blank
"""

import codecs
import csv
import io
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import dropwhile, groupby, repeat, takewhile
from typing import Any

from mlmkit.errors import UserError
from mlmkit.locations import Source, Split, file_errors, file_format, find_files, load_hub, open_file, open_parquet
from mlmkit.masking import document_key

log = logging.getLogger(__name__)
_warn_once = cache(log.warning)

PIECE = 1 << 19  # characters of a piece at most; tokenising takes up to 190 bytes of memory for each
ROWS = 1024  # of a parquet file or dataset, read at once
# How files that are not UTF-8 text begin, what they are, and how to get text from them.
NOT_UTF8 = (
    (rb"\x1f\x8b", "gzip", "give it the suffix .gz"),
    (rb"BZh[1-9]1AY", "bzip2", "give it the suffix .bz2"),
    (rb"\xfd7zXZ", "xz", "give it the suffix .xz"),
    (rb"\x28\xb5\x2f\xfd", "zstd", "give it the suffix .zst"),
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive", "unpack it (unzip FILE)"),
    (rb"(?s).{257}ustar", "a tar archive", "unpack it (tar -xf FILE)"),
    (rb"%PDF-\d", "a PDF", "extract its text (pdftotext FILE)"),
    (rb"PAR1\x15", "parquet", "give it the suffix .parquet"),
    (rb"ARROW1\0|\xff{4}", "an Arrow file", "give it the suffix .arrow"),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32", "convert it (iconv -f UTF-32 -t UTF-8 FILE > TEXT)"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16", "convert it (iconv -f UTF-16 -t UTF-8 FILE > TEXT)"),
)

Row = tuple[int, dict[str, Any]]  # number (a line of the split, or a row of the file) and fields
Line = tuple[Split, int, str]  # where it is, its number there, and its text


@dataclass
class BadRows:
    """Rows that cannot be read: `error` raises `UserError` for the first, `skip` counts them."""

    policy: str = "error"
    count: int = 0
    first: str = ""

    def add(self, message: str) -> None:
        """Report one."""
        if self.policy == "error":
            raise UserError(message)
        self.count += 1
        self.first = self.first or message

    def warn(self, name: str) -> None:
        """Log, once per process, how many of the text called `name` there were, if any."""
        if self.count:
            _warn_once(f"{name}: {self.count} rows that cannot be read are left out, the first: {self.first}")


def is_blank(text: str) -> bool:
    """Whether a text is empty or only white space, and so is not a document."""
    return not text or text.isspace()


def is_selected(key: int, keys: tuple[float, float]) -> bool:
    """Whether key / 2**64 lies in [begin, end). Exact, as Python compares an integer with a float without rounding."""
    begin, end = keys
    return begin * 2.0**64 <= key < end * 2.0**64


def why_empty(source: Source) -> str:
    """Why a source has no documents, for a message."""
    begin, end = source.keys
    if (begin, end) == (0.0, 1.0):
        return "it is empty or blank"
    taken = f"data.held_out = {begin or end:g} takes all documents: lower it, or name a held-out text"
    return taken if begin else f"data.held_out = {end:g} takes none of its documents: raise it, or name a held-out text"


def read_documents(source: Source) -> Iterator[str]:
    """Yield the selected documents in order, without blank texts.

    Raises `UserError`, naming the file and the line, for what cannot be read as text.
    """
    texts = (text for text in read_texts(source) if not is_blank(text))
    if source.keys == (0.0, 1.0):
        return texts
    return (text for text in texts if is_selected(document_key(text), source.keys))


def read_texts(source: Source) -> Iterator[str]:
    """Yield all texts, whole, whatever their key. Blank ones are kept, so that callers can count them.

    Rows that are skipped are counted in a warning at the end.
    """
    bad_rows = BadRows(source.on_bad_row)
    for split in map(Split, find_files(source)):
        parts: list[str] = []
        for piece, ends in read_pieces(source, split, bad_rows):
            if ends and not parts:
                yield piece
            else:
                parts.append(piece)
                if ends:
                    yield "".join(parts)
                    parts = []
    bad_rows.warn(source.name)


def read_pieces(source: Source, split: Split, bad_rows: BadRows) -> Iterator[tuple[str, bool]]:
    """Yield the texts of a split, blank ones too, in pieces: (piece, whether the text ends with it).

    A text is one piece, except that a line of a text file longer than `PIECE` bytes comes in several, of at most
    `PIECE` characters each, so that memory does not grow with it. Texts come whole with `strip`, with `blank_line`, and
    when bad rows are skipped, because a text must be complete before it is known to be good.
    """
    if file_format(split.file, source.format)[0] != "text":
        texts = _row_texts(source, split, bad_rows)
    elif source.blank_line:
        texts = _blocks(split, bad_rows)
    else:
        is_whole = source.strip or bad_rows.policy == "skip"
        lines = iter(_Lines(split, bad_rows, -1 if is_whole else PIECE - 4))
        if not source.strip:
            return lines
        texts = (line for line, _ in lines)
    return zip(map(str.strip, texts) if source.strip else texts, repeat(True))


# ---------------------------------------------------------------- lines of text


def _place(split: Split, number: int, bad_rows: BadRows, unit: str = "line") -> str:
    """Name a row in a message. A line is counted from the start of the file if the message ends the command.

    Counting for every split that has a bad line would read a large file many times.
    """
    if unit == "row" or not split.begin:
        return f"{split.file}: {unit} {number}"
    if bad_rows.policy == "skip":
        return f"{split.file}: line {number} after byte {split.begin}"
    number, left = number + 1, split.begin - 1  # the line that has the byte before the split is one more
    with open_file(split.file) as stream:
        while left and (block := stream.read(min(PIECE, left))):
            number, left = number + block.count(b"\n"), left - len(block)
    return f"{split.file}: line {number}"


@dataclass
class _Lines:
    """The lines of UTF-8 text that begin in the split: (text, whether the line ends with it), and their `number` in it.

    They are split at LF only, one CR before it removed, a byte-order mark skipped. mask-v1 fixes this; `str.splitlines`
    splits differently. A line longer than `longest` bytes comes in pieces. When bad rows are skipped, `keep_bad` keeps
    a line that is not UTF-8, with surrogates in place of the bad bytes.
    """

    split: Split
    bad_rows: BadRows
    longest: int = -1
    keep_bad: bool = False
    number: int = 0

    def __iter__(self) -> Iterator[tuple[str, bool]]:
        file, end, longest = self.split.file, self.split.end or math.inf, self.longest
        rest, offset = b"", 0  # of a long line: its last code point so far, and the bytes before that
        with open_file(file) as stream, file_errors(file, lambda: f"cannot be read after line {self.number}"):
            position = _go_to_line(stream, self.split)
            while rest or position < end:
                line = stream.readline(longest)
                if not line and not rest:
                    return
                if not rest:
                    self.number += 1
                position, data = position + len(line), rest + line
                if line.endswith(b"\n"):
                    stop, rest = -2 if data.endswith(b"\r\n") else -1, b""
                elif len(line) == longest:
                    stop = _last_code_point(data)
                    rest = data[stop:]
                else:
                    stop, rest = None, b""
                try:
                    text = data[:stop].decode()
                except UnicodeDecodeError as error:
                    if not self.keep_bad or self.bad_rows.policy == "error":
                        self._report(f"byte {offset + error.start + 1}", data[error.start])
                        continue
                    text = data[:stop].decode(errors="surrogateescape")
                yield text, not rest
                offset = offset + len(data) - len(rest) if rest else 0

    def _report(self, byte: str, value: int) -> None:
        where = f"{_place(self.split, self.number, self.bad_rows)}, {byte}"
        advice = "if it is a text file, convert it (for example iconv -f LATIN1 -t UTF-8)"
        self.bad_rows.add(f"{where} is not UTF-8 (0x{value:02x}): {advice}")


def _go_to_line(stream: io.BufferedReader, split: Split) -> int:
    """Go to the first line that begins in the split, at the start of the text or after a LF; return its byte."""
    if not split.begin:
        start = stream.peek(512)
        for beginning, kind, advice in NOT_UTF8:
            if re.match(beginning, start):
                raise UserError(f"{split.file} is {kind}, not UTF-8 text: {advice}")
        mark = len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0
        stream.read(mark)
        return min(mark, split.end - 1) if split.end else mark  # the first line begins ahead of the mark
    position = stream.seek(split.begin - 1)
    while line := stream.readline(PIECE):
        position += len(line)
        if line.endswith(b"\n") or (split.end and position >= split.end):
            break
    return position


def _last_code_point(data: bytes) -> int:
    """Where the last code point begins, which may be incomplete."""
    stop = len(data) - 1
    while stop and data[stop] & 0xC0 == 0x80:
        stop -= 1
    return stop


def _numbered(split: Split, bad_rows: BadRows) -> Iterator[Line]:
    lines = _Lines(split, bad_rows, keep_bad=True)
    return ((split, lines.number, line) for line, _ in lines)


def _has_text(line: Line) -> bool:
    return not is_blank(line[2])


def _blocks(split: Split, bad_rows: BadRows) -> Iterator[str]:
    """Yield the lines between blank lines, joined with LF.

    A block belongs to the split in which the blank line before it begins, so that no split has to look back.
    """
    lines = _numbered(split, bad_rows)
    if split.begin:
        lines = dropwhile(_has_text, lines)
    if split.end is not None:
        lines = _with_end_of_block(lines, _numbered(Split(split.file, split.end), bad_rows))
    for has_text, block in groupby(lines, key=_has_text):
        if has_text:
            (where, number, text), *others = block
            text = "\n".join([text, *(line for _, _, line in others)])
            if bad_rows.policy == "skip" and (problem := _text_problem(text)):
                bad_rows.add(f"{_place(where, number, bad_rows)} and those up to a blank line: {problem}")
            else:
                yield text


def _with_end_of_block(lines: Iterable[Line], after: Iterable[Line]) -> Iterator[Line]:
    """The lines of a split, unless there are none, and those behind it up to a blank one."""
    line = None
    for line in lines:
        yield line
    if line:
        yield from takewhile(_has_text, after)


# ---------------------------------------------------------------- rows of tables


def read_rows(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row of the tables of a source: where it stands, for messages, and its fields.

    Raises `UserError`, naming the file and the row, for what cannot be read.
    """
    for split in map(Split, find_files(source)):
        format, _ = file_format(split.file, source.format)
        for number, row in _rows(split, format, "", bad_rows := BadRows()):
            yield _place(split, number, bad_rows, _unit(format)), row


def _row_texts(source: Source, split: Split, bad_rows: BadRows) -> Iterator[str]:
    field, format = source.text_field, file_format(split.file, source.format)[0]
    for number, row in _rows(split, format, field, bad_rows):
        report = bad_rows
        if field not in row:
            problem = f" has no field {field!r} (it has {', '.join(row)})"
            problem += ": name one with --text-field (in training data.text_field), or rename it"
            report = bad_rows if format == "jsonl" else BadRows()  # in the other formats all rows have the same fields
        elif problem := _text_problem(row[field]):
            problem = f", field {field!r} {problem}"
        else:
            yield row[field]
            continue
        report.add(_place(split, number, report, _unit(format)) + problem)


def _unit(format: str) -> str:
    return "row" if format in ("parquet", "arrow", "hub") else "line"


def _text_problem(value: object) -> str:
    """What keeps a value from being a text, or ""."""
    if not isinstance(value, str):
        return f"holds {type(value).__name__}, not text"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "holds half a surrogate pair, or a byte that is not UTF-8, which is not valid Unicode"
    return ""


def checked_text(value: object, where: str) -> str:
    """Return the value if it is valid Unicode text. Raises `UserError`, saying `where` it stands, if not."""
    if problem := _text_problem(value):
        raise UserError(f"{where} {problem}")
    return str(value)


def _rows(split: Split, format: str, column: str, bad_rows: BadRows) -> Iterator[Row]:
    """Yield the rows of a split. Of Arrow data it reads only `column`, if there is one of that name."""
    if format == "jsonl":
        return _json_rows(split, bad_rows)
    if format in ("csv", "tsv"):
        return _csv_rows(split, "," if format == "csv" else "\t", bad_rows)
    read = {"parquet": _parquet_rows, "arrow": _arrow_rows, "hub": _hub_rows}[format]
    return read(split, column, bad_rows)


def json_object(line: str) -> dict[str, Any]:
    """Parse a line. Raises `ValueError` for anything but an object; the message follows the line's place."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f" is not JSON: {error}: write one object per line") from None
    if not isinstance(row, dict):
        raise ValueError(" is not a JSON object: write one object per line")
    return row


def _json_rows(split: Split, bad_rows: BadRows) -> Iterator[Row]:
    lines = _Lines(split, bad_rows)
    for line, _ in lines:
        if is_blank(line):
            continue
        try:
            row = json_object(line)
        except ValueError as error:
            bad_rows.add(f"{_place(split, lines.number, bad_rows)}{error}")
        else:
            yield lines.number, row


def _csv_rows(split: Split, delimiter: str, bad_rows: BadRows) -> Iterator[Row]:
    csv.field_size_limit((1 << 31) - 1)  # process-wide; the default is 128 KiB, which a document may exceed
    lines = (f"{line}\n" for line, _ in _Lines(split, bad_rows, keep_bad=True))
    rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
    while True:
        try:
            if (row := next(rows, None)) is None:
                return
            if None in row or None in row.values():
                raise csv.Error(f"it has {'more' if None in row else 'fewer'} fields than the header")
        except csv.Error as error:
            report = BadRows() if "end of data" in str(error) else bad_rows  # an open quote takes in all that follows
            advice = "quote texts that contain delimiters or line breaks, and double the quotes in them"
            report.add(f"{_place(split, rows.reader.line_num, report)}: {error}: {advice}")
        else:
            yield rows.line_num, row


def _parquet_rows(split: Split, column: str, bad_rows: BadRows) -> Iterator[Row]:
    with open_parquet(split.file) as parquet:
        groups = range(split.begin, parquet.num_row_groups if split.end is None else split.end)
        number = sum(parquet.metadata.row_group(group).num_rows for group in range(split.begin))
        columns = [column] if column in parquet.schema_arrow.names else None
        batches = parquet.iter_batches(ROWS, row_groups=groups, columns=columns)
        yield from _batch_rows(batches, split.file, "parquet", number, bad_rows)


def _arrow_rows(split: Split, column: str, bad_rows: BadRows) -> Iterator[Row]:
    import pyarrow as pa

    with open_file(split.file, seekable=True) as stream:
        with file_errors(split.file, lambda: "cannot be read as Arrow"):
            is_file = stream.read(6) == b"ARROW1"  # the other layout is a stream
            stream.seek(0)
            reader = pa.ipc.open_file(stream) if is_file else pa.ipc.open_stream(stream)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        if column in reader.schema.names:
            batches = (batch.select([column]) for batch in batches)
        yield from _batch_rows(batches, split.file, "Arrow", 0, bad_rows)


def _hub_rows(split: Split, column: str, bad_rows: BadRows) -> Iterator[Row]:
    dataset = load_hub(split.file)
    dataset = dataset.select(range(split.begin, len(dataset) if split.end is None else split.end))
    if column not in (dataset.column_names or []):
        yield from enumerate(dataset, start=split.begin)
    else:
        batches = dataset.select_columns([column]).with_format("arrow").iter(ROWS)
        yield from _batch_rows(batches, split.file, "a dataset", split.begin, bad_rows)


def _batch_rows(batches: Iterable[Any], file: str, format: str, number: int, bad_rows: BadRows) -> Iterator[Row]:
    """Yield the rows of Arrow batches, the first of which has the `number`."""
    with file_errors(file, lambda: f"cannot be read as {format} after row {number - 1}"):
        for batch in batches:
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError as error:
                if len(batch) > 1:
                    each = (batch.slice(index, 1) for index in range(len(batch)))
                    yield from _batch_rows(each, file, format, number, bad_rows)
                else:
                    bad_rows.add(f"{file}: row {number} cannot be read as {format}: {error}")
            else:
                yield from enumerate(rows, start=number)
            number += len(batch)
