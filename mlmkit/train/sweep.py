"""One training run for each value of some settings, measured on the same held-out masks: one table, one plot.

Plain runs of `train`, so each can be resumed, and a finished one is kept. How a run masked its training text does not
change how it is measured: the masks of the held-out text are mask-v1's default recipe.
"""

import logging
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from mlmkit.distributed import Ranks, ranks
from mlmkit.errors import CheckError, UserError
from mlmkit.files import RUN, locked, read_record, write_json, write_text
from mlmkit.train.checkpoint import HELD_OUT_METRICS
from mlmkit.train.config import Config, load_config
from mlmkit.train.curve import ONE, STYLE, TWO, can_draw, draw_intervals, save
from mlmkit.train.loop import train

log = logging.getLogger(__name__)

METRIC = "masked_cross_entropy"
NOT_IN_NAMES = re.compile(r"[^\w.+-]")
BETWEEN_VALUES = re.compile(r",(?![^\[]*\])")  # not within a list


@dataclass(frozen=True)
class Trial:
    """One run: the swept settings as the user wrote them, and all of its settings."""

    texts: dict[str, str]
    config: Config

    @property
    def name(self) -> str:
        """Its folder in the sweep's."""
        return ",".join(f"{key}={NOT_IN_NAMES.sub('_', text)}" for key, text in self.texts.items())

    @property
    def values(self) -> dict[str, Any]:
        """The swept settings as training takes them."""
        tables = asdict(self.config)
        return {key: tables[key.partition(".")[0]][key.partition(".")[2]] for key in self.texts}


def plan(path: str | Path, overrides: Sequence[str], sweeps: Sequence[str]) -> list[Trial]:
    """A trial for each combination of the values; each of `sweeps` is `table.key=value,value,...`.

    Raises `UserError` if any of them is no valid configuration, if two are the same, or without `data.held_out`.
    """
    settings: dict[str, list[str]] = {}
    for sweep in sweeps:
        key, equals, values = (part.strip() for part in sweep.partition("="))
        texts = [text.strip() for text in BETWEEN_VALUES.split(values)]
        if not equals or "." not in key or not all(texts):
            raise UserError(f"--sweep {sweep}: write it as table.key=value,value: masking.mask_prob=0.15,0.30")
        if key in settings:
            raise UserError(f"--sweep names {key} twice: give all its values at once")
        settings[key] = texts
    trials: list[Trial] = []
    for texts in product(*settings.values()):
        chosen = dict(zip(settings, texts, strict=True))
        trial = Trial(chosen, load_config(path, [*overrides, *(f"{key}={text}" for key, text in chosen.items())]))
        if not trial.config.data.held_out:
            raise UserError("a sweep compares its runs on held-out text: name it with data.held_out")
        if any(trial.config == other.config or trial.name == other.name for other in trials):
            raise UserError(f"--sweep: {trial.name} comes twice")
        trials.append(trial)
    return trials


def sweep(trials: Sequence[Trial], output: Path) -> dict[str, Any]:
    """Train and compare; what `OUTPUT/sweep.json` holds, beside which lie `sweep.md` and `sweep.png`.

    A run that fails is listed with its `error`, and the others go on. Raises the first error if all fail, and
    `CheckError` if two were measured on different masks.
    """
    if (output / RUN).exists() or (output.exists() and not output.is_dir()):
        raise UserError(f"{output} is not the folder of a sweep: choose another --output")
    place = ranks()
    with ExitStack() as stack:
        place.from_first(lambda: stack.enter_context(locked(output)))
        place.close()  # each run joins again, by what its device needs
        return _sweep(trials, output, place)


def _sweep(trials: Sequence[Trial], output: Path, place: Ranks) -> dict[str, Any]:
    rows, errors = [], []
    for number, trial in enumerate(trials, 1):
        if place.is_first:
            log.info("run %d of %d: %s", number, len(trials), trial.name)
        row = {"run": trial.name, "values": trial.values, "error": ""}
        try:
            train(trial.config, output / trial.name)
            row |= _held_out(output / trial.name) if place.is_first else {}
        except (UserError, CheckError) as error:
            if place.is_first:
                log.error("%s failed: %s", trial.name, error)
            row["error"] = str(error)
            errors.append(error)
        rows.append(row)
    if len(errors) == len(trials):
        raise errors[0]
    return _compare(rows, trials, output) if place.is_first else {}


def check(found: dict[str, Any]) -> None:
    """Raise `CheckError` if a run of the sweep failed."""
    if failed := [row for row in found["runs"] if row["error"]]:
        raise CheckError(f"{len(failed)} of {len(found['runs'])} runs failed: {failed[0]['run']}: {failed[0]['error']}")


def _held_out(run: Path) -> dict[str, Any]:
    """What the trainer measured at the end of a run."""
    return read_record(run / HELD_OUT_METRICS, f"delete {run} and run again")


def _compare(rows: list[dict[str, Any]], trials: Sequence[Trial], output: Path) -> dict[str, Any]:
    measured = [row for row in rows if not row["error"]]
    first = measured[0]
    for row in measured:
        if row["mask_digest"] != first["mask_digest"]:
            raise CheckError(
                f"{first['run']} and {row['run']} were measured on different masks, so they do not compare: "
                "sweep what leaves tokenizer and held-out text as they are"
            )
    found = {
        "metric": METRIC,
        "held_out": trials[0].config.data.held_out,
        "mask_digest": first["mask_digest"],
        "best": min(measured, key=lambda row: row[METRIC]["value"])["run"],
        "runs": rows,
    }
    write_json(output / "sweep.json", found)
    write_text(output / "sweep.md", table(found) + "\n")
    draw(found, output / "sweep.png")
    return found


def table(found: dict[str, Any]) -> str:
    """For a console, and in Markdown."""
    keys = list(found["runs"][0]["values"])
    cells = [[*keys, "masked cross-entropy", "95 % interval", "masked accuracy", ""]]
    for row in found["runs"]:
        note = "best" if row["run"] == found["best"] else ""
        if row["error"]:
            measured = ["", "", "", f"failed: {row['error']}".replace("|", "\\|")]
        else:
            interval = [row[METRIC][bound] for bound in ("low", "high")]
            shown = "" if None in interval else "{:.4f} to {:.4f}".format(*interval)
            measured = [f"{row[METRIC]['value']:.4f}", shown, f"{row['masked_accuracy']['value']:.4f}", note]
        cells.append([*(str(value) for value in row["values"].values()), *measured])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]) - 1)]
    lines = [[*(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=False)), line[-1]] for line in cells]
    rule = [*("-" * (width - 1) + ":" for width in widths), "---"]
    text = [f"| {' | '.join(line).rstrip()} |" for line in (lines[0], rule, *lines[1:])]
    where = f"Held out: {found['held_out']}. All with the same masks, digest {found['mask_digest']}."
    return "\n".join([*text, "", where])


def draw(found: dict[str, Any], path: Path) -> None:
    """The metric against the first swept setting, a line for each combination of the others."""
    if not can_draw(path):
        return
    import matplotlib
    from matplotlib.figure import Figure

    key, *others = found["runs"][0]["values"]
    values = list(dict.fromkeys(row["values"][key] for row in found["runs"]))
    is_scale = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    place = {value: value if is_scale else number for number, value in enumerate(values)}
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(found["runs"], key=lambda row: place[row["values"][key]]):
        if not row["error"]:
            lines.setdefault(", ".join(f"{other} = {row['values'][other]}" for other in others), []).append(row)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        axes = figure.subplots()
        colors = matplotlib.colormaps["viridis"].resampled(len(lines) + 1)
        for number, (label, rows) in enumerate(lines.items()):
            places = [place[row["values"][key]] for row in rows]
            style = {"color": colors(number) if others else ONE, "label": label or "with 95 % intervals"}
            draw_intervals(axes, places, [row[METRIC] for row in rows], **style)
            for x, row in zip(places, rows, strict=True):
                if row["run"] == found["best"]:
                    axes.plot(x, row[METRIC]["value"], "o", markersize=13, mfc="none", mec=TWO, mew=1.8, label="best")
        if is_scale and min(values) > 0 and max(values) >= 10 * min(values):
            axes.set_xscale("log")
        if len(values) <= 8 or not is_scale:
            axes.set_xticks(list(place.values()), [f"{value:g}" if is_scale else str(value) for value in values])
            axes.minorticks_off()
        axes.set(xlabel=key, ylabel="held-out masked cross-entropy, nats")
        axes.margins(x=0.08)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, fontsize=9)
        save(figure, path)
