"""Where text is: locations → files → splits, and files opened for reading.

Source.location    a file, folder, pattern, URL or hub dataset, or several of them
find_files         → the files, in an order that is the same on every machine
split_files        → parts of files of about equal size, each read on its own
open_file          → the bytes of a file, local or remote, decompressed
"""

import contextlib
import io
import logging
import lzma
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from glob import escape, glob, has_magic
from itertools import accumulate
from pathlib import Path
from typing import Any

from mlmkit.errors import UserError, first_line, require
from mlmkit.files import recorded_sha256
from mlmkit.hub import HUB, configurations, load_hub

log = logging.getLogger(__name__)

WEB = ("http://", "https://")  # a web server may not send parts of files, and does not say so
FORMATS = {".txt": "text", ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv"}
FORMATS |= {".parquet": "parquet", ".arrow": "arrow"}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
BAD_ROWS = ("error", "skip")
BUFFER = 1 << 18  # bytes; reading lines takes half the time it takes with Python's 8 KiB
PLAN = "plan.json"  # a folder that holds it is a tokenised corpus, or is about to be

EVERY_KEY = (0.0, 1.0)  # shares of 2**64

_say_once = cache(log.info)


@dataclass(frozen=True)
class Source:
    """Where documents come from, and how they are read.

    `location` is one of these, or several (a `Path` and a list are accepted):

    - a file: `.txt`, `.jsonl` (`.json`, `.ndjson`) with one object per line, `.csv` or `.tsv` with a header,
      `.parquet`, `.arrow`, each also compressed as `.gz`, `.bz2`, `.xz` or `.zst`. Any other file is text;
    - a folder: all files in it and its subfolders that have such a suffix;
    - a pattern such as `parts/*.jsonl.gz`; `**` stands for any folders;
    - a URL that fsspec can read: `s3://`, `gs://`, `https://` and others; also a folder or a pattern there;
    - `hub:NAME[:CONFIG][@SPLIT][#FILES]`, a dataset on the hub or in a local folder that `datasets` can read. FILES
      is a pattern that picks files of a split too large to fetch whole.

    `text_field` is the column or key that holds the text. With `blank_line`, blank lines separate the documents of a
    text file; otherwise each line is a document. `strip` removes the white space around each text. `format` (`text`,
    `jsonl`, `csv`, `tsv`, `parquet`, `arrow`) replaces what the suffixes say, except of a compression. `on_bad_row`:
    `error` or `skip` (counted and reported). `keys` selects the documents whose key / 2**64 lies in [begin, end).
    """

    location: str | tuple[str, ...]
    text_field: str = "text"
    blank_line: bool = False
    strip: bool = False
    format: str = ""
    on_bad_row: str = "error"
    keys: tuple[float, float] = EVERY_KEY

    def __post_init__(self) -> None:
        given: Any = self.location
        several = [given] if isinstance(given, str | os.PathLike) else given
        locations = tuple(os.fspath(location) for location in several)
        object.__setattr__(self, "location", locations[0] if len(locations) == 1 else locations)
        if self.format not in ("", *FORMATS.values()):
            raise UserError(f"no format {self.format!r}: choose {', '.join(dict.fromkeys(FORMATS.values()))}")
        if self.on_bad_row not in BAD_ROWS:
            raise UserError(f"on_bad_row is {self.on_bad_row!r}: choose {' or '.join(BAD_ROWS)}")

    @property
    def locations(self) -> tuple[str, ...]:
        """All locations."""
        return (self.location,) if isinstance(self.location, str) else self.location

    @property
    def name(self) -> str:
        """What messages call it: the first location, and how many more there are."""
        first, more = self.locations[0], len(self.locations) - 1
        name = f"{first} and {more} more" if more else first
        return name if self.keys == EVERY_KEY else f"{name} ({self.keys[1] - self.keys[0]:g} of it)"


@dataclass(frozen=True)
class Split:
    """A part of a file. `begin` and `end` (exclusive; None is the end of the file) count the units of its format.

    These are bytes of an uncompressed text or JSON-lines file, row groups of a parquet file, rows of a hub dataset. A
    document belongs to the split in which it begins. Other files are one split.
    """

    file: str
    begin: int = 0
    end: int | None = None


# ---------------------------------------------------------------- files


def find_files(source: Source) -> list[str]:
    """Return the paths, URLs and hub datasets of the locations: location by location, each sorted.

    Raises `UserError` for a location without files, a file that cannot be read, and one that is named twice.
    """
    files = [file for location in source.locations for file in _files_at(location)]
    seen: set[str] = set()
    for file in files:
        if file != file.encode(errors="replace").decode():
            raise UserError(f"{file!a}: the name of this file is not UTF-8: rename it")
        real = file if file.startswith(HUB) or is_remote(file) else os.path.realpath(file)
        if real in seen:  # also through a symbolic link
            raise UserError(f"{source.name} contains {file} twice: name it once")
        seen.add(real)
    return files


def _files_at(location: str) -> list[str]:
    if location.startswith(HUB):
        return configurations(location)
    if is_remote(location):
        return _remote_files(location)
    path = Path(location)
    if path.is_dir():
        if is_tokens(location):
            raise UserError(f"{location} is a tokenised corpus, not text: name the text that it was made from")
        return readable_files(location, _matching(str(Path(escape(location), "**"))))
    if not has_magic(location) or path.exists():
        existing_file(location)
        return [location]
    if files := _matching(location):
        return files
    raise UserError(f"{location}: no file matches this pattern")


def _matching(pattern: str) -> list[str]:
    """The files, without hidden ones. (`Path.glob` takes these, and no absolute pattern.)"""
    return [file for file in sorted(glob(pattern, recursive=True)) if Path(file).is_file()]  # noqa: PTH207


def readable_files(folder: str, files: Sequence[str]) -> list[str]:
    """The files of a folder or archive that have a known suffix. The others are logged.

    Raises `UserError` if there are none.
    """
    known = [file for file in files if _suffixes(file)[0] in FORMATS]
    if not known:
        raise UserError(
            f"{folder} has no file to read ({', '.join(FORMATS)}, or one of these with {', '.join(COMPRESSIONS)}): "
            "rename text files with another suffix, or name them by a pattern, such as FOLDER/*"
        )
    if others := sorted({*files} - {*known}):
        _say_once(f"{folder}: files with another suffix are left out ({len(others)}, the first: {others[0]})")
    return known


def location_exists(path: Path) -> bool:
    """Whether there is such a file or folder, or a file that matches this pattern."""
    return path.exists() or bool(_matching(str(path)))


def existing_file(location: str) -> Path:
    """Return the path. Raises `UserError` if it is missing, a folder, or unreadable."""
    path = Path(location)
    if path.is_dir():
        raise UserError(f"{location} is a folder: name a file in it")
    if not path.exists():
        raise UserError(f"{location}: no such file (name a hub dataset as {HUB}NAME)")
    if not os.access(path, os.R_OK):
        raise UserError(f"{location}: no permission to read it")
    return path


def is_tokens(location: str | Sequence[str]) -> bool:
    """Whether a location is the folder of a tokenised corpus."""
    return isinstance(location, str) and Path(location, PLAN).is_file()


def file_format(file: str, given: str = "") -> tuple[str, str]:
    """Return the format of a file, by its suffix unless `given`, and its compression, or "".

    A dataset has the format hub. Another suffix means text.
    """
    if file.startswith(HUB):
        return "hub", ""
    suffix, compression = _suffixes(file)
    return given or FORMATS.get(suffix, "text"), COMPRESSIONS.get(compression, "")


def formats(source: Source) -> set[str]:
    """The formats of the files, which need not exist. A tokenised corpus has none."""
    files: list[str] = []
    for location in source.locations:
        if not is_tokens(location):
            here = _matching(location) if has_magic(location) else []
            files += here or (_files_at(location) if Path(location).is_dir() else [location])
    return {file_format(file, source.format)[0] for file in files}


def _suffixes(file: str) -> tuple[str, str]:
    """The suffix that says the format, and that of the compression, or ""."""
    path = file.partition("?")[0] if is_remote(file) else file
    inner, outer = ["", "", *(suffix.lower() for suffix in Path(path).suffixes)][-2:]
    return (inner, outer) if outer in COMPRESSIONS else (outer, "")


def last_part(location: str) -> str:
    """A location fit to publish: without its folders, and without the query of a URL, which may be a key."""
    return location if location.startswith(HUB) else Path(location.partition("?")[0]).name


def name_stem(file: str) -> str:
    """The name of a file without the suffixes of its format and compression."""
    path = Path(file)
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).stem


def content_identities(files: Sequence[str]) -> list[str]:
    """Return what changes with the content of each file: its SHA-256, or its `file_state`, if it is not local.

    Raises `UserError` for a file that cannot be read, or is a pipe, which can be read once only.
    """
    local = [file for file in files if not (file.startswith(HUB) or is_remote(file))]
    for file in local:
        if not existing_file(file).is_file():
            raise UserError(f"{file} is a pipe, which can be read once only: save its content to a file")
    hashes = dict(zip(local, recorded_sha256([Path(file) for file in local]), strict=True))
    return [hashes.get(file) or " ".join(map(str, file_state(file))) for file in files]


def file_state(file: str) -> list[Any]:
    """Return the size of a file in bytes, 0 if it is unknown, and what changes when it is written again."""
    if file.startswith(HUB):
        return [0, load_hub(file)._fingerprint]
    if is_remote(file):
        file_system, path = _file_system(file)
        with file_errors(file):
            return [file_system.size(path) or 0, f"{file_system.checksum(path):x}"]
    stat = existing_file(file).stat()
    return [stat.st_size, stat.st_mtime_ns]


# ---------------------------------------------------------------- splits


def split_files(source: Source, size: int) -> list[Split]:
    """Cut the files into splits of about `size` bytes, where their format allows it."""
    return [split for file in find_files(source) for split in split_file(file, source, size)]


def split_file(file: str, source: Source, size: int) -> list[Split]:
    """Cut one of the source's files into splits of about `size` bytes, where its format allows it."""
    begins: Sequence[int] = ()
    format, compression = file_format(file, source.format)
    if format in ("text", "jsonl") and not compression and not file.startswith(WEB):
        begins = range(0, file_state(file)[0], size)
    elif format == "parquet":
        with open_parquet(file) as parquet:
            groups = [parquet.metadata.row_group(group).total_byte_size for group in range(parquet.num_row_groups)]
        numbers = [total // size for total in accumulate(groups, initial=0)]  # of the split in which a group begins
        begins = [group for group in range(len(groups)) if not group or numbers[group] > numbers[group - 1]]
    elif format == "hub":
        dataset = load_hub(file)
        begins = range(0, len(dataset), max(size * len(dataset) // max(dataset.data.nbytes, 1), 1))
    begins = begins or [0]
    return [Split(file, begin, end) for begin, end in zip(begins, [*begins[1:], None], strict=True)]


# ---------------------------------------------------------------- reading bytes


@contextlib.contextmanager
def file_errors(file: str, problem: Callable[[], str] = lambda: "cannot be read") -> Iterator[None]:
    """Turn any error into a one-line `UserError`: file systems and decompressors raise many kinds."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except Exception as error:
        raise UserError(f"{file}: {problem()}: {first_line(error)}") from None


@contextlib.contextmanager
def open_file(file: str, *, seekable: bool = False) -> Iterator[io.BufferedReader]:
    """Open a file for reading, decompressed as its suffix says; `seekable` unpacks it to a temporary file.

    Raises `UserError` if it cannot be opened. Reading from it may raise any error: see `file_errors`.
    """
    with contextlib.ExitStack() as stack:
        with file_errors(file):
            if is_remote(file):
                file_system, path = _file_system(file)
                options = {"block_size": 0} if file.startswith(WEB) and not seekable else {}  # 0: from the beginning
                stream: Any = stack.enter_context(io.BufferedReader(file_system.open(path, "rb", **options), BUFFER))
            else:
                stream = stack.enter_context(existing_file(file).open("rb", BUFFER))
            if compression := file_format(file)[1]:
                stream = stack.enter_context(_decompressed(stream, compression))
                if seekable:
                    packed, stream = stream, stack.enter_context(tempfile.TemporaryFile())
                    shutil.copyfileobj(packed, stream)
                    stream.seek(0)
        yield stream


def _decompressed(stream: io.BufferedReader, compression: str) -> io.BufferedReader:
    import pyarrow as pa

    if not stream.peek(1):
        raise EOFError("it is empty, which no archive is")
    if compression == "xz":  # pyarrow has no xz
        return io.BufferedReader(lzma.LZMAFile(stream), BUFFER)
    return io.BufferedReader(pa.CompressedInputStream(stream, compression), BUFFER)  # pyright: ignore


@contextlib.contextmanager
def open_parquet(file: str) -> Iterator[Any]:
    """Open a `pyarrow.parquet.ParquetFile`. Raises `UserError` for another file."""
    import pyarrow.parquet as pq

    with open_file(file, seekable=True) as stream:
        with file_errors(file, lambda: "cannot be read as parquet"):
            parquet = pq.ParquetFile(stream)
        yield parquet


# ---------------------------------------------------------------- remote files


def is_remote(location: str) -> bool:
    """Whether a location is a URL."""
    return re.match(r"[A-Za-z][\w+.-]*://", location) is not None


def _file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path on it. Raises `UserError` that names a missing package."""
    require("train", "fsspec")
    from fsspec.core import url_to_fs

    with file_errors(url):
        return url_to_fs(url)


def _remote_files(url: str) -> list[str]:
    """The files at a URL: a pattern with `*`, a folder, which ends in / or has no known suffix, or a file."""
    file_system, path = _file_system(url)
    with file_errors(url):
        if "*" in path:
            entries = file_system.glob(path, detail=True).items()
            found = sorted(name for name, entry in entries if entry["type"] == "file")
            if not found:
                raise UserError(f"{url}: no file matches this pattern")
        elif url.endswith("/") or (_suffixes(url)[0] not in FORMATS and file_system.isdir(path)):
            found = readable_files(
                url, sorted(name for name in file_system.find(path) if "/." not in name[len(path) :])
            )
        else:
            return [url]
        return [file_system.unstrip_protocol(name) for name in found]
