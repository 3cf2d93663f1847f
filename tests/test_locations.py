"""Locations → files → splits → texts."""

import asyncio
import bz2
import csv
import gzip
import io
import json
import lzma
import re
import threading
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web as web_server
from conftest import PORTUGUESE
from hypothesis import given
from hypothesis import strategies as st

from mlmkit import lines
from mlmkit.documents import is_selected, read_documents, read_pieces, read_texts
from mlmkit.errors import UserError
from mlmkit.lines import BadRows
from mlmkit.locations import FORMATS, Source, Split, content_identities, find_files, is_tokens, split_files


def text_at(location: Any, **options: Any) -> Source:
    """A `Source`, which also takes a `Path` or a list, though its type says what it holds."""
    return Source(location, **options)


def read(location: Any, **options: Any) -> list[str]:
    return list(read_documents(text_at(location, **options)))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_lines_split_at_lf_alone_and_blocks_at_blank_lines(tmp_path):
    content = "one\r\n\ntwo\u2028still two\x0cand still\n \t\n  three  \nlast\r".encode()
    assert read(write(tmp_path / "a.txt", content)) == ["one", "two\u2028still two\x0cand still", "  three  ", "last\r"]
    path = write(tmp_path / "a.txt", b"\n\none\ntwo\n \nthree\r\nfour\n\n\n")
    assert read(path, blank_line=True) == ["one\ntwo", "three\nfour"]


def test_every_kind_of_table_gives_the_same_documents(tmp_path):
    texts = [*PORTUGUESE, 'line one\nline two, "quoted"', "   ", "", "long " * 30_000]
    jsonl = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"body": text}) for text in texts).encode() + b"\n\n")
    pq.write_table(pa.table({"body": texts, "n": range(len(texts))}), tmp_path / "a.parquet")
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(jsonl.read_bytes())
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([["n", "body"], *enumerate(texts)])
    expected = [text for text in texts if text.strip()]
    for name in ("a.jsonl", "a.csv", "a.tsv", "a.parquet"):
        assert read(tmp_path / name, text_field="body") == expected
        upper = write(tmp_path / name.upper(), (tmp_path / name).read_bytes())
        assert read(upper, text_field="body") == expected
    assert read(f"hub:{folder}@train", text_field="body") == expected


def test_a_field_may_be_in_a_nested_row(tmp_path):
    rows = [{"meta": {"n": i, "body": {"raw": text}}, "x": 1} for i, text in enumerate(PORTUGUESE)]
    write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)).encode())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    (tmp_path / "dataset").mkdir()
    write(tmp_path / "dataset/train.jsonl", (tmp_path / "a.jsonl").read_bytes())
    tables = [tmp_path / name for name in ("a.jsonl", "a.parquet", "a.arrow")]
    for location in (*tables, f"hub:{tmp_path}/dataset@train"):
        assert read(location, text_field="meta.body.raw") == [*PORTUGUESE]
    for field in ("meta.raw", "x.raw", "meta.body.raw.x", "text.raw"):
        with pytest.raises(UserError, match=f"has no field '{field}'"):
            read(tmp_path / "a.parquet", text_field=field)
    dotted = write(tmp_path / "b.jsonl", b'{"a.b": "one", "a": {"b": "two"}}\n{"a": {"b": "three"}}\n{"a": null}\n')
    assert read(dotted, text_field="a.b", on_bad_row="skip") == ["one", "three"]
    pq.write_table(pa.Table.from_pylist([{"a": None}, {"a": {"b": "one"}}]), tmp_path / "c.parquet")
    assert read(tmp_path / "c.parquet", text_field="a.b", on_bad_row="skip") == ["one"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, name):
    lines = {"a.txt": "one\n\ufefftwo\n", "a.jsonl": '{"text": "one"}\n', "a.csv": "text\none\n"}[name]
    plain, marked = (write(tmp_path / f"{mark}{name}", mark.encode() + lines.encode()) for mark in ("", "\ufeff"))
    assert read(marked) == read(plain)
    assert read(plain)[0] == "one"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\nbad \xff byte\n", "line 2, byte 5 is not UTF-8.*iconv"),
        ("a.txt", b"\x89PNG\r\n\x1a\n\0\0", "byte 1 is not UTF-8 .0x89.: if it is a text file"),
        ("a.txt", "texto".encode("utf-16"), "UTF-16.*iconv -f UTF-16"),
        ("a.txt", "texto".encode("utf-32"), "UTF-32.*iconv -f UTF-32"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "a"}\n', "line 1 has no field 'text' .it has body.*--text-field .*data.text_field"),
        ("a.json", b'[{"text": "a"}]\n', "line 1 is not a JSON object: write one object per line"),
        ("a.jsonl", b'{"text": 3}\n', "holds int, not text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "surrogate"),
        ("a.jsonl", b"[" * 100_000, "is not JSON"),
        ("a.parquet", b"no parquet", "cannot be read as parquet"),
        ("a.csv", b"a,b\nc,d\n", "line 2 has no field 'text' .it has a, b."),
        ("a.csv", b"n,text\n1,a\n2\n", "line 3: it has fewer fields than the header: quote texts"),
        ("a.csv", b"text\na, b\n", "line 2: it has more fields than the header: quote texts"),
        ("a.csv", b'text\n"a" b\n', "line 2: .* expected after .*double the quotes in them"),
        ("a.tsv", b'text\n"a\nb\n', "line 3: unexpected end of data"),
        ("a.txt", gzip.compress(b"text", mtime=0), "is gzip, not UTF-8 text: give it the suffix .gz"),
        ("a.jsonl", bz2.compress(b"text"), "is bzip2, not"),
        ("a", lzma.compress(b"text"), "is xz, not"),
        ("a.txt", bytes(257) + b"ustar", "is a tar archive, not"),
        ("a.csv", b"\x28\xb5\x2f\xfd\0", "is zstd, not"),
        ("a.zip", b"PK\x03\x04\0", "is a zip archive, not .*unzip"),
        ("a", b"%PDF-1.7\n%\xe2", "is a PDF, not"),
        ("a.txt", b"PAR1\x15\x04", "is parquet, not .*suffix .parquet"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as raised:
        read(write(tmp_path / name, content))
    assert str(raised.value).startswith(str(tmp_path / name))


def test_what_begins_like_another_format_is_text(tmp_path):
    texts = ["BZh is a country code", "PAR1 is a receptor", "PK starts", "%PDF- is how they begin", "ARROW1"]
    for text in texts:
        assert read(write(tmp_path / "a.txt", text.encode())) == [text]


def test_damaged_parquet_is_named(tmp_path):
    pq.write_table(pa.table({"text": ["a" * 5000] * 3}), tmp_path / "a.parquet", use_dictionary=False)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[40:90] = b"\xff" * 50
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read(write(tmp_path / "a.parquet", bytes(content)))
    binary = pa.array([b"\xff\xfe"], pa.binary())
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 1, binary.buffers())}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read(tmp_path / "b.parquet")


def test_missing_column_folder_and_file_are_named(tmp_path):
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"row 0 has no field 'text' .it has body."):
        read(tmp_path / "a.parquet")
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "empty", "has no file to read"),
        (tmp_path / "none.txt", "no such file"),
        (tmp_path / "*.txt", "no file matches"),
        (f"hub:{tmp_path / 'none'}", "cannot be loaded"),
    ):
        with pytest.raises(UserError, match=message):
            read(path)


# ------------------------------------------------------------------ splits

LINES = st.lists(st.sampled_from(["", " ", "a", "bc", "é", "日本語", "😀😀", "\u2003", "a\rb", "\r"]), max_size=12)


def pieces(source: Source, split: Split) -> list[str]:
    """The texts of a split, put together from their pieces."""
    texts, parts = [], []
    for piece, ends in read_pieces(source, split, BadRows()):
        assert len(piece) <= lines.PIECE or source.blank_line
        parts.append(piece)
        if ends:
            texts.append("".join(parts))
            parts = []
    assert not parts
    return texts


@given(
    lines=LINES,
    size=st.integers(1, 40),
    block=st.integers(8, 15),
    crlf=st.booleans(),
    mark=st.booleans(),
    final=st.booleans(),
    blank_line=st.booleans(),
)
def test_the_splits_of_a_text_are_the_whole_text(tmp_path_factory, lines, size, block, crlf, mark, final, blank_line):
    newline = "\r\n" if crlf else "\n"
    text = ("\ufeff" if mark else "") + newline.join(lines) + (newline if final else "")
    path = write(tmp_path_factory.getbasetemp() / "ranges.txt", text.encode())
    source = text_at(path, blank_line=blank_line)
    expected = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]
    expected[-1] = text.removeprefix("\ufeff").split("\n")[-1]
    if not expected[-1]:
        expected.pop()
    if blank_line:
        groups = groupby(expected, key=lambda line: not line.strip())
        expected = ["\n".join(group) for blank, group in groups if not blank]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlmkit.lines.PIECE", block)
        assert list(read_texts(source)) == expected
        splits = split_files(source, size)
        assert [text for split in splits for text in pieces(source, split)] == expected
    assert len(splits) == max(-(-len(path.read_bytes()) // size), 1)


# ------------------------------------------------------------------ formats and compressions

TEXTS = ["one", "dois, três", "  ", "", "日本語 text", "x" * 3000]
PACK = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": partial(lzma.compress, preset=0),
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


def arrow_bytes(layout, texts: list[str]) -> bytes:
    table, sink = pa.table({"n": range(len(texts)), "text": texts}), pa.BufferOutputStream()
    with layout(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def table_bytes(suffix: str, texts: list[str]) -> bytes:
    """A file with these texts in its field `text`."""
    if suffix == ".arrow":
        return arrow_bytes(pa.ipc.new_stream, texts)
    if suffix == ".parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"n": range(len(texts)), "text": texts}), sink, row_group_size=2)
        return sink.getvalue().to_pybytes()
    if suffix in (".csv", ".tsv"):
        file = io.StringIO()
        csv.writer(file, delimiter="," if suffix == ".csv" else "\t").writerows([["n", "text"], *enumerate(texts)])
        return file.getvalue().encode()
    if suffix == ".txt":
        return "".join(f"{text}\n" for text in texts).encode()
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_is_read_plain_and_compressed(tmp_path, suffix, compression):
    content = table_bytes(suffix, TEXTS)
    path = write(tmp_path / f"a{suffix}{compression}", PACK[compression](content))
    assert list(read_texts(text_at(path))) == TEXTS
    other = write(tmp_path / f"a.dat{compression}", path.read_bytes())
    assert list(read_texts(text_at(other, format=FORMATS[suffix]))) == TEXTS


def test_an_arrow_file_is_read_as_a_stream_is(tmp_path):
    path = write(tmp_path / "a.arrow", arrow_bytes(pa.ipc.new_file, TEXTS))
    assert list(read_texts(text_at(path))) == TEXTS
    for size in (10, len(path.read_bytes()) - 9):
        with pytest.raises(UserError, match=r"a\.arrow: cannot be read as Arrow"):
            read(write(tmp_path / "a.arrow", path.read_bytes()[:size]))


@pytest.mark.parametrize("policy", ["error", "skip"])
@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_a_damaged_archive_is_an_error(tmp_path, compression, policy):
    lines = "".join(f"{number} {number * 7919 % 65537}\n" for number in range(200_000))
    whole = PACK[compression](lines.encode())
    broken = [] if compression == ".zst" else [(whole[:-9] + bytes(9), "cannot be read after line")]  # no checksum
    for content, message in (
        *broken,
        (whole[: len(whole) // 2], r"cannot be read after line \d{4,}: "),
        (whole[:-1], r"cannot be read after line \d{4,}: "),
        (whole[:3], "cannot be read after line 0: "),
        (b"", "cannot be read: it is empty, which no archive is"),
        (b"plain text\n", "cannot be read after line 0: "),
    ):
        path = write(tmp_path / f"a.txt{compression}", content)
        with pytest.raises(UserError, match=rf"^{path}: {message}"):
            read(path, on_bad_row=policy)
    parquet = PACK[compression](table_bytes(".parquet", TEXTS))
    with pytest.raises(UserError, match=r"a\.parquet\.\w+: cannot be read"):
        read(write(tmp_path / f"a.parquet{compression}", parquet[:-20]))


def test_archives_of_several_members_are_read_whole(tmp_path):
    for compression, pack in PACK.items():
        path = write(tmp_path / f"a.txt{compression}", pack(b"one\ntw") + pack(b"o\n") + pack(b"three"))
        assert read(path) == ["one", "two", "three"]


# ------------------------------------------------------------------ locations


@pytest.fixture
def corpus_folder(tmp_path) -> Path:
    """Text in several formats and folders, and what is no text."""
    folder = tmp_path / "corpus"
    for name, texts in {
        "b.txt": ["b"],
        "a.jsonl.gz": ["a1", "a2"],
        "sub/c.parquet": ["c"],
        "sub/d.csv.zst": ["d"],
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        suffixes = [*path.suffixes, ""]
        path.write_bytes(PACK[suffixes[1]](table_bytes(suffixes[0], texts)))
    for name in ("README.md", "sub/image.png", ".hidden.txt", ".git/x.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no text\n")
    return folder


def test_a_folder_is_all_files_in_it_that_can_be_read(corpus_folder, caplog):
    caplog.set_level("INFO")
    assert read(corpus_folder) == ["a1", "a2", "b", "c", "d"]
    assert read(f"{corpus_folder}/") == ["a1", "a2", "b", "c", "d"]
    left_out = [message for message in caplog.messages if message.startswith(f"{corpus_folder}: ")]
    assert left_out == [
        f"{corpus_folder}: files with another suffix are left out (2, the first: {corpus_folder}/README.md)"
    ]
    (corpus_folder / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="corpus is a tokenised corpus, not text"):
        read(corpus_folder)
    assert is_tokens(str(corpus_folder)) and not is_tokens(str(corpus_folder / "sub"))


def test_a_pattern_is_the_files_that_match(corpus_folder):
    assert read(corpus_folder / "*.txt") == ["b"]
    assert read(corpus_folder / "**" / "*.[pj][as]*") == ["a1", "a2", "c"]
    assert read(corpus_folder / "README.*") == ["no text"]
    literal = write(corpus_folder / "[x].txt", b"literal\n")
    assert read(literal) == ["literal"]


def test_several_locations_are_read_in_their_order(corpus_folder):
    source = text_at([corpus_folder / "b.txt", str(corpus_folder / "sub")])
    assert source == text_at((str(corpus_folder / "b.txt"), str(corpus_folder / "sub"))) and hash(source)
    assert list(read_documents(source)) == ["b", "c", "d"]
    assert source.name == f"{corpus_folder}/b.txt and 1 more"
    assert text_at([corpus_folder]) == text_at(str(corpus_folder))
    with pytest.raises(UserError, match=r"contains .*b\.txt twice"):
        find_files(text_at([corpus_folder / "b.txt", corpus_folder]))


@pytest.mark.parametrize("options", [{"format": "yaml"}, {"on_bad_row": "ignore"}])
def test_unknown_options_are_refused(options):
    with pytest.raises(UserError, match=r"(format|on_bad_row) .*: choose "):
        Source("a.txt", **options)


# ------------------------------------------------------------------ bad rows

BAD = [
    ("a.txt", b"one\n\xff\nthree\n", ["one", "three"], "line 2, byte 1 is not UTF-8"),
    (
        "a.jsonl",
        b'{"text": "one"}\n{"te\n[]\n{"body": 1}\n{"text": 3}\n{"text": "\\ud800"}\n\xff\n',
        ["one"],
        "line 2 is not",
    ),
    ("a.csv", b'n,text\n1,one\n2\n3,"a" b\n4,four\n5,\xff\n\xff,six\n', ["one", "four", "six"], "line 3: it has fewer"),
]


@pytest.mark.parametrize(("name", "content", "expected", "first"), BAD)
@pytest.mark.parametrize("compression", ["", ".gz"])
def test_bad_rows_are_skipped_and_counted(tmp_path, caplog, name, content, expected, first, compression):
    path = write(tmp_path / f"{name}{compression}", PACK[compression](content))
    with pytest.raises(UserError, match=first):
        read(path)
    assert read(path, on_bad_row="skip") == expected
    count = 6 if name == "a.jsonl" else 3 if name == "a.csv" else 1
    (message,) = caplog.messages
    assert message.startswith(f"{path}: {count} rows that cannot be read are left out, the first: {path}: {first}")


def test_what_is_wrong_with_all_rows_is_an_error_even_if_bad_rows_are_skipped(tmp_path):
    for name, content, message in (
        ("a.csv", b"a,b\nc,d\n", "has no field 'text'"),
        ("b.csv", b'text\none\n"two\nthree\n', "line 4: unexpected end of data"),
        ("c.parquet", b"no parquet", "cannot be read as parquet"),
        ("d.txt", gzip.compress(b"text"), "is gzip"),
    ):
        with pytest.raises(UserError, match=message):
            read(write(tmp_path / name, content), on_bad_row="skip")


def test_a_block_with_a_bad_line_is_skipped_whole(tmp_path):
    path = write(tmp_path / "a.txt", b"one\n\ntwo\n\xff\nthree\n\nfour\n")
    assert read(path, blank_line=True, on_bad_row="skip") == ["one", "four"]
    with pytest.raises(UserError, match="line 4, byte 1"):
        read(path, blank_line=True)


def test_a_bad_row_of_a_parquet_file_is_named_and_skipped(tmp_path):
    values = [b"one", b"\xff\xfe", b"three"]
    binary = pa.array(values, pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 3, binary.buffers())})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", on_bad_row="skip") == ["one", "three"]
    with pytest.raises(UserError, match="row 1 cannot be read as parquet: 'utf-8' codec"):
        read(tmp_path / "a.parquet")


# ------------------------------------------------------------------ splits of other files, and where an error is


def test_the_splits_of_tables_are_the_whole_table(tmp_path):
    texts = [f"text {number}" for number in range(1000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=64, use_dictionary=False)
    write(tmp_path / "a.jsonl", table_bytes(".jsonl", texts))
    folder = tmp_path / "dataset"
    folder.mkdir()
    pq.write_table(pa.table({"text": texts}), folder / "train.parquet")
    for location, size, at_least in (
        (tmp_path / "a.parquet", 3000, 5),
        (tmp_path / "a.jsonl", 777, 20),
        (f"hub:{folder}", 4000, 3),
    ):
        source = text_at(location)
        splits = split_files(source, size)
        assert len(splits) >= at_least
        assert [text for split in splits for text in pieces(source, split)] == texts
        assert split_files(source, 1 << 40) == [Split(str(location))]
    assert split_files(text_at(write(tmp_path / "a.txt.gz", gzip.compress(b"a\n" * 99))), 10) == [
        Split(f"{tmp_path}/a.txt.gz")
    ]


@pytest.mark.parametrize("blank_line", [False, True])
def test_an_error_in_a_split_names_the_line_of_the_file(tmp_path, blank_line):
    content = b"good line\n\n" * 50 + b"bad \xff\n\n" + b"good line\n\n" * 50
    source = text_at(write(tmp_path / "a.txt", content), blank_line=blank_line)
    failed = 0
    for split in split_files(source, 40):
        try:
            pieces(source, split)
        except UserError as error:
            assert f"{tmp_path}/a.txt: line 101, byte 5 is not UTF-8" in str(error)
            failed += 1
    assert failed
    skipped = [BadRows("skip") for _ in split_files(source, 40)]
    for split, bad_rows in zip(split_files(source, 40), skipped, strict=True):
        list(read_pieces(source, split, bad_rows))
    assert sum(bad_rows.count for bad_rows in skipped) == 1
    assert any("after byte" in bad_rows.first for bad_rows in skipped)


def test_a_long_line_comes_in_pieces(tmp_path):
    line = "é日😀a\r" * 600_000  # 3 M characters, 6.6 MB
    source = text_at(write(tmp_path / "a.txt", f"one\r\n{line}\r\nlast".encode()))
    read_in = list(read_pieces(source, Split(str(tmp_path / "a.txt")), BadRows()))
    assert len(read_in) > 6 and max(len(piece) for piece, _ in read_in) <= lines.PIECE
    assert pieces(source, Split(str(tmp_path / "a.txt"))) == list(read_texts(source)) == ["one", line, "last"]
    bad = write(tmp_path / "b.txt", b"one\n" + b"a" * 3_000_000 + b"\xff\nthree\n")
    with pytest.raises(UserError, match="line 2, byte 3000001 is not UTF-8"):
        read(bad)
    assert read(bad, on_bad_row="skip") == ["one", "three"]


# ------------------------------------------------------------------ selection by key


def test_keys_divide_the_documents(tmp_path):
    texts = [f"text {number}" for number in range(2000)]
    path = write(tmp_path / "a.txt", "\n".join(texts).encode())
    held_out, training = read(path, keys=(0.0, 0.1)), read(path, keys=(0.1, 1.0))
    assert sorted(held_out + training) == sorted(texts)
    assert 150 < len(held_out) < 250
    assert [text for text in texts if text in set(held_out)] == held_out


def test_selection_is_exact():
    for share in (0.1, 0.005, 1 / 3):
        border = int(Fraction(share) * 2**64)
        assert is_selected(border - 1, (0.0, share)) and not is_selected(border + 1, (0.0, share))
        assert is_selected(border + 1, (share, 1.0)) and not is_selected(border - 1, (share, 1.0))
    assert is_selected(2**64 - 1, (0.5, 1.0)) and is_selected(0, (0.0, 1e-19))


# ------------------------------------------------------------------ remote


@pytest.fixture
def memory():
    file_system = fsspec.filesystem("memory")
    for name, content in {
        "bucket/a.txt": b"one\ntwo\n",
        "bucket/sub/b.jsonl.gz": gzip.compress(b'{"text": "three"}\n'),
        "bucket/README.md": b"x",
        "bucket/.hidden/c.txt": b"x",
    }.items():
        file_system.pipe_file(f"/{name}", content)
    yield file_system
    file_system.rm("/bucket", recursive=True)


def test_remote_files_folders_and_patterns(memory):
    assert read("memory://bucket/a.txt") == ["one", "two"]
    for folder in ("memory://bucket", "memory://bucket/"):
        assert read(folder) == ["one", "two", "three"]
    assert read("memory://bucket/**/*.gz") == ["three"]
    source = Source("memory://bucket/a.txt")
    assert [pieces(source, split) for split in split_files(source, 3)] == [["one"], ["two"], []]
    before = content_identities(["memory://bucket/a.txt"])
    assert content_identities(["memory://bucket/a.txt"]) == before
    memory.pipe_file("/bucket/a.txt", b"one\ntwx\n")
    assert content_identities(["memory://bucket/a.txt"]) != before


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("memory://bucket/none.txt", "none.txt: no such file"),
        ("memory://bucket/*.csv", "no file matches"),
        ("s3://bucket/a.txt", "Install s3fs"),
        ("nowhere://bucket/a.txt", "Protocol not known: nowhere"),
    ],
)
def test_remote_mistakes_are_named(memory, location, message):
    with pytest.raises(UserError, match=rf"^{re.escape(location)}: .*{message}|{message}"):
        read(location)


@pytest.fixture(params=["with ranges", "without"])
def web(request, tmp_path):
    """A web server of `tmp_path`, which can send parts of files or not."""
    if request.param == "without":
        handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()
        return
    loop, application = asyncio.new_event_loop(), web_server.Application()
    application.add_routes([web_server.static("/", tmp_path, show_index=True)])
    runner = web_server.AppRunner(application)
    loop.run_until_complete(runner.setup())
    site = web_server.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.run_until_complete(runner.cleanup())
    loop.close()


def test_files_on_a_web_server(tmp_path, web):
    write(tmp_path / "a.txt", b"one\ntwo\n")
    write(tmp_path / "b.jsonl.zst", PACK[".zst"](b'{"text": "three"}\n'))
    assert read(f"{web}/a.txt") == ["one", "two"]
    assert read(f"{web}/b.jsonl.zst?download=true") == ["three"]
    assert read(f"{web}/*.txt") == ["one", "two"]
    assert read(f"{web}/") == ["one", "two", "three"]
    assert content_identities([f"{web}/a.txt"]) == content_identities([f"{web}/a.txt"])
    assert split_files(Source(f"{web}/a.txt"), 4) == [Split(f"{web}/a.txt")]
    large = [f"{number} {'x' * 90}" for number in range(80_000)]  # 7.6 MB; fsspec asks for ranges of 5 MiB
    write(tmp_path / "large.txt", "\n".join(large).encode())
    assert read(f"{web}/large.txt") == large
    with pytest.raises(UserError, match=r"none\.txt: no such file"):
        read(f"{web}/none.txt")
    write(tmp_path / "c.parquet", table_bytes(".parquet", ["four"] * 9))
    assert read(f"{web}/c.parquet") == ["four"] * 9
