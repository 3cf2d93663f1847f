"""The harness, suite and pages of the benchmarks. No test asserts a time."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks import growth
from benchmarks.gpu_evaluation import has_tensorrt
from benchmarks.harness import Report, SkippedError, Table, alternate, installed, machine, ratios, table, write_block
from benchmarks.page import changes, headlines_of, outdated_quotes, render
from benchmarks.processes import Contestant, ContestantError, isolated
from benchmarks.suite import SCRIPTS, STUDIES, earlier_run

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment)


# ---------------------------------------------------------------- the harness


def test_calls_alternate_after_an_uncounted_turn():
    order: list[str] = []

    def turn(name: str) -> int:
        order.append(name)
        return len(order)

    taken = alternate({"a": lambda: turn("a"), "b": lambda: turn("b")}, 3)
    assert order == ["a", "b"] * 4
    assert taken == {"a": [3, 5, 7], "b": [4, 6, 8]}
    assert alternate({"a": lambda: turn("a")}, 1, warm=True) == {"a": [9]}
    assert ratios([1.0, 2.0], [3.0, 3.0]) == [3.0, 1.5]


def test_a_contestant_keeps_its_state_and_reports_failures():
    contestant = Contestant(list, "ab")
    contestant.call(list.append, "c")
    assert contestant.call(list.copy) == ["a", "b", "c"]
    with pytest.raises(ContestantError, match=r"ValueError: .*not in list"):
        contestant.call(list.remove, "z")
    assert contestant.call(len) == 3
    contestant.stop()
    with pytest.raises(ContestantError, match="ValueError: invalid literal"):
        isolated(int, "many")
    with pytest.raises(ContestantError, match="no answer within 1 s"):
        Contestant(float, 600).call(time.sleep, timeout=1)


def test_a_table_formats_the_values_of_records():
    records = [{"": "a", "x": 2, "seconds": [0.5, 0.25, 1.0]}, {"": "b", "share": 0.98765, "x": 12345.6}]
    shown = table("T", records)
    assert (shown.title, shown.header) == ("T", ["", "x", "seconds", "share"])
    assert shown.rows == [["a", "2", "0.500 (0.250 to 1.00)", ""], ["b", "12,346", "", "0.988"]]


def test_a_script_runs_alone_and_writes_its_figures(tmp_path):
    done = run("benchmarks/masking.py", "--quick", "--rounds", 2, "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [len(times) for times in report["figures"].values()] == [2] * 6
    assert report["versions"]["torch"] and report["processor"] and report["cores"] >= 1
    assert Table(**report["tables"][0]).markdown() in done.stdout


def test_a_failing_contestant_exits_with_1(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from harness import Report, main\nfrom processes import isolated\n"
        "def measure(options):\n    return Report([], figures=isolated(int, 'many'))\n"
        "if __name__ == '__main__':\n    main(None, measure)\n"
    )
    done = run(script, PYTHONPATH=str(ROOT / "benchmarks"))
    assert done.returncode == 1
    assert done.stderr.startswith("script.py: ValueError: invalid literal")


def test_the_gpu_benchmark_without_a_gpu_exits_with_2():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("benchmarks/gpu.py")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "GPU" in done.stderr


def test_packages_that_are_not_installed_skip_a_benchmark():
    with pytest.raises(SkippedError, match="make build/nothing/installed"):
        installed("nothing")


def test_a_text_of_any_size_repeats_no_document(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "documents", lambda: ["one é", "two"])
    lines = growth.write_text(tmp_path / "text.txt", 25e-6).read_text(encoding="utf-8").splitlines()
    assert lines == ["0 one é", "0 two", "1 one é", "1 two"]  # 24 bytes after the third, 30 after the fourth


def test_tensorrt_for_rtx_counts_as_tensorrt():
    if not find_spec("tensorrt_rtx"):
        pytest.skip("TensorRT for RTX is not installed")
    assert has_tensorrt()
    assert re.match(r"1\.\d", machine()["versions"]["tensorrt_rtx"])


# ---------------------------------------------------------------- the suite and its page


def test_the_suite_runs_every_script():
    scripts = {
        path.stem
        for path in (ROOT / "benchmarks").glob("*.py")
        if re.search(r"^ +main\(\s*__doc__", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert scripts == SCRIPTS.keys() | STUDIES.keys()


def test_the_suite_writes_figures_and_page_and_shows_what_changed(tmp_path):
    options = ["--only", "masking", "--results", tmp_path, "--page", tmp_path / "p.md"]
    command = ["benchmarks/suite.py", "--quick", *options]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "change for the better" not in done.stderr  # there is no run before
    assert re.search(r"^\| masks and digest of .* s \| .* s \| [+-]", run(*command).stderr, re.MULTILINE)
    (path,) = tmp_path.glob("*-part-quick.json")
    assert json.loads(path.read_text())["benchmarks"]["masking"]["headlines"]["mask_seconds_a_million_tokens"] > 0
    page = (tmp_path / "p.md").read_text()
    assert "## Dry runs" in page and path.name in page


def test_the_page_has_tables_and_skipped_benchmarks():
    speeds = Table("Speeds", ["", "tokens/s"], [["mlmkit", 2], ["peer", 1]])
    report = Report([speeds], ["A note."], {"pll_times_as_fast": 2.0})
    reports = {
        "pll_vs_peers": {"title": "Evaluation", "is_dry_run": False, "seconds": 3.0, **asdict(report)},
        "gpu": {"title": "On a GPU", "is_dry_run": False, "skipped": "no GPU"},
        "plans": {"title": "Plans", "is_dry_run": True, "failed": "ValueError"},
    }
    machine = {"date": "2026-11-25T00:00:00", "processor": "P", "cores": 2, "versions": {"torch": "2"}, "text": "T"}
    page = render({**machine, "seconds": 60, "left_out": ["masking"], "benchmarks": reports}, "p.json")
    assert "| mlmkit | 2 |" in page and "A note." in page and "2.00 x the plain loop" in page
    assert "Not run: no GPU." in page and "`plans` (**failed**)" in page and "`masking`" in page


def test_a_block_replaces_the_lines_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    begin, end = "<!-- plans.py: begin -->", "<!-- plans.py: end -->"
    page.write_text(f"# Page\n\n{begin}\nan old table\n{end}\n\nThe rest.\n")
    for _ in range(2):
        write_block(page, "plans.py", ["A note.", table("", [{"model": "BERT-base", "MiB": 225}]).markdown()])
        lines = page.read_text().splitlines()
        assert (lines[0], lines[2], lines[-3], lines[-1]) == ("# Page", begin, end, "The rest.")
        assert "| BERT-base | 225 |" in lines and "an old table" not in lines
    with pytest.raises(SkippedError, match="has no lines <!-- masking"):
        write_block(page, "masking.py", [])


def test_the_committed_table_of_plans_matches_the_committed_figures():
    results = json.loads((ROOT / "benchmarks" / "results" / "plans-cpu.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "tensorrt.md").read_text(encoding="utf-8")
    _, _, rest = page.partition("<!-- plans.py: begin -->\n")
    assert Table(**results["tables"][0]).markdown() in rest.partition("<!-- plans.py: end -->")[0]
    assert all(f"TensorRT for RTX {results['versions']['tensorrt_rtx']}" in text for text in (rest, *results["notes"]))


def ran(cells: list[str] | None = None, processor: str = "P", **headlines: float) -> dict[str, Any]:
    """The figures of a run of the suite."""
    report = {"headlines": headlines, "tables": [{"rows": [cells or []]}], "notes": ["It adds 4.00 (1.00 to 5.00) ms."]}
    machine = {"date": "2026-11-25T00:00:00", "processor": processor, "cores": 2}
    return machine | {"benchmarks": {"a": report, "b": {"skipped": "no GPU"}}}


def test_headlines_are_compared_with_the_run_before():
    cells = ["2.00 (1.90 to 2.10)", "2.00 (1.80 to 2.05)", "1.00", "0.990 (0.950 to 1.03)"]
    old: dict[str, Any] = {
        "pll_times_as_fast": 2.001,
        "pll_share_of_floor": 0.8,
        "fill_seconds": 0.99,
        "help_seconds": 0.5,
    }
    before = ran(cells, **old, import_seconds=1.0, serve_overhead_ms=4.0)
    for value, verdict in ((1.72, ""), (1.70, "worse"), (2.20, ""), (2.21, "better")):
        (row,) = changes(before, ran(pll_times_as_fast=value)).rows
        assert row[1] == "2.00 x the plain loop (1.8 to 2.1)"
        assert row[-1] == verdict, value
    after = ran(pll_share_of_floor=0.75, fill_seconds=1.09, help_seconds=0.4, serve_overhead_ms=5.2)
    assert [row[1:] for row in changes(before, after).rows] == [
        ["80%", "75%", "-6%", "worse"],
        ["4.00 ms (1 to 5)", "5.20 ms", "-23%", ""],
        ["0.99 s (0.95 to 1.03)", "1.09 s", "-9%", "worse"],
        ["0.50 s", "0.40 s", "+25%", "better"],
    ]


def test_seconds_of_another_machine_are_not_compared():
    shown = changes(
        ran(pll_times_as_fast=2.0, fill_seconds=1.0), ran(None, "Q", pll_times_as_fast=2.0, fill_seconds=9.0)
    )
    assert shown.header[1] == "on 2026-11-25, P"
    assert [row[0] for row in shown.rows] == ["exact pseudo-log-likelihood, ONNX Runtime"]


def test_the_last_run_on_this_machine_comes_before_later_ones_elsewhere(tmp_path):
    names = ("p-2-cores-2026-11-24", "p-2-cores-2026-11-25", "q-2-cores-2026-11-26", "a-gpu-2026-11-27")
    for name in (*names, "p-2-cores-2026-11-28-part"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"date": name[-10:], "name": name}))
    for slug, name in (("p-2-cores", names[1]), ("r-2-cores", names[2])):
        run = earlier_run(tmp_path, slug, ".json")
        assert run and run["name"] == name
    assert earlier_run(tmp_path, "p-2-cores", "-quick.json") is None


def test_lines_that_quote_a_changed_headline_are_listed(tmp_path):
    page = tmp_path / "page.md"
    lines = ["| 2.01 x |", "2.0 × faster", "1.46 to 1.47 times", "12.01 x", "2.01 s", "about 80 % of it", "3.00 x"]
    page.write_text("\n".join(lines))
    before = ran(
        train_times_run_mlm=2.006, pll_times_as_fast=1.463, pll_share_of_floor=0.8, masked_long_times_as_fast=3.0
    )
    after = ran(train_times_run_mlm=1.9, pll_times_as_fast=1.4, pll_share_of_floor=0.7, masked_long_times_as_fast=3.001)
    quotes = outdated_quotes(before, after, [page])
    assert [int(quote.split(":")[1]) for quote in quotes] == [1, 2, 3, 6]
    assert "train_times_run_mlm 2.01 x transformers.Trainer -> 1.90 x transformers.Trainer" in quotes[0]


def test_the_committed_page_matches_the_committed_figures():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    (name,) = set(re.findall(r"benchmarks/results/([\w.-]+\.json)", page))
    found = json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
    assert page == render(found, name)
    for script, report in found["benchmarks"].items():
        assert "failed" not in report, f"{script}: {report['failed']}"


README_SPEEDS = {  # a row of README's table of speeds, and the headline that it quotes
    "training: tokens per second, without padding": "train_times_run_mlm",
    "memory of a training step, vocabulary of 64,000": "loss_memory_ratio",
    "exact pseudo-log-likelihood on ONNX Runtime": "pll_times_as_fast",
    "masked cross-entropy of long documents on ONNX Runtime": "masked_long_times_as_fast",
    "requests per second from 64 connections": "serve_64_times_as_fast",
}


def test_the_speeds_of_readme_and_home_page_are_in_the_committed_figures():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    headlines = headlines_of(read_results(re.findall(r"results/([\w.-]+\.json)", page)[0]))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (.+?) \| ([\d.]+) x.* \| .+ \|$", readme, re.MULTILINE))
    assert rows == {row: f"{headlines[key]:.2f}" for row, key in README_SPEEDS.items()}
    for name in ("README.md", "docs/index.md"):
        (times,) = re.findall(r"([\d.]+) times the tokens per\s+second", (ROOT / name).read_text(encoding="utf-8"))
        assert times == f"{headlines['train_times_run_mlm']:.2f}"


def test_the_outputs_in_the_readme_are_in_the_committed_figures():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ran = read_results("readme.json")
    assert f"<<'TOML'\n{ran['config']}TOML\n" in readme
    numbers = [abs(value) for value in leaves(ran) if isinstance(value, int | float)]
    known = {form.format(number) for number in numbers for form in ("{:.4f}", "{:,.0f}", "{:.1e}")}
    (block,) = re.findall(r"```text\n(.*?)```", readme, re.DOTALL)
    shown = re.findall(r"(?<![\w.,])(\d+\.\d{4}|\d+,\d{3}|\d\.\de-\d+)(?!\d)", block)
    assert len(shown) > 10
    assert not set(shown) - known
    assert ran["eval"]["mask_digest"] == ran["eval_torch"]["mask_digest"]
    assert ran["eval"]["mask_digest"] in block
    gained = ran["eval"]["unigram_entropy"] - ran["eval"]["metrics"]["masked_cross_entropy"]["value"]
    assert f"is {gained:.2f} nats below" in readme


def read_results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))


def leaves(found: object) -> Iterator[object]:
    if not isinstance(found, dict | list):
        yield found
        return
    for value in found.values() if isinstance(found, dict) else found:
        yield from leaves(value)
