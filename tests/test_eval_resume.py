"""Evaluations that are killed, resumed, shared between ranks, and bounded in memory."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import paragraphs, run
from hypothesis import given
from hypothesis import strategies as st
from interruptions import run_two_ranks, start_rank

from mlmkit.backends import Backend, load
from mlmkit.corpus import Corpus
from mlmkit.errors import CheckError, UserError
from mlmkit.eval import results_store
from mlmkit.eval.api import evaluate
from mlmkit.eval.data import cut_parts
from mlmkit.eval.results_store import ResultsStore
from mlmkit.eval.statistics import Bootstrap
from mlmkit.locations import Source

TIMES = ("date", "seconds", "timing", "command", "checksum")


def without_times(folder: Path) -> dict[str, object]:
    result = json.loads((folder / "result.json").read_text())
    return {key: value for key, value in result.items() if key not in TIMES}


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A few dozen documents."""
    path = tmp_path / "source.txt"
    path.write_text("".join(f"{line}\n" for line in paragraphs()[:40]), encoding="utf-8")
    return Source(str(path))


@pytest.fixture
def model(artifact) -> Backend:
    return load(str(artifact("bert")))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_parts, "__defaults__", (600.0,))


class Interrupted:
    """A backend that is interrupted after a number of batches."""

    def __init__(self, backend, batches: int) -> None:
        self.inner, self.left = backend, batches
        self.name, self.device, self.info, self.tokenizer = "onnx", "cpu", backend.info, backend.tokenizer
        self.manifest = backend.manifest

    def score(self, batch):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.inner.score(batch)


def interrupt(model, batches: int, source: Source, folder: Path, **options: Any) -> None:
    """Evaluate until the model has scored some batches."""
    with pytest.raises(KeyboardInterrupt):
        evaluate(Interrupted(model, batches), source, output=folder, batch_tokens=300, **options)


def same_tables(first: Path, second: Path) -> bool:
    tables = [[pq.read_table(each / f"{name}.parquet") for name in ("tokens", "documents")] for each in (first, second)]
    return tables[0] == tables[1]


def test_an_interrupted_evaluation_resumes_and_ends_the_same(model, source, tmp_path, small_parts, caplog):
    caplog.set_level("INFO", logger="mlmkit")
    options = {"metrics": ("masked", "pseudo"), "pseudo_sample": 0.2, "mask_seed": (0, 7), "batch_tokens": 300}
    evaluate(model, source, output=tmp_path / "whole", **options)
    broken = Interrupted(model, 0)
    parts = [0]
    while True:
        broken.left = 40
        try:
            evaluate(broken, source, output=tmp_path / "cut", **options)
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "cut" / "result.json").exists()
            parts.append(len(list((tmp_path / "cut" / "parts").glob("*.parquet"))))
            assert parts[-1] > parts[-2]  # finished parts stay
    assert len(parts) > 3
    cut = tmp_path / "cut"
    resumed = [f"{cut}: resuming, {count} parts of the text are scored already" for count in parts[1:]]
    assert [message for message in caplog.messages if message.startswith(str(cut))] == resumed
    assert without_times(tmp_path / "cut") == without_times(tmp_path / "whole")
    assert same_tables(tmp_path / "cut", tmp_path / "whole")
    names = ["documents.parquet", "result.json", "tokens.parquet"]
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == names
    broken.left = 0  # a finished evaluation is not done again
    evaluate(broken, source, output=tmp_path / "cut", **options)
    assert caplog.messages[-1] == f"{cut} is finished: nothing to evaluate"


def test_another_evaluation_does_not_resume_it(model, artifact, source, tmp_path, small_parts):
    interrupt(model, 12, source, tmp_path / "cut")
    with pytest.raises(UserError, match=r"another masking: .*--overwrite"):
        evaluate(model, source, output=tmp_path / "cut", mask_seed=1)
    with pytest.raises(UserError, match="another model"):
        evaluate(load(str(artifact("modernbert")), "onnx"), source, output=tmp_path / "cut")
    replaced = evaluate(model, source, output=tmp_path / "cut", mask_seed=1, overwrite=True)
    assert replaced.result["masking"]["seed"] == 1


def test_nothing_is_left_behind_by_a_mistake(model, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes(b"good\n\xe9\n")
    for name, message in (("empty.txt", "no documents"), ("latin.txt", "not UTF-8")):
        with pytest.raises(UserError, match=message):
            evaluate(model, Source(str(tmp_path / name)), output=tmp_path / "result")
        assert not (tmp_path / "result").exists()


def test_a_missing_or_damaged_part_is_scored_again(model, source, tmp_path, small_parts):
    interrupt(model, 14, source, tmp_path / "cut")
    first, missing, *_ = sorted((tmp_path / "cut" / "parts").glob("*.parquet"))
    first.write_bytes(first.read_bytes()[:100])  # cut short
    interrupt(model, 6, source, tmp_path / "cut")
    content = bytearray(first.read_bytes())
    content[40:60] = bytes(20)  # noticed by its checksum
    first.write_bytes(content)
    missing.unlink()
    (tmp_path / "cut" / "parts" / "masked-0-0000001.4711").write_bytes(b"half a file")
    evaluate(model, source, output=tmp_path / "cut")
    evaluate(model, source, output=tmp_path / "whole")
    assert without_times(tmp_path / "cut") == without_times(tmp_path / "whole")


def cut_small_parts() -> None:
    """In a process of its own, as `small_parts` does here."""
    cut_parts.__defaults__ = (600.0,)


OPTIONS = ("--metric", "masked", "--metric", "pseudo", "--pseudo-sample", "0.1", "--mask-seeds", "0,1", "--json")


def test_kill_minus_nine(artifact, text_file, tmp_path, small_parts, capsys):
    """SIGKILL as soon as there is a part, then the same command."""
    arguments = ["eval", str(artifact("bert")), "--set", str(text_file), *OPTIONS, "--batch-tokens", "300", "--output"]
    killed = tmp_path / "killed"
    process = start_rank(tmp_path / "log", [*arguments, str(killed)], before=cut_small_parts)
    deadline = time.monotonic() + 120
    while not list(killed.glob("parts/*.parquet")):
        assert process.is_alive() and time.monotonic() < deadline, (tmp_path / "log.err").read_text()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert list(killed.glob("parts/*.parquet")) and not (killed / "result.json").exists()
    for folder in (killed, tmp_path / "whole"):
        assert run(capsys, *arguments, folder)[0] == 0
    assert without_times(killed) == without_times(tmp_path / "whole")
    assert same_tables(killed, tmp_path / "whole")


@pytest.mark.parametrize("kind", ["checkpoint", "artifact"])
def test_two_ranks_give_what_one_gives(kind, checkpoint, artifact, source, tmp_path, small_parts, capsys):
    model = checkpoint("bert") if kind == "checkpoint" else artifact("bert")
    arguments = ["eval", str(model), "--set", str(source.location), *OPTIONS, "--output"]
    two = run_two_ranks(tmp_path / "log", [*arguments, str(tmp_path / "two")], before=cut_small_parts)
    code, one, err = run(capsys, *arguments, tmp_path / "one")
    assert code == 0, err
    assert json.loads(two)["metrics"] == json.loads(one)["metrics"]  # printed once, by one rank
    assert without_times(tmp_path / "two") == without_times(tmp_path / "one")
    assert same_tables(tmp_path / "one", tmp_path / "two")


# ------------------------------------------------------------------ parts


def corpus_of(lengths: list[int]) -> Corpus:
    """Documents of these lengths whose tokens are numbered through."""
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    ids = np.arange(int(starts[-1]))
    documents = np.arange(len(lengths))
    return Corpus(ids, ids.astype(np.int32), starts, documents.astype(np.uint64), np.tile(documents[:, None], 4))


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=60),
    st.lists(st.integers(1, 20), min_size=1, max_size=10),
    st.integers(1, 200),
)
def test_parts_cover_the_corpus_whatever_the_blocks(lengths, block_sizes, budget):
    corpus = corpus_of(lengths)

    def blocks(sizes):
        begin, number = 0, 0
        while begin < len(corpus):
            end = min(begin + sizes[number % len(sizes)], len(corpus))
            yield corpus.part(begin, end)
            begin, number = end, number + 1

    def cost(lengths):
        return lengths.astype(np.float64) ** 2 / 7

    parts = list(cut_parts(blocks(block_sizes), cost, budget))
    assert [part.index for part in parts] == list(range(len(parts)))
    assert parts[0].first_document == 0
    assert [part.end_document for part in parts[:-1]] == [part.first_document for part in parts[1:]]
    assert parts[-1].end_document == len(corpus)
    assert np.concatenate([part.corpus.ids for part in parts]).tolist() == corpus.ids.tolist()
    assert all(part.corpus.ids[0] == part.first_token for part in parts if len(part.corpus.ids))
    for part in parts[:-1]:  # ends with the document that reaches the budget
        costs = cost(part.corpus.lengths)
        assert costs.sum() >= budget > costs[:-1].sum()
    again = list(cut_parts(blocks([1000]), cost, budget))
    assert [part.end_document for part in again] == [part.end_document for part in parts]


# ------------------------------------------------------------------ statistics


def test_a_bootstrap_in_stretches_is_a_bootstrap():
    """Every draw takes as many documents as there are; means and variances are those of drawing at once."""
    generator = np.random.default_rng(0)
    values = np.column_stack([np.ones(900), generator.exponential(size=900)])
    draws = Bootstrap(900, 2)
    for begin, end in ((0, 500), (500, 501), (501, 900)):
        draws.add(values[begin:end])
    assert (draws.resampled[:, 0] == 900).all()
    means = draws.resampled[:, 1] / 900
    assert means.mean() == pytest.approx(values[:, 1].mean(), abs=4 * values[:, 1].std() / 30 / np.sqrt(1000))
    assert means.std() == pytest.approx(values[:, 1].std() / 30, rel=0.1)


def test_a_part_that_went_missing_is_noticed(model, source, tmp_path, small_parts, monkeypatch):
    write = ResultsStore.write_part
    monkeypatch.setattr(ResultsStore, "write_part", lambda self, *part: part[1] == 2 or write(self, *part))
    with pytest.raises(CheckError, match="parts of masked-0 are missing"):
        evaluate(model, source, output=tmp_path / "result")


def test_a_crash_while_the_folder_is_made_blocks_no_later_run(model, source, tmp_path, small_parts, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(results_store, "write_record", interrupt)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, source, output=tmp_path / "result")
    assert not (tmp_path / "result").exists()
    evaluate(model, source, output=tmp_path / "result")


def test_overwriting_keeps_the_old_result_until_there_is_a_new_one(model, source, tmp_path, small_parts):
    folder = tmp_path / "result"
    evaluate(model, source, output=folder)
    old = without_times(folder)
    (tmp_path / "link").symlink_to(folder)
    for interrupted in range(2):
        interrupt(model, 5, source, tmp_path / "link", mask_seed=4, overwrite=True)
        assert without_times(folder) == old, interrupted
    evaluate(model, source, output=tmp_path / "link", mask_seed=4, overwrite=True)
    assert without_times(folder)["masking"] != old["masking"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "result", "source.txt"]
    (folder / "tokens.parquet").unlink()
    with pytest.raises(UserError, match=r"tokens.parquet is missing, damaged.*--overwrite"):
        evaluate(model, source, output=folder, mask_seed=4)
    evaluate(model, source, output=folder, mask_seed=4, overwrite=True)


def test_a_mount_point_takes_an_evaluation_and_its_replacement(model, source, tmp_path, small_parts, monkeypatch):
    """As a container's volume is: it cannot be renamed."""
    folder = tmp_path / "volume"
    (folder / "lost+found").mkdir(parents=True)
    monkeypatch.setattr(Path, "is_mount", lambda self: self == folder)
    evaluate(model, source, output=folder)
    evaluate(model, source, output=folder, mask_seed=4, overwrite=True)
    files = {"documents.parquet", "lost+found", "result.json", "tokens.parquet"}
    assert {path.name for path in folder.iterdir()} == files


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_processes_do_not_write_one_folder(overwrite, model, source, tmp_path, small_parts):
    """The second is refused while the first works, and resumes once it is gone."""
    options: dict[str, Any] = {"output": tmp_path / "result", "overwrite": overwrite}
    if overwrite:
        evaluate(model, source, **options)

    class Nested(Interrupted):
        def score(self, batch):
            for seed in (1, 2):  # the same evaluation, and another
                with pytest.raises(UserError, match="another process"):
                    evaluate(model, source, mask_seed=seed, **options)
            return super().score(batch)

    with pytest.raises(KeyboardInterrupt):
        evaluate(Nested(model, 14), source, mask_seed=1, batch_tokens=300, **options)
    assert list(tmp_path.glob("*result*/parts/*.parquet"))
    assert evaluate(model, source, mask_seed=1, **options).result["masking"]["seed"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result", "source.txt"]
