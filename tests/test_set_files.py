"""Own sets: a declaration and its files → items."""

import dataclasses
import gzip
import json
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlmkit.errors import UserError
from mlmkit.eval.correlation import Correlation
from mlmkit.eval.items import ChoiceColumns, ClozeColumns, Item
from mlmkit.eval.set_files import FileReading, set_rows
from mlmkit.eval.sets import EvalSet, PairReading, Reference, TextReading, find_set

PAGE = Path(__file__).parent.parent / "docs/own-sets.md"

ROWS = [{"sentence_good": f"She sees {i}.", "sentence_bad": f"She see {i}."} for i in range(3)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = b"sentence_good,sentence_bad\n" + b"".join(b"She sees %d.,She see %d.\n" % (i, i) for i in range(3))
TWOS = "".join(f"{row['sentence_bad']}\n{row['sentence_good']}\n" for row in ROWS).encode()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def zipped(path: Path, files: Mapping[str, bytes], kind: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def items_of(folder: Path, local: str, tables: str = "") -> list[Item]:
    declared = write(folder / "set.toml", f'name = "own"\ntask = "pairs"\nlocal = "{local}"\n{tables}')
    return find_set(str(declared)).items()


def texts(items: list[Item]) -> list[tuple[str, ...]]:
    return [tuple(option.text for option in item.options) for item in items]


EXPECTED = [(row["sentence_good"], row["sentence_bad"]) for row in ROWS]
BAD_FIRST = '[files]\nformat = "alternating"\nfirst = "bad"\n'


def test_lines_in_twos_from_a_zip_a_folder_and_a_pattern(tmp_path):
    """As Zorro comes: a file per paradigm, the bad line first, and phenomena that the names of the files begin with."""
    names = ("agreement-simple", "agreement-question", "binding.v2", "island")
    zipped(tmp_path / "zorro.zip", {f"sentences/{name}.txt": TWOS for name in names} | {"__MACOSX/._a.txt": b"\xff"})
    for name in names:
        write(tmp_path / "zorro" / f"{name}.txt", TWOS + b"\n")
    write(tmp_path / "zorro/island.txt.gz", gzip.compress(TWOS))
    (tmp_path / "zorro/island.txt").unlink()
    groups = '[pairs]\nparadigm = "file"\n[phenomena]\nagreement = ["agreement-*"]\nother = ["island"]\n'
    for local in ("zorro.zip", "zorro", "zorro/*", "zor*.zip"):
        items = items_of(tmp_path, local, BAD_FIRST + groups)
        assert texts(items) == EXPECTED * 4
        assert [item.paradigm for item in items[::3]] == sorted(names)
        assert [item.phenomenon for item in items[::3]] == ["agreement", "agreement", "", "other"]
    (first, second), *_ = texts(items_of(tmp_path, "zorro.zip", '[files]\nformat = "alternating"\n'))
    assert (second, first) == EXPECTED[0]


def test_all_tables_of_a_zip_are_read(tmp_path, caplog):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "e.parquet")
    tables = {
        "a.jsonl": JSONL,
        "B.CSV": CSV,
        "c.json": JSONL,
        "d.tsv": CSV.replace(b",", b"\t"),
        "f/g.csv.gz": gzip.compress(CSV),
    }
    tables["e.parquet"] = (tmp_path / "e.parquet").read_bytes()
    others = {
        "README.md": b"Read me.",
        "notes.txt": b"One\nTwo\n",
        "inner.zip": zipped(tmp_path / "i.zip", {"a.csv": CSV}).read_bytes(),
    }
    caplog.set_level("INFO", "mlmkit")
    items = items_of(tmp_path, zipped(tmp_path / "all.zip", tables | others).name, '[pairs]\nparadigm = "file"\n')
    assert texts(items) == EXPECTED * len(tables)
    assert sorted({item.paradigm for item in items}) == ["B", "a", "c", "d", "e", "g"]
    said = "\n".join(caplog.messages)
    assert "all.zip: text files are left out (1, the first: " in said and "all.zip/notes.txt)" in said
    assert "files with another suffix are left out (2, the first: " in said
    assert str(tmp_path) in said and f"{tempfile.gettempdir()}/tmp" not in said.replace(str(tmp_path), "")


def test_suffixes_in_capitals_and_a_column_called_file(tmp_path):
    write(tmp_path / "Q.TSV", b"sentence_good\tsentence_bad\tfile\nShe sees.\tShe see.\town\n")
    zipped(tmp_path / "Q.ZIP", {"A.JSONL": JSONL})
    assert [item.paradigm for item in items_of(tmp_path, "Q.TSV", '[pairs]\nparadigm = "file"\n')] == ["own"]
    assert [item.paradigm for item in items_of(tmp_path, "Q.ZIP", '[pairs]\nparadigm = "file"\n')] == ["A"] * 3
    assert len(find_set(str(tmp_path / "Q.TSV"), pairs=True).items()) == 1


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text(",,sentence_good,sentence_bad,sentence_bad\n0,1,a,b,c\n")
    with pytest.raises(UserError, match=r"a\.csv: two columns are called 'sentence_bad'"):
        list(set_rows(str(tmp_path / "a.csv")))


def test_a_quotation_mark_that_begins_a_tsv_field_is_never_read_in_silence(tmp_path):
    write(tmp_path / "a.tsv", 'sentence_good\tsentence_bad\n"She sees," he "said".\tShe\n"He is."\tHe "be"\n')
    with pytest.raises(UserError, match=r"a\.tsv: line 2: a field begins .* \(quoting = true\) .* \(quoting = false\)"):
        items_of(tmp_path, "a.tsv")
    assert texts(items_of(tmp_path, "a.tsv", "[files]\nquoting = false\n")) == [
        ('"She sees," he "said".', "She"),
        ('"He is."', 'He "be"'),
    ]
    write(tmp_path / "a.tsv", 'sentence_good\tsentence_bad\na\t"b\n""c"""\n')
    with pytest.raises(UserError, match="line 2: a field begins"):
        items_of(tmp_path, "a.tsv")
    assert texts(items_of(tmp_path, "a.tsv", "[files]\nquoting = true\n")) == [("a", 'b\n"c"')]


def test_delimiters_and_encodings(tmp_path):
    content = "sentence_good;sentence_bad\nÀ tarde, ela vê;À tarde, ela vem\n"
    for name, encoding in (("a.csv", "latin-1"), ("b.csv", "utf-16"), ("c.csv", "utf-8-sig")):
        write(tmp_path / name, content.encode(encoding))
        tables = f'[files]\ndelimiter = ";"\nencoding = "{encoding}"\n'
        assert texts(items_of(tmp_path, name, tables)) == [("À tarde, ela vê", "À tarde, ela vem")]
    with pytest.raises(UserError, match=r"a\.csv: line 2, byte 1 is not UTF-8"):
        items_of(tmp_path, "a.csv", '[files]\ndelimiter = ";"\n')
    with pytest.raises(UserError, match=rf"^{tmp_path}/a\.csv: cannot be read as ascii: "):
        items_of(tmp_path, "a.csv", '[files]\ndelimiter = ";"\nencoding = "ascii"\n')
    write(tmp_path / "d.dat", "sentence_good|sentence_bad\na|b\n")
    assert texts(items_of(tmp_path, "d.dat", '[files]\nformat = "csv"\ndelimiter = "|"\n')) == [("a", "b")]


@pytest.mark.parametrize(
    ("name", "tables", "message"),
    [
        ("a.csv", 'first = "bad"', r"a\.csv: files\.first has no effect on csv: leave it out"),
        ("a.csv", 'first = "worse"', "files.first must be one of good, bad, not 'worse'"),
        ("a.csv", 'format = "xml"', "files.format must be one of jsonl, .*alternating"),
        ("a.csv", 'delimiter = ", "', "files.delimiter must be one character"),
        ("a.csv", 'encoding = "latin-9000"', "files.encoding must be an encoding that Python knows"),
        ("a.csv", "quotes = true", "unknown setting .*files.quotes"),
        ("a.jsonl", 'delimiter = ";"', "files.delimiter has no effect on jsonl"),
        ("a.jsonl", "quoting = false", "files.quoting has no effect on jsonl"),
        ("a.parquet", 'encoding = "latin-1"', "files.encoding has no effect on parquet"),
        ("a.txt", "", r"a\.txt is text: items are read from .*alternating"),
        ("odd.txt", 'format = "alternating"', r"odd\.txt: no second line follows 'c': every pair needs two lines"),
        ("gap.txt", 'format = "alternating"', r"gap\.txt: no second line follows 'a'"),
        ("a.csv", 'format = "parquet"', r"a\.csv: cannot be read as parquet"),
        ("empty.zip", "", r"empty\.zip has no file to read"),
        ("texts.zip", "", r"texts\.zip/a\.txt is text"),
        ("bad.zip", "", r"bad\.zip/b\.csv: line 2: it has more fields"),
        ("none*.csv", "", r"has no none\*\.csv beside its declaration"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, name, tables, message):
    for table, content in {
        "a.csv": CSV,
        "a.jsonl": JSONL,
        "a.txt": TWOS,
        "odd.txt": "a\nb\nc",
        "gap.txt": "a\n\nb\n",
    }.items():
        write(tmp_path / table, content)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    zipped(tmp_path / "empty.zip", {"README": b"", "folder/": b""})
    zipped(tmp_path / "texts.zip", {"a.txt": TWOS})
    zipped(tmp_path / "bad.zip", {"a.csv": CSV, "b.csv": b"sentence_good,sentence_bad\na,b,c\n"})
    with pytest.raises(UserError, match=message) as raised:
        items_of(tmp_path, name, f"[files]\n{tables}\n" if tables else "")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            '[pairs]\nparadigm = "file"\n[phenomena]\nx = ["b*"]\n',
            r"phenomena\.x: no paradigm is called 'b\*': there are a",
        ),
        ('[pairs]\nparadigm = "file"\n[phenomena]\nx = ["a"]\ny = ["a*"]\n', "'a' is in two phenomena, x and y"),
        ('[phenomena]\nx = ["a"]\n', r"set\.toml: \[phenomena\] needs pairs\.paradigm"),
        ('[pairs]\nparadigm = "file"\nphenomenon = "file"\n[phenomena]\nx = ["a"]\n', "phenomenon .*exclude"),
    ],
)
def test_phenomena_that_fit_nothing_are_refused(tmp_path, tables, message):
    write(tmp_path / "a.csv", CSV)
    with pytest.raises(UserError, match=message):
        items_of(tmp_path, "a.csv", tables)


def test_files_and_phenomena_are_for_items(tmp_path):
    for table in ("[files]\nformat = 'csv'", "[phenomena]\nx = 'y'"):
        declared = write(tmp_path / "set.toml", f'name = "own"\ntask = "text"\nlocal = "a"\n{table}\n')
        with pytest.raises(UserError, match="has no effect, because its task is 'text'"):
            find_set(str(declared))
    declared = write(tmp_path / "set.toml", 'name = "own"\ntask = "pairs"\nhub = "hub:x"\n[files]\nformat = "csv"\n')
    with pytest.raises(UserError, match=r"\[files\] has no effect, because the set has no local"):
        find_set(str(declared))


def test_every_key_of_a_declaration_is_documented():
    page = PAGE.read_text(encoding="utf-8")
    kinds = (EvalSet, TextReading, PairReading, ChoiceColumns, ClozeColumns, FileReading, Correlation, Reference)
    keys = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    rows = [line.split("|")[1] for line in page.partition("## Every key")[2].splitlines() if line.startswith("| `")]
    documented = {key for row in rows for key in row.replace("`", "").replace(",", "").split()}
    assert documented <= keys
    assert {f"[{key}]" in page for key in keys - documented} == {True}
