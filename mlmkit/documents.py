"""The documents of a source. A document is one text.

locations.split_files    source → splits
read_pieces              a split → texts; a very long line comes in pieces
read_texts               all splits → whole texts
read_documents           → the selected texts that are not blank
"""

import codecs
import csv
import io
import json
import logging
import math
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import dropwhile, groupby, repeat, takewhile
from typing import Any

from mlmkit.errors import UserError
from mlmkit.locations import Source, Split, file_errors, file_format, find_files, load_hub, open_file, open_parquet
from mlmkit.masking import document_key

log = logging.getLogger(__name__)

PIECE = 1 << 19  # characters of a text at most, of a line that comes in pieces; tokenising takes 190 bytes for each
BLOCK = PIECE // 2  # bytes read at once: what is left of one block and the next have at most PIECE characters
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

Row = tuple[int, dict[str, Any]]  # its line in the split, or its row in the file; and its fields


@dataclass
class BadRows:
    """What to do about rows that cannot be read: raise `UserError` for the first, or `skip` and count them."""

    policy: str = "error"
    count: int = 0
    first: str = ""

    def add(self, place: str, problem: str) -> None:
        """Report one. `place` says where it is."""
        if self.policy == "error":
            raise UserError(f"{place}{problem}")
        self.count += 1
        self.first = self.first or f"{place}{problem}"

    def warn(self, name: str) -> None:
        """Log how many of the text called `name` there were, if any."""
        if self.count:
            log.warning("%s: %d rows that cannot be read are left out, first %s", name, self.count, self.first)


def is_blank(text: str) -> bool:
    """Whether a text is empty or only white space, and so is not a document."""
    return not text or text.isspace()


def is_selected(key: int, keys: tuple[float, float]) -> bool:
    """Whether key / 2**64 lies in [begin, end). Exact: Python compares an integer with a float without rounding."""
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
    """Like `read_documents`, but keeps all texts, so that callers can count the blank ones.

    Rows that `source.on_bad_row` skips are counted in a warning at the end.
    """
    bad_rows = BadRows(source.on_bad_row)
    for file in find_files(source):
        parts: list[str] = []
        for piece, ends in read_pieces(source, Split(file), bad_rows):
            if ends and not parts:
                yield piece
                continue
            parts.append(piece)
            if ends:
                yield "".join(parts)
                parts = []
    bad_rows.warn(source.name)


def read_pieces(source: Source, split: Split, bad_rows: BadRows) -> Iterator[tuple[str, bool]]:
    """Yield the texts of a split in pieces: (piece, whether the text ends with it). Blank texts are included.

    A text is one piece, except that a line of a text file longer than `BLOCK` bytes may come in several, of at most
    `PIECE` characters each, so that memory does not grow with it. Texts come whole with `strip`, with `blank_line`, and
    if bad rows are skipped, as a text must be complete before it is known to be good.
    """
    if file_format(split.file, source.format)[0] != "text":
        texts = _row_texts(source, split, bad_rows)
    elif source.blank_line:
        texts = _blocks(split, bad_rows)
    elif source.strip or bad_rows.policy == "skip":
        texts = (line for _, lines, _ in _lines(split, bad_rows) for line in lines)
    else:
        return ((line, ends) for _, lines, ends in _lines(split, bad_rows, BLOCK) for line in lines)
    return zip(map(str.strip, texts) if source.strip else texts, repeat(True))


def _place(split: Split, number: int, unit: str = "line", bad_rows: BadRows | None = None) -> str:
    """Name a row in a message. A line is counted from the start of the file, unless bad rows are skipped.

    For a message that ends the command, the lines before the split are counted. To do so for every split that has a bad
    row would read a large file many times.
    """
    if unit == "line" and split.begin:
        if bad_rows and bad_rows.policy == "skip":
            return f"{split.file}: line {number} after byte {split.begin}"
        number += _lines_before(split)
    return f"{split.file}: {unit} {number}"


def _lines_before(split: Split) -> int:
    """The lines that begin before the split: LFs before the byte ahead of it, and the line in which that byte is."""
    count, left = 1, split.begin - 1
    with open_file(split.file) as stream, file_errors(split.file):
        while block := stream.read(min(BLOCK, left)):
            count, left = count + block.count(b"\n"), left - len(block)
    return count


# ---------------------------------------------------------------- lines of text


def _line_blocks(split: Split) -> Iterator[bytes]:
    """Yield the bytes of the lines that begin in the split, at most `BLOCK` at a time.

    A line begins at byte 0 or after a LF, so reading begins one byte before the split and drops all up to a LF. It goes
    on behind the split to the end of the last line.
    """
    position, is_inside = max(split.begin - 1, 0), split.begin == 0
    last = math.inf if split.end is None else split.end - 1  # where the last line begins at the latest
    with open_file(split.file) as stream:
        if position:
            stream.seek(position)
        while is_inside or position < last:
            is_last = position >= last
            block = stream.read(BLOCK if is_last else int(min(BLOCK, last - position)))
            if not block:
                return
            position += len(block)
            if not is_inside:
                start = block.find(b"\n") + 1
                block, is_inside = block[start:], start > 0
                if not is_inside:
                    continue
            if is_last and (stop := block.find(b"\n") + 1):
                yield block[:stop]
                return
            yield block


def _lines(
    split: Split, bad_rows: BadRows, longest: float = math.inf, *, keep_bad: bool = False
) -> Iterator[tuple[int, list[str], bool]]:
    """Yield lines of UTF-8 text in lists: (number of the first in the split, lines, whether the last is complete).

    They are split at LF only, one CR before it removed, a byte-order mark skipped. mask-v1 fixes this; `str.splitlines`
    splits differently. What is left of a line longer than `longest` bytes is cut: each piece is a list of its own. If
    bad rows are skipped, `keep_bad` keeps a line that is not UTF-8, with surrogates in place of the bad bytes.
    """
    number, offset, rest = 1, 0, bytearray()  # offset: bytes of the line that have been yielded
    decode = partial(_decoded, split, bad_rows, keep_bad)

    is_start = split.begin == 0
    with file_errors(split.file, lambda: f"cannot be read after line {number - 1}"):
        for block in _line_blocks(split):
            if is_start:
                _refuse_other_formats(split.file, block)
            rest += block.removeprefix(codecs.BOM_UTF8) if is_start else block
            is_start = False
            if b"\n" in block:
                end = rest.rfind(b"\n") + 1
                number += yield from decode(rest[:end], number, offset, ends=True)
                offset = 0
                del rest[:end]
            while len(rest) > longest:
                end = int(longest)
                while rest[end] & 0xC0 == 0x80 and end > 1:  # inside a code point
                    end -= 1
                yield from decode(rest[:end], number, offset, ends=False)
                offset += end
                del rest[:end]
    if rest:
        yield from decode(rest, number, offset, ends=True)


def _decoded(
    split: Split, bad_rows: BadRows, keep_bad: bool, data: bytearray, number: int, offset: int, *, ends: bool
) -> Generator[tuple[int, list[str], bool], None, int]:
    """Yield the lines in `data`, of which the last may have no LF, as `_lines` does. Returns how many there are."""
    try:
        lines = data.decode().replace("\r\n", "\n").split("\n")
        if not lines[-1]:
            lines.pop()
        yield number, lines, ends
        return len(lines)
    except UnicodeDecodeError:
        count = 0
    for line in io.BytesIO(data):
        text = line[:-1].removesuffix(b"\r") if line.endswith(b"\n") else line
        try:
            yield number + count, [text.decode()], ends
        except UnicodeDecodeError as error:
            if keep_bad and bad_rows.policy == "skip":
                yield number + count, [text.decode(errors="surrogateescape")], ends
            else:
                problem = f", byte {offset + error.start + 1} is not UTF-8 (0x{text[error.start]:02x}): "
                advice = "if it is a text file, convert it (for example iconv -f LATIN1 -t UTF-8)"
                bad_rows.add(_place(split, number + count, bad_rows=bad_rows), problem + advice)
        count, offset = count + 1, 0
    return count


def _refuse_other_formats(file: str, block: bytes) -> None:
    for beginning, kind, advice in NOT_UTF8:
        if re.match(beginning, block):
            raise UserError(f"{file} is {kind}, not UTF-8 text: {advice}")


def _numbered(split: Split, bad_rows: BadRows) -> Iterator[tuple[Split, int, str]]:
    for first, lines, _ in _lines(split, bad_rows, keep_bad=True):
        for number, line in enumerate(lines, start=first):
            yield split, number, line


def _blocks(split: Split, bad_rows: BadRows) -> Iterator[str]:
    """Yield the lines between blank lines, joined with LF.

    A block belongs to the split in which the blank line before it begins, so that no split has to look back.
    """
    lines = _numbered(split, bad_rows)
    if split.begin:
        lines = dropwhile(lambda line: not is_blank(line[2]), lines)
    if split.end is not None:
        lines = _with_end_of_block(lines, _numbered(Split(split.file, split.end), bad_rows))
    for blank, block in groupby(lines, key=lambda line: is_blank(line[2])):
        if not blank:
            first, *others = block
            text = "\n".join([first[2], *(line for _, _, line in others)])
            if bad_rows.policy == "skip" and (problem := _text_problem(text)):
                bad_rows.add(_place(first[0], first[1], bad_rows=bad_rows), f" and those up to a blank line: {problem}")
            else:
                yield text


def _with_end_of_block(lines: Iterator[Any], after: Iterator[Any]) -> Iterator[Any]:
    """The lines of a split, unless there are none, and those behind it up to a blank one."""
    line = None
    for line in lines:
        yield line
    if line is not None:
        yield from takewhile(lambda line: not is_blank(line[2]), after)


# ---------------------------------------------------------------- rows of tables


def read_rows(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row of the tables of a source: where it stands, for messages, and its fields.

    Raises `UserError`, naming the file and the row, for what cannot be read.
    """
    for split in map(Split, find_files(source)):
        format, _ = file_format(split.file, source.format)
        for number, row in _rows(split, format, "", BadRows()):
            yield _place(split, number, _unit(format)), row


def _unit(format: str) -> str:
    return "row" if format in ("parquet", "arrow", "hub") else "line"


def _row_texts(source: Source, split: Split, bad_rows: BadRows) -> Iterator[str]:
    field, format = source.text_field, file_format(split.file, source.format)[0]
    for number, row in _rows(split, format, field, bad_rows):
        if field in row and not (problem := _text_problem(row[field])):
            yield row[field]
        elif field in row:
            bad_rows.add(_place(split, number, _unit(format), bad_rows), f", field {field!r} {problem}")
        else:
            known = f" has no field {field!r} (it has {', '.join(row)})"
            advice = "name one with --text-field (in training data.text_field), or rename it"
            report = bad_rows if format == "jsonl" else BadRows()  # in the other formats it is missing in all rows
            report.add(_place(split, number, _unit(format), report), f"{known}: {advice}")


def _text_problem(value: object) -> str:
    """What keeps a value from being a text, or ""."""
    if not isinstance(value, str):
        return f"holds {type(value).__name__}, not text"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "holds half a surrogate pair or a byte that is not UTF-8, which is not valid Unicode"
    return ""


def checked_text(value: object, where: str) -> str:
    """Return the value if it is valid Unicode text. Raises `UserError`, saying `where` it stands, if not."""
    if problem := _text_problem(value):
        raise UserError(f"{where} {problem}")
    return str(value)


def _rows(split: Split, format: str, column: str, bad_rows: BadRows) -> Iterator[Row]:
    """Yield the rows of a split. Where the format has columns, it reads only `column`, if it has it."""
    match format:
        case "jsonl":
            return _json_rows(split, bad_rows)
        case "csv" | "tsv":
            return _csv_rows(split, "\t" if format == "tsv" else ",", bad_rows)
        case "parquet":
            return _parquet_rows(split, column, bad_rows)
        case "arrow":
            return _arrow_rows(split, column, bad_rows)
        case _:
            return _hub_rows(split, column, bad_rows)


def json_object(line: str) -> dict[str, Any]:
    """Parse a line. Raises `ValueError` that says what is wrong, to be put behind the line's place."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f" is not JSON: {error}: write one object per line") from None
    if not isinstance(row, dict):
        raise ValueError(" is not a JSON object: write one object per line")
    return row


def _json_rows(split: Split, bad_rows: BadRows) -> Iterator[Row]:
    for first, lines, _ in _lines(split, bad_rows):
        for number, line in enumerate(lines, start=first):
            if is_blank(line):
                continue
            try:
                row = json_object(line)
            except ValueError as error:
                bad_rows.add(_place(split, number, bad_rows=bad_rows), str(error))
            else:
                yield number, row


def _csv_rows(split: Split, delimiter: str, bad_rows: BadRows) -> Iterator[Row]:
    number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        for _, line_number, line in _numbered(split, bad_rows):
            number = line_number
            yield f"{line}\n"

    csv.field_size_limit((1 << 31) - 1)  # process-wide; the default is 128 KiB, which a document may exceed
    rows = csv.DictReader(lines(), delimiter=delimiter, strict=True)
    while True:
        try:
            if (row := next(rows, None)) is None:
                return
            if None in row or None in row.values():
                raise csv.Error(f"it has {'more' if None in row else 'fewer'} fields than the header")
        except csv.Error as error:
            report = BadRows() if "end of data" in str(error) else bad_rows  # an open quote takes in all other lines
            advice = "quote texts that contain delimiters or line breaks, and double the quotes in them"
            report.add(_place(split, number), f": {error}: {advice}")
        else:
            yield number, row


def _parquet_rows(split: Split, column: str, bad_rows: BadRows) -> Iterator[Row]:
    with open_parquet(split.file) as parquet:
        groups = range(split.begin, parquet.num_row_groups if split.end is None else split.end)
        number = sum(parquet.metadata.row_group(group).num_rows for group in range(split.begin))
        columns = [column] if column in parquet.schema_arrow.names else None
        batches = parquet.iter_batches(ROWS, row_groups=groups, columns=columns)
        yield from _batch_rows(batches, split.file, "parquet", number, bad_rows)


def _arrow_rows(split: Split, column: str, bad_rows: BadRows) -> Iterator[Row]:
    yield from _batch_rows(_arrow_batches(split.file, column), split.file, "Arrow", 0, bad_rows)


def _arrow_batches(file: str, column: str) -> Iterator[Any]:
    """Yield the record batches of an Arrow file or stream, with only `column`, if they have it."""
    import pyarrow as pa

    with open_file(file, seekable=True) as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_file:
            reader = pa.ipc.open_file(stream)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = reader = pa.ipc.open_stream(stream)
        has_column = column in reader.schema.names
        yield from (batch.select([column]) if has_column else batch for batch in batches)


def _hub_rows(split: Split, column: str, bad_rows: BadRows) -> Iterator[Row]:
    dataset = load_hub(split.file)
    dataset = dataset.select(range(split.begin, len(dataset) if split.end is None else split.end))
    if column not in (dataset.column_names or []):
        yield from enumerate(dataset, start=split.begin)
    else:
        batches = dataset.select_columns([column]).with_format("arrow").iter(ROWS)
        yield from _batch_rows(batches, split.file, "a dataset", split.begin, bad_rows)


def _batch_rows(batches: Iterator[Any], file: str, format: str, number: int, bad_rows: BadRows) -> Iterator[Row]:
    """Yield the rows of Arrow batches, the first of which has the `number`."""
    with file_errors(file, lambda: f"cannot be read as {format} after row {number - 1}"):
        for batch in batches:
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError:
                rows = [_one_row(batch, index) for index in range(len(batch))]
            for row in rows:
                if isinstance(row, dict):
                    yield number, row
                else:
                    bad_rows.add(f"{file}: row {number}", f" cannot be read as {format}: {row}")
                number += 1


def _one_row(batch: Any, index: int) -> Any:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return error
