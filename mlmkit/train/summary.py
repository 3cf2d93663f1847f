"""What a finished run shows, read from its folder: model, best checkpoints, held-out results, the next commands."""

import shlex
from pathlib import Path
from typing import Any

from mlmkit.train.checkpoints import HELD_OUT_METRICS, INITIAL, held_out_result, read_remeasurable, saved_checkpoints
from mlmkit.train.config import Config
from mlmkit.train.log import read_log

METRIC = "masked_cross_entropy"


def summarise(run: Path, config: Config) -> dict[str, Any]:
    """The summary that `mlmkit train --json` prints.

    `held_out` has for each held-out text its `unigram_entropy` and the masked cross-entropies `initial` (None for a
    fresh model), `best` (with its `checkpoint`; None if the checkpoints are gone) and `last`. `next` are commands.
    """
    entries = [entry for entry in read_log(run) if "loss" in entry]
    measured = (read_remeasurable(run / HELD_OUT_METRICS) or {}) if config.held_out_sources else {}
    return {
        "model": str(run / "model"),
        "last_log_entry": entries[-1] if entries else None,
        "loss_curve": str(run / "loss.png") if (run / "loss.png").exists() else None,
        "held_out": {name: _values(run, name, measured[name]) for name in config.held_out_sources if name in measured},
        "next": [shlex.join(command) for command in _next_commands(run, config)],
    }


def _values(run: Path, name: str, last: dict[str, Any]) -> dict[str, Any]:
    def metric(checkpoint: Path) -> dict[str, Any] | None:
        result = held_out_result(checkpoint, name, last["mask_digest"])
        return {"checkpoint": str(checkpoint), **result["metrics"][METRIC]} if result else None

    saved = filter(None, map(metric, saved_checkpoints(run)))
    best = min(saved, key=lambda found: found["value"], default=None)
    kept = {"initial": metric(run / INITIAL), "best": best, "last": last[METRIC]}
    return {"unigram_entropy": last["unigram_entropy"], **kept}


def _next_commands(run: Path, config: Config) -> list[list[str]]:
    source, model = next(iter(config.held_out_sources.values()), None), str(run / "model")
    reading = ["--text-field", config.data.text_field] if config.data.text_field != "text" else []
    reading += ["--blank-line"] if config.data.blank_line else []
    text = ["TEXT"]
    if source and not config.data.held_out_share and isinstance(source.location, str):
        text = [source.location, *reading]
    beside = str(run.resolve() if run.name in ("", "..") else run)
    return [
        ["mlmkit", "eval", model, "--set", *text, "--output", f"{beside}-eval"],
        ["mlmkit", "export", model, "--output", f"{beside}-artifact"],
    ]


def held_out_table(summary: dict[str, Any]) -> list[list[str]]:
    """Header and rows of the held-out results for a terminal of 80 columns."""
    sets = summary["held_out"].items()
    points = [point for point in ("initial", "best", "last") if any(values[point] for _, values in sets)]
    bounds = {"low": None, "high": None}
    return [
        ["text", "unigram", *points],
        *(
            [name, *map(_shown, ({"value": values["unigram_entropy"], **bounds}, *(values[point] for point in points)))]
            for name, values in sets
        ),
    ]


def _shown(metric: dict[str, Any] | None) -> str:
    if metric is None or metric["value"] is None:
        return "-"
    return ("{value:.3f}" if metric["low"] is None else "{value:.3f} ({low:.2f}-{high:.2f})").format(**metric)
