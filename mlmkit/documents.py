"""The documents of a source. A document is one text.

locations.split_files    source → splits
read_pieces              a split → texts; a very long line comes in pieces
read_texts               all files → whole texts
read_documents           → the selected texts that are not blank
"""

from collections.abc import Iterable, Iterator
from itertools import dropwhile, groupby, repeat, takewhile

from mlmkit.errors import UserError
from mlmkit.lines import BadRows, Line, Lines, is_blank, numbered_lines, place
from mlmkit.locations import EVERY_KEY, Source, Split, file_format, find_files
from mlmkit.masking import document_key
from mlmkit.tables import nested_value, table_rows, unit


def is_selected(key: int, keys: tuple[float, float]) -> bool:
    """Whether key / 2**64 lies in [begin, end). Exact, as Python compares an integer with a float without rounding."""
    begin, end = keys
    return begin * 2.0**64 <= key < end * 2.0**64


def no_documents(source: Source) -> UserError:
    """The error for a source without documents, with the reason."""
    begin, end = source.keys
    if (begin, end) == EVERY_KEY:
        reason = "it is empty or blank"
    elif begin:
        reason = f"data.held_out = {begin:g} takes all documents: lower it, or name a held-out text"
    else:
        reason = f"data.held_out = {end:g} takes none of its documents: raise it, or name a held-out text"
    return UserError(f"{source.name}: no documents in it ({reason})")


def read_documents(source: Source) -> Iterator[str]:
    """Yield the selected documents in order, without blank texts.

    Raises `UserError`, naming the file and the line, for what cannot be read as text.
    """
    texts = (text for text in read_texts(source) if not is_blank(text))
    if source.keys == EVERY_KEY:
        return texts
    return (text for text in texts if is_selected(document_key(text), source.keys))


def read_texts(source: Source) -> Iterator[str]:
    """Yield all texts, whole, whatever their key. Blank ones are kept, so that callers can count them.

    Rows that are skipped are counted in a warning at the end.
    """
    bad_rows = BadRows(source.on_bad_row)
    for split in map(Split, find_files(source)):
        pieces = read_pieces(source, split, bad_rows)
        for piece, ends in pieces:
            yield piece if ends else "".join([piece, *until_end(pieces)])
    bad_rows.warn(source.name)


def until_end(pieces: Iterator[tuple[str, bool]]) -> Iterator[str]:
    """Yield the pieces up to the end of the text that they are in."""
    for text, ends in pieces:
        yield text
        if ends:
            return


def read_pieces(source: Source, split: Split, bad_rows: BadRows) -> Iterator[tuple[str, bool]]:
    """Yield the texts of a split, blank ones too, in pieces: (piece, whether the text ends with it).

    A text is one piece, except that a line of a text file longer than `lines.PIECE` bytes comes in several, so that
    memory does not grow with it. Texts come whole with `strip`, with `blank_line`, and when bad rows are skipped,
    because a text must be complete before it is known to be good.
    """
    if file_format(split.file, source.format)[0] != "text":
        texts = _row_texts(source, split, bad_rows)
    elif source.blank_line:
        texts = _blocks(split, bad_rows)
    else:
        is_whole = source.strip or bad_rows.policy == "skip"
        lines = iter(Lines(split, bad_rows, in_pieces=not is_whole))
        if not source.strip:
            return lines
        texts = (line for line, _ in lines)
    return zip(map(str.strip, texts) if source.strip else texts, repeat(True))


# ---------------------------------------------------------------- blocks of lines


def _has_text(line: Line) -> bool:
    return not is_blank(line[2])


def _blocks(split: Split, bad_rows: BadRows) -> Iterator[str]:
    """Yield the lines between blank lines, joined with LF.

    A block belongs to the split in which the blank line before it begins, so that no split has to look back.
    """
    lines = numbered_lines(split, bad_rows)
    if split.begin:
        lines = dropwhile(_has_text, lines)
    if split.end is not None:
        lines = _with_end_of_block(lines, numbered_lines(Split(split.file, split.end), bad_rows))
    for has_text, block in groupby(lines, key=_has_text):
        if has_text:
            (where, number, text), *others = block
            text = "\n".join([text, *(line for _, _, line in others)])
            if bad_rows.policy == "skip" and (problem := _text_problem(text)):
                bad_rows.add(f"{place(where, number, bad_rows)} and those up to a blank line: {problem}")
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


def _row_texts(source: Source, split: Split, bad_rows: BadRows) -> Iterator[str]:
    field, format = source.text_field, file_format(split.file, source.format)[0]
    for number, row in table_rows(split, format, field, bad_rows):
        report = bad_rows
        try:
            text = nested_value(row, field)
        except KeyError:
            problem = f" has no field {field!r} (it has {', '.join(row)})"
            problem += ": name one with --text-field (in training data.text_field), or rename it"
            if {"sentence_good", "sentence_bad"} <= row.keys():
                problem += "; these are pairs, which --metric pairs measures"
            may_vary = format == "jsonl" or field.partition(".")[0] in row  # else no row has it
            report = bad_rows if may_vary else BadRows()
        else:
            if not (problem := _text_problem(text)):
                yield text
                continue
            problem = f", field {field!r} {problem}"
        report.add(place(split, number, report, unit(format)) + problem)


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
