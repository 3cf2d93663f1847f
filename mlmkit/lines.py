"""Lines of UTF-8 text, as mask-v1 defines them, and what happens to those that cannot be read.

split → Lines → (text, whether the line ends with it); a very long line comes in pieces
"""

import codecs
import io
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from mlmkit.errors import UserError
from mlmkit.locations import Split, file_errors, open_file

log = logging.getLogger(__name__)
_warn_once = cache(log.warning)

PIECE = 1 << 19  # characters of a piece at most; tokenising takes up to 190 bytes of memory for each
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

Line = tuple[Split, int, str]  # where it is, its number there, and its text


@dataclass
class BadRows:
    """Rows that cannot be read: `error` raises `UserError` for the first, `skip` counts them."""

    policy: str = "error"
    count: int = 0
    first: str = ""

    def add(self, message: str) -> None:
        """Report a row that cannot be read."""
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


def place(split: Split, number: int, bad_rows: BadRows, unit: str = "line") -> str:
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
class Lines:
    """The lines of UTF-8 text that begin in the split: (text, whether the line ends with it), and their `number` in it.

    They are split at LF only, one CR before it removed, a byte-order mark skipped. mask-v1 fixes this; `str.splitlines`
    splits differently. With `in_pieces`, a line longer than `PIECE` bytes comes in several. When bad rows are skipped,
    `keep_bad` keeps a line that is not UTF-8, with surrogates in place of the bad bytes.
    """

    split: Split
    bad_rows: BadRows
    in_pieces: bool = False
    keep_bad: bool = False
    number: int = 0

    def __iter__(self) -> Iterator[tuple[str, bool]]:
        file, end = self.split.file, self.split.end or math.inf
        longest = PIECE - 4 if self.in_pieces else -1  # a code point has at most 4 bytes
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
        where = f"{place(self.split, self.number, self.bad_rows)}, {byte}"
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


def numbered_lines(split: Split, bad_rows: BadRows) -> Iterator[Line]:
    lines = Lines(split, bad_rows, keep_bad=True)
    return ((split, lines.number, line) for line, _ in lines)
