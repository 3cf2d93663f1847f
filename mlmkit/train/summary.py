"""What a finished run shows, read from its folder: model, best checkpoints, held-out results, the next commands.

The results are masked cross-entropies, read from the evaluations beside the checkpoints.
"""

import shlex
from pathlib import Path
from typing import Any

from mlmkit.train.checkpoints import HELD_OUT_METRICS, INITIAL, held_out_result, read_remeasurable, saved_checkpoints
from mlmkit.train.config import HELD_OUT, Config
from mlmkit.train.log import read_log

METRIC = "masked_cross_entropy"


def summarise(run: Path, config: Config) -> dict[str, Any]:
    """The summary that `mlmkit train --json` prints.

    `held_out` has for each held-out text its `unigram_entropy` and the metrics `initial` (None for a fresh model),
    `best` (with its `checkpoint`; None if the checkpoints are gone) and `last`. `next` are commands.
    """
    model, curve = run / "model", run / "loss.png"
    entries = [entry for entry in read_log(run) if "loss" in entry]
    measured = (read_remeasurable(run / HELD_OUT_METRICS) or {}) if config.held_out_sources else {}
    return {
        "model": str(model),
        "last_log_entry": entries[-1] if entries else None,
        "loss_curve": str(curve) if curve.exists() else None,
        "held_out": {name: _values(run, name, measured[name]) for name in config.held_out_sources if name in measured},
        "next": [shlex.join(command) for command in _next_commands(run, config)],
    }


def _values(run: Path, name: str, last: dict[str, Any]) -> dict[str, Any]:
    def metric(checkpoint: Path) -> dict[str, Any] | None:
        result = held_out_result(checkpoint, name, last["mask_digest"])
        return {"checkpoint": str(checkpoint), **result["metrics"][METRIC]} if result else None

    saved = [found for checkpoint in saved_checkpoints(run) if (found := metric(checkpoint))]
    return {
        "mask_digest": last["mask_digest"],
        "unigram_entropy": last["unigram_entropy"],
        "initial": metric(run / INITIAL),
        "best": min(saved, key=lambda found: found["value"], default=None),
        "last": last[METRIC],
    }


def _next_commands(run: Path, config: Config) -> list[list[str]]:
    source = next(iter(config.held_out_sources.values()), None)
    reading = ["--text-field", config.data.text_field] if config.data.text_field != "text" else []
    reading += ["--blank-line"] if config.data.blank_line else []
    text = ["--set", source.location, *reading] if source else ["--set", "TEXT"]
    model, name = str(run / "model"), run.resolve().name
    return [
        ["mlmkit", "eval", model, *text, "--output", str(run.with_name(f"{name}-eval"))],
        ["mlmkit", "export", model, "--output", str(run.with_name(f"{name}-artifact"))],
    ]


def held_out_table(summary: dict[str, Any]) -> list[list[str]]:
    """Header and rows of the held-out results for a terminal of 80 columns."""
    sets = summary["held_out"].items()
    points = [point for point in ("initial", "best", "last") if any(values[point] for _, values in sets)]
    rows = [["held out" if name == HELD_OUT else name, _number(values["unigram_entropy"])] for name, values in sets]
    for row, (_, values) in zip(rows, sets, strict=True):
        row += [_interval(values[point]) for point in points]
    return [["text", "unigram", *points], *rows]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(metric: dict[str, Any] | None) -> str:
    if metric is None or metric["low"] is None:
        return _number(metric["value"] if metric else None)
    return "{value:.3f} ({low:.2f}-{high:.2f})".format(**metric)
