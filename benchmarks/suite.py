"""`make bench`: run every benchmark, 70 minutes on two cores, into one file and docs/results.md.

    python benchmarks/suite.py [--quick] [--only NAME ...] [--results FOLDER] [--page FILE]

Writes all figures to <results>/<machine>-<date>.json (with `--only`, <date>-part.json), and tables to the page
(page.py). A benchmark that cannot run here, or fails, is listed with the reason; after a failure the exit code is
1. At the end the headlines are shown beside those of the last run on this machine, or on another if there is none
here, with those marked that got worse, and the lines of README and docs that quote an earlier value.
Nothing else should run on the machine meanwhile. inputs.py says which text is used.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import machine, say, use_cores
from inputs import KEPT
from page import changes, outdated_quotes, render
from processes import ROOT, last_line

# In the order of the page. Studies are dry-run here; the docs have their results.
SCRIPTS = {
    "train_vs_transformers": "Training, against transformers.Trainer",
    "pll_vs_peers": "Evaluation, against a plain loop",
    "pairs_speed": "Minimal pairs: each distinct row once",
    "export_vs_optimum": "The exported graph, against optimum-onnx",
    "serve_load": "Serving under load, against transformers.pipeline",
    "startup": "Start-up",
    "growth": "Growth with the corpus",
    "corpora": "Text at any size",
    "train_data": "Packing and reading training data",
    "masking": "Masking",
    "loss_memory": "Memory of the loss",
    "gpu": "On a GPU",
}
STUDIES = {
    "architectures": "Every architecture (docs/architectures.md)",
    "plans": "TensorRT plans (docs/tensorrt.md)",
    "openvino_vs_onnxruntime": "OpenVINO on the scoring graph (docs/decisions.md)",
}
TIMEOUT = 1200  # seconds per script


def run(name: str, quick: bool) -> dict[str, Any]:
    """A script's report, or the reason why it was skipped or failed."""
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.json"
        command = [sys.executable, f"benchmarks/{name}.py", "--json", str(report), *(["--quick"] if quick else [])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return {"failed": f"no end within {TIMEOUT} s"}
        if done.returncode:
            return {"skipped" if done.returncode == 2 else "failed": last_line(done.stderr)}
        results = json.loads(report.read_text(encoding="utf-8"))
        left = {*machine(), "command"}  # the machine is written once; the command has a temporary path
        return {key: value for key, value in results.items() if key not in left}


def earlier_run(folder: Path, slug: str, ending: str) -> dict[str, Any] | None:
    """The figures of the last run on this machine, or on any other if there is none."""
    for machines in (slug, "*-cores"):
        runs = [json.loads(path.read_text("utf-8")) for path in folder.glob(f"{machines}-????-??-??{ending}")]
        if runs:
            return max(runs, key=lambda run: run["date"])
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="dry runs; their figures mean nothing")
    parser.add_argument("--only", nargs="+", choices=[*SCRIPTS, *STUDIES], default=[*SCRIPTS, *STUDIES], metavar="NAME")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    options = parser.parse_args()
    use_cores(2)
    about, began = machine(), time.perf_counter()
    slug = re.sub(r"[^a-z0-9]+", "-", f"{about['processor']} {about['cores']} cores".lower()).strip("-")
    is_whole = {*options.only} == SCRIPTS.keys() | STUDIES.keys()
    ending = f"{'' if is_whole else '-part'}{'-quick' * options.quick}.json"  # a part does not replace a complete run
    path = options.results / f"{slug}-{about['date'][:10]}{ending}"
    options.results.mkdir(parents=True, exist_ok=True)
    before = earlier_run(options.results, slug, ending)
    reports: dict[str, Any] = {}
    results: dict[str, Any] = {**about, "seconds": 0, "left_out": [], "benchmarks": reports}
    with tempfile.TemporaryDirectory(prefix="mlmkit-benchmarks-") as kept:
        os.environ[KEPT] = kept
        for name in options.only:
            started = time.perf_counter()
            title, is_dry_run = (SCRIPTS | STUDIES)[name], options.quick or name in STUDIES
            reports[name] = {"title": title, "is_dry_run": is_dry_run, **run(name, is_dry_run)}
            said = reports[name].get("failed") or reports[name].get("skipped") or "done"
            say(f"{name}: {said}, {time.perf_counter() - started:.0f} s")
            left_out = [name for name in SCRIPTS | STUDIES if name not in reports]
            results |= {"seconds": round(time.perf_counter() - began), "left_out": left_out}
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            # After each script, as an interruption would lose an hour.
            options.page.write_text(render(results, path.name), encoding="utf-8")
    say(f"{time.perf_counter() - began:.0f} s in all; figures in {path}, tables in {options.page}")
    if before:
        say(changes(before, results).markdown())
        pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
        quotes = outdated_quotes(before, results, [page for page in pages if page.name != "results.md"])
        say("\n".join(["", f"{len(quotes)} lines seem to quote an earlier value:", *quotes]))
    sys.exit(any("failed" in report for report in reports.values()))


if __name__ == "__main__":
    main()
