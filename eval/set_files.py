"""The rows of a set's files: tables, and zips of JSON lines."""

import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlmkit.documents import read_rows
from mlmkit.errors import UserError
from mlmkit.lines import is_blank
from mlmkit.locations import Source, formats
from mlmkit.tables import json_object

LARGEST_UNPACKED = 256 << 20  # bytes, of a zip; BLiMP has 27 MB


def set_rows(location: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a `.jsonl`, `.csv`, `.tsv` or `.parquet` file, a `.zip` of `.jsonl` files, or `hub:...`.

    In a hub location, `*` stands for every configuration. A row is where it stands, for messages, and its fields.
    Raises `UserError` for a file that cannot be read.
    """
    if Path(location).suffix.lower() == ".zip":
        return _zip_rows(location)
    if "text" in formats(Source(location)):
        raise UserError(f"{location}: items are read from .jsonl, .csv, .tsv, .parquet, .arrow and .zip files")
    return read_rows(Source(location))


def _zip_rows(location: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with zipfile.ZipFile(location) as archive:
            if sum(member.file_size for member in archive.infolist()) > LARGEST_UNPACKED:
                raise ValueError(f"more than {LARGEST_UNPACKED >> 20} MiB when unpacked")
            for name in sorted(archive.namelist()):
                if name.lower().endswith(".jsonl") and not name.startswith("__MACOSX"):
                    with io.TextIOWrapper(archive.open(name), encoding="utf-8-sig", newline="\n") as lines:
                        for number, line in enumerate(lines, start=1):
                            if not is_blank(line):
                                yield _parsed(line, f"{location}/{name}: line {number}")
    # RuntimeError: encrypted, or compressed in a way that Python does not support
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, EOFError, OSError, ValueError) as error:
        cause = str(error) or type(error).__name__
        raise UserError(f"{location}: cannot be read: {cause}: unpack it, and name the .jsonl file in it") from None


def _parsed(line: str, where: str) -> tuple[str, dict[str, Any]]:
    try:
        return where, json_object(line)
    except ValueError as error:
        raise UserError(f"{where}{error}") from None
