"""docs/results.md, from a file that suite.py wrote."""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness import Table
from processes import ROOT

TIMES = ("s", "ms")  # units of headlines of which less is better
MARGIN = 0.05  # beyond the range of the earlier run's rounds, headlines count as worse or better
RANGE = re.compile(r"(\d[\d.]*) \((\d[\d.]*) to (\d[\d.]*)\)")
# What README quotes, by its key: a description and a unit. Values with "x" are medians of the ratios within a round.
HEADLINES = {
    "train_times_trainer_paragraphs": (
        "training, real tokens/s, Trainer with one document per example",
        "x transformers.Trainer",
    ),
    "train_times_trainer_by_length": ("the same, Trainer grouping by length", "x transformers.Trainer"),
    "train_times_run_mlm": ("the same, Trainer on run_mlm.py's full rows", "x transformers.Trainer"),
    "pll_times_as_fast": ("exact pseudo-log-likelihood, ONNX Runtime", "x the plain loop"),
    "pll_share_of_floor": ("the same, as a share of the hardware limit", ""),
    "pll_int8_times_as_fast": ("the same in dynamic int8", "x the plain loop"),
    "pairs_onnx_times_as_fast": ("minimal pairs, ONNX Runtime", "x every row in batches of 2,048"),
    "masked_short_times_as_fast": ("masked cross-entropy of short documents, ONNX Runtime", "x transformers"),
    "masked_long_times_as_fast": ("masked cross-entropy of long documents, ONNX Runtime", "x transformers"),
    "masked_long_share_of_floor": ("the same, as a share of the hardware limit", ""),
    "optimum_1x16_times_as_fast": ("scoring 1 x 16 tokens", "x optimum-onnx's graph"),
    "optimum_8x128_times_as_fast": ("scoring 8 x 128 tokens", "x optimum-onnx's graph"),
    "optimum_32x128_times_as_fast": ("scoring 32 x 128 tokens", "x optimum-onnx's graph"),
    "serve_64_times_as_fast": ("serving, 64 connections, requests/s", "x transformers.pipeline behind FastAPI"),
    "serve_overhead_ms": ("time that the server adds to a request, one connection", "ms"),
    "fill_seconds": ("`mlmkit fill`, BERT-base, a new process", "s"),
    "pipeline_seconds": ("transformers.pipeline, the same", "s"),
    "score_tiny_seconds": ("`mlmkit score`, a tiny checkpoint, a new process", "s"),
    "eval_tiny_seconds": ("`mlmkit eval`, the same", "s"),
    "help_seconds": ("`mlmkit --help`", "s"),
    "import_seconds": ("`import mlmkit`", "s"),
    "loss_memory_ratio": ("memory of a training step with logits everywhere, vocabulary of 64,000", "x mlmkit's"),
    "pack_fill_8192": ("fill of packs of 8,192 tokens", ""),
    "mask_seconds_a_million_tokens": ("masks and digest of a million tokens", "s"),
}


def render(results: dict[str, Any], name: str) -> str:
    versions = ", ".join(f"{package} {number}" for package, number in results["versions"].items())
    reports = results["benchmarks"]
    lines = [
        "# Results",
        "",
        f"*Written by `make bench` on {results['date'][:10]} from "
        f"[{name}](../benchmarks/results/{name}), which has every figure.*",
        "",
        f"{results['processor']}, {results['cores']} cores. {versions}. Text: {results['text']}. "
        f"All benchmarks together took {results['seconds'] / 60:.0f} minutes.",
        "",
        "Contestants take turns, each in its own process, after a warm-up. Tables show medians; ratios are computed "
        "within a round and shown as median (least to most). Models have random weights, because speed does not depend "
        "on the weights. The hardware limit is the time of the model's matrix products at the best rate that torch "
        "reaches here. Other work on the machine slows all contestants equally, so ratios are more reliable than "
        "seconds. Complete trainings and long load tests are in [runs](runs.md).",
        "",
    ]
    headlines = headlines_of(results)
    shown = [[what, figure(headlines[key], unit)] for key, (what, unit) in HEADLINES.items() if key in headlines]
    lines += [Table("", ["In short", ""], shown).markdown(), ""]
    for script, report in reports.items():
        if report["is_dry_run"]:
            continue
        lines += [f"## {report['title']}", ""]
        if reason := report.get("failed") or report.get("skipped"):
            lines += [f"Not run: {reason}.", ""]
            continue
        lines += [f"`python benchmarks/{script}.py`, {report['seconds']:.0f} s.", ""]
        for table in report["tables"]:
            lines += [Table(**table).markdown(), ""]
        lines += [part for note in report["notes"] for part in (note, "")]
    dry = {script: report for script, report in reports.items() if report["is_dry_run"]}
    if dry:
        ran = [f"`{script}`" + (" (**failed**)" if "failed" in report else "") for script, report in dry.items()]
        lines += ["## Dry runs", "", f"These ran with `--quick`, so their figures mean nothing: {', '.join(ran)}.", ""]
    if results["left_out"]:
        names = ", ".join(f"`{script}`" for script in results["left_out"])
        lines += ["## Left out", "", f"Not part of this run (`--only`): {names}.", ""]
    return "\n".join(lines)


def headlines_of(results: dict[str, Any]) -> dict[str, float]:
    return {
        key: value for report in results["benchmarks"].values() for key, value in report.get("headlines", {}).items()
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> Table:
    """The headlines of two runs side by side.

    A headline is worse, or better, if it is more than `MARGIN` outside the range of the earlier run's rounds. Seconds
    are left out if the runs are from two kinds of machine, because only ratios carry over.
    """
    is_other_machine = any(before[key] != after[key] for key in ("processor", "cores"))
    old, new, rows = headlines_of(before), headlines_of(after), []
    for key, (what, unit) in HEADLINES.items():
        if key not in old or key not in new or (is_other_machine and unit in TIMES):
            continue
        low, high = spread(before, key)
        above, below = ("worse", "better") if unit in TIMES else ("better", "worse")
        verdict = above if new[key] > high * (1 + MARGIN) else below if new[key] < low * (1 - MARGIN) else ""
        gain = old[key] / new[key] if unit in TIMES else new[key] / old[key]
        earlier = figure(old[key], unit) + (f" ({low:.3g} to {high:.3g})" if low < high else "")
        rows.append([what, earlier, figure(new[key], unit), f"{gain - 1:+.0%}", verdict])
    where = f", {before['processor']}" if is_other_machine else ""
    return Table("", ["", f"on {before['date'][:10]}{where}", "now", "change for the better", ""], rows)


def spread(results: dict[str, Any], key: str) -> tuple[float, float]:
    """The least and the most of the rounds whose median is this headline, from its benchmark's tables and notes.

    These show "median (least to most)" with three digits. Where they do not show it, both are the headline itself.
    """
    report = next(report for report in results["benchmarks"].values() if key in report.get("headlines", {}))
    value = report["headlines"][key]
    cells = [str(cell) for table in report["tables"] for row in table["rows"] for cell in row]
    ranges = [tuple(map(float, found)) for text in (*cells, *report["notes"]) for found in RANGE.findall(text)]
    found = [(low, high) for middle, low, high in ranges if abs(middle - value) <= 0.005 * value]
    return min((low for low, _ in found), default=value), max((high for _, high in found), default=value)


def outdated_quotes(before: dict[str, Any], after: dict[str, Any], pages: Iterable[Path]) -> list[str]:
    """The lines of `pages` that seem to quote a headline of the earlier run that has another value now.

    They have the earlier value with any rounding and its unit behind it, as in `2.01 x`, `2.0 ×` or `88 %`. Some lines
    have the same number from elsewhere, so a reader has to decide.
    """
    old, new, quotes = headlines_of(before), headlines_of(after), []
    moved = {key: unit for key, (_, unit) in HEADLINES.items() if key in old and key in new}
    moved = {key: unit for key, unit in moved.items() if figure(old[key], unit) != figure(new[key], unit)}
    for page in pages:
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            found = [key for key, unit in moved.items() if _quote(old[key], unit).search(line)]
            changed = "; ".join(
                f"{key} {figure(old[key], moved[key])} -> {figure(new[key], moved[key])}" for key in found
            )
            quotes += [f"{page}:{number}: {changed}\n    {line.strip()[:120]}"] if found else []
    return quotes


def _quote(value: float, unit: str) -> re.Pattern[str]:
    shown = value if unit else 100 * value
    numbers = {f"{shown:.2f}", f"{shown:.1f}", *([f"{shown:.0f}"] if shown >= 10 else [])}
    behind = {"": "%", "s": r"s\b|seconds", "ms": r"ms\b"}.get(unit, r"x\b|×|times")
    return re.compile(rf"(?<![\w.,])({'|'.join(map(re.escape, sorted(numbers)))})( to [\d.]+)? ?({behind})")


def figure(value: float, unit: str) -> str:
    """A headline with two decimals and its unit, or as a percentage if it has none."""
    if unit:
        return f"{value:{'.2f' if value >= 0.1 else '.1g'}} {unit}"
    return f"{value:.0%}" if value < 0.995 else f"{value:.1%}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=argparse.FileType(encoding="utf-8"), help="a file that suite.py wrote")
    parser.add_argument("page", nargs="?", type=Path, default=ROOT / "docs" / "results.md")
    arguments = parser.parse_args()
    page = render(json.load(arguments.results), Path(arguments.results.name).name)
    arguments.page.write_text(page, encoding="utf-8")
