"""Locations → files → splits → texts."""

import bz2
import csv
import gzip
import json
import lzma
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import PORTUGUESE
from hypothesis import given
from hypothesis import strategies as st

from mlmkit.documents import PIECE, BadRows, read_documents, read_pieces, read_texts
from mlmkit.errors import UserError
from mlmkit.locations import Source, Split, split_files


def read(location: Path | str, **options) -> list[str]:
    return list(read_documents(Source(location, **options)))


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
        (tmp_path / "empty", "is a folder without a file to read"),
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
        assert len(piece) <= PIECE
        parts.append(piece)
        if ends:
            texts.append("".join(parts))
            parts = []
    assert not parts
    return texts


@given(
    lines=LINES,
    size=st.integers(1, 40),
    block=st.integers(4, 9),
    crlf=st.booleans(),
    mark=st.booleans(),
    final=st.booleans(),
    blank_line=st.booleans(),
)
def test_the_splits_of_a_text_are_the_whole_text(tmp_path_factory, lines, size, block, crlf, mark, final, blank_line):
    newline = "\r\n" if crlf else "\n"
    text = ("\ufeff" if mark else "") + newline.join(lines) + (newline if final else "")
    path = write(tmp_path_factory.getbasetemp() / "ranges.txt", text.encode())
    source = Source(path, blank_line=blank_line)
    expected = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]
    expected[-1] = text.removeprefix("\ufeff").split("\n")[-1]
    if not expected[-1]:
        expected.pop()
    if blank_line:
        groups = groupby(expected, key=lambda line: not line.strip())
        expected = ["\n".join(group) for blank, group in groups if not blank]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlmkit.documents.BLOCK", block)
        assert list(read_texts(source)) == expected
        splits = split_files(source, size)
        assert [text for split in splits for text in pieces(source, split)] == expected
    assert len(splits) == max(-(-len(path.read_bytes()) // size), 1)
