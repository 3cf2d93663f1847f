"""`make bench`: every benchmark in one go, half an hour on two cores, into one file and docs/results.md.

    python benchmarks/suite.py [--quick] [--only NAME ...] [--results FOLDER] [--page FILE]

Writes <results>/<machine>-<date>.json (with `--only`, <date>-part.json), with all figures, and the page with the tables
and plots (page.py). A benchmark that cannot run here is noted with the reason; one that fails too, and then the exit
code is 1. In the end the headlines are shown beside those of the last run that is kept of this machine: so one sees at
once what a change costs. Nothing else should run on the machine meanwhile. Text: see inputs.py.
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

from harness import ROOT, last_line, machine, say, use_cores
from inputs import KEPT
from page import changes, write_page

# In the order of the page. Trainings and surveys of hours are only tried out here; what they found stands in the docs.
SCRIPTS = {
    "train_vs_transformers": "Training, against transformers.Trainer",
    "pll_vs_peers": "Evaluation, against the loop that one writes",
    "export_vs_optimum": "The exported graph, against optimum-onnx",
    "serve_load": "Serving under load, against transformers.pipeline",
    "startup": "Start-up",
    "growth": "Growth with the corpus",
    "profiles": "Where the time goes",
    "train_data": "Packing and reading training data",
    "masking": "Masking",
    "loss_memory": "Memory of the loss",
    "gpu": "On a GPU",
    "gpu_export": "Exported engines on a GPU",
}
STUDIES = {
    "architectures": "Every architecture (docs/architectures.md)",
    "plans": "TensorRT plans (docs/tensorrt.md)",
}
TIMEOUT = 1200  # seconds a script


def run(name: str, quick: bool) -> dict[str, Any]:
    """A script's report, or why there is none."""
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.json"
        command = [sys.executable, f"benchmarks/{name}.py", "--json", str(report), *(["--quick"] if quick else [])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return {"failed": f"no end within {TIMEOUT} s"}
        if done.returncode:
            return {"skipped" if done.returncode == 2 else "failed": last_line(done.stderr)}
        found = json.loads(report.read_text(encoding="utf-8"))
        left = {*machine(), "command"}  # said once for all, and the same for all but a temporary path
        return {key: value for key, value in found.items() if key not in left}


def main() -> None:
    """All of them, in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="dry runs of all, whose figures mean nothing")
    parser.add_argument("--only", nargs="+", choices=[*SCRIPTS, *STUDIES], default=[*SCRIPTS, *STUDIES], metavar="NAME")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    options = parser.parse_args()
    use_cores(2)
    about, began = machine(), time.perf_counter()
    slug = re.sub(r"[^a-z0-9]+", "-", f"{about['processor']} {about['cores']} cores".lower()).strip("-")
    is_whole = {*options.only} == SCRIPTS.keys() | STUDIES.keys()
    ending = f"{'' if is_whole else '-part'}{'-quick' * options.quick}.json"  # a part does not replace the whole
    path = options.results / f"{slug}-{about['date'][:10]}{ending}"
    options.results.mkdir(parents=True, exist_ok=True)
    earlier = sorted(options.results.glob(f"{slug}-????-??-??{ending}"))
    before = json.loads(earlier[-1].read_text(encoding="utf-8")) if earlier else None
    reports: dict[str, Any] = {}
    found: dict[str, Any] = {**about, "seconds": 0, "left_out": [], "benchmarks": reports}
    with tempfile.TemporaryDirectory(prefix="mlmkit-benchmarks-") as kept:
        os.environ[KEPT] = kept
        for name in options.only:
            started = time.perf_counter()
            title, is_dry_run = (SCRIPTS | STUDIES)[name], options.quick or name in STUDIES
            reports[name] = {"title": title, "is_dry_run": is_dry_run, **run(name, is_dry_run)}
            said = reports[name].get("failed") or reports[name].get("skipped") or "done"
            say(f"{name}: {said}, {time.perf_counter() - started:.0f} s")
            left_out = [name for name in SCRIPTS | STUDIES if name not in reports]
            found |= {"seconds": round(time.perf_counter() - began), "left_out": left_out}
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            write_page(found, path.name, options.page)  # each time: half an hour is long
    say(f"{time.perf_counter() - began:.0f} s in all; figures in {path}, tables in {options.page}")
    if before:
        say(changes(before, found).markdown())
    sys.exit(any("failed" in report for report in reports.values()))


if __name__ == "__main__":
    main()
