"""Rows of tables: JSON lines, csv, parquet, Arrow, datasets.

split → table_rows → (number, fields); a row that cannot be read goes to `BadRows`
"""

import contextlib
import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mlmkit.errors import UserError
from mlmkit.hub import load_hub
from mlmkit.lines import BadRows, Lines, is_blank, place
from mlmkit.locations import Split, file_errors, open_file, open_parquet

ROWS = 1024  # of a parquet file or dataset, read at once
DELIMITERS = {"csv": ",", "tsv": "\t"}

Row = tuple[int, dict[str, Any]]  # number (a line of the split, or a row of the file) and fields


def unit(format: str) -> str:
    return "row" if format in ("parquet", "arrow", "hub", "grouped") else "line"


def nested_value(row: dict[str, Any], field: str) -> Any:
    """The value of a field. Unless a field has this very name, `a.b` is the field `b` in the field `a`, and `a.0` is
    the first entry of its list, or of its text separated by tabs. Raises `KeyError` if there is none.
    """
    value: Any = row
    for key in [field] if field in row else field.split("."):
        value = value.split("\t") if isinstance(value, str) else value
        if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        elif isinstance(value, dict) and key in value:
            value = value[key]
        else:
            raise KeyError(field)
    return value


def _column(names: Sequence[str], field: str) -> str:
    """The column that holds a field, or "" if there is none."""
    return next((name for name in (field, field.partition(".")[0]) if name in names), "")


def table_rows(split: Split, format: str, field: str, bad_rows: BadRows) -> Iterator[Row]:
    """Yield the rows of a split. Of Arrow data it reads only the column that holds `field`, if there is one."""
    if format == "jsonl":
        return _json_rows(split, bad_rows)
    if format in ("csv", "tsv"):
        return csv_rows(split, DELIMITERS[format], bad_rows)
    read = {"parquet": _parquet_rows, "arrow": _arrow_rows, "hub": _hub_rows}[format]
    return read(split, field, bad_rows)


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
    lines = Lines(split, bad_rows)
    for line, _ in lines:
        if is_blank(line):
            continue
        try:
            row = json_object(line)
        except ValueError as error:
            bad_rows.add(f"{place(split, lines.number, bad_rows)}{error}")
        else:
            yield lines.number, row


def csv_rows(split: Split, delimiter: str, bad_rows: BadRows, *, quoting: bool = True) -> Iterator[Row]:
    """Yield the rows under a header. Without `quoting`, a quotation mark is a character like any other."""
    csv.field_size_limit((1 << 31) - 1)  # process-wide; the default is 128 KiB, which a document may exceed
    lines = (f"{line}\n" for line, _ in Lines(split, bad_rows, keep_bad=True))
    style = csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE
    rows = csv.DictReader(lines, delimiter=delimiter, strict=True, quoting=style)
    with contextlib.suppress(csv.Error):  # reported with its line below
        names = [name for name in rows.fieldnames or () if name]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise UserError(f"{split.file}: two columns are called {min(repeated)!r}: rename one")
    while True:
        try:
            if (row := next(rows, None)) is None:
                return
            if None in row or None in row.values():
                raise csv.Error(f"it has {'more' if None in row else 'fewer'} fields than the header")
        except csv.Error as error:
            report = BadRows() if "end of data" in str(error) else bad_rows  # an open quote takes in all that follows
            advice = "quote texts that contain delimiters or line breaks, and double the quotes in them"
            report.add(f"{place(split, rows.reader.line_num, report)}: {error}: {advice}")
        else:
            yield rows.line_num, row


def _parquet_rows(split: Split, field: str, bad_rows: BadRows) -> Iterator[Row]:
    with open_parquet(split.file) as parquet:
        groups = range(split.begin, parquet.num_row_groups if split.end is None else split.end)
        number = sum(parquet.metadata.row_group(group).num_rows for group in range(split.begin))
        column = _column(parquet.schema_arrow.names, field)
        batches = parquet.iter_batches(ROWS, row_groups=groups, columns=[column] if column else None)
        yield from _batch_rows(batches, split.file, "parquet", number, bad_rows)


def _arrow_rows(split: Split, field: str, bad_rows: BadRows) -> Iterator[Row]:
    import pyarrow as pa

    with open_file(split.file, seekable=True) as stream:
        with file_errors(split.file, lambda: "cannot be read as Arrow"):
            is_file = stream.read(6) == b"ARROW1"  # the other layout is a stream
            stream.seek(0)
            reader = pa.ipc.open_file(stream) if is_file else pa.ipc.open_stream(stream)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        if column := _column(reader.schema.names, field):
            batches = (batch.select([column]) for batch in batches)
        yield from _batch_rows(batches, split.file, "Arrow", 0, bad_rows)


def _hub_rows(split: Split, field: str, bad_rows: BadRows) -> Iterator[Row]:
    dataset = load_hub(split.file)
    dataset = dataset.select(range(split.begin, len(dataset) if split.end is None else split.end))
    if column := _column(dataset.column_names or [], field):
        batches = dataset.select_columns([column]).with_format("arrow").iter(ROWS)
        yield from _batch_rows(batches, split.file, "a dataset", split.begin, bad_rows)
    else:
        yield from enumerate(dataset, start=split.begin)


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
