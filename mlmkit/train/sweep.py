"""A sweep: one training run per value of some settings, compared on the same held-out masks in a table and a plot.

Each run is an ordinary run of `train`, so it can be resumed, and a finished one is kept. The held-out masks are
mask-v1's default recipe, whatever a run masks its training text with.
"""

import logging
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from mlmkit.distributed import Ranks, ranks
from mlmkit.errors import CheckError, UserError
from mlmkit.eval.compare import compare, is_distinguishable
from mlmkit.eval.display import SMALL, markdown_table, signed, span
from mlmkit.files import RUN, locked, read_record, write_json, write_text
from mlmkit.train.checkpoints import HELD_OUT_METRICS, held_out_folder, last_checkpoint
from mlmkit.train.config import Config
from mlmkit.train.config_file import load_config, toml_value
from mlmkit.train.log import can_draw
from mlmkit.train.loop import train

log = logging.getLogger(__name__)

METRIC = "masked_cross_entropy"
INTERVAL, ACCURACY = "95 % interval", "masked accuracy"  # columns that a narrow terminal drops
NOT_IN_NAMES = re.compile(r"[^\w.+-]")
BETWEEN_VALUES = re.compile(r",(?![^\[]*\])")  # a comma outside a list


@dataclass(frozen=True)
class Trial:
    """One run: the swept settings as the user wrote them, and its whole configuration."""

    texts: dict[str, str]
    config: Config

    @property
    def name(self) -> str:
        """The name of its folder in that of the sweep."""
        return ",".join(f"{key}={NOT_IN_NAMES.sub('_', text)}" for key, text in self.texts.items())

    @property
    def values(self) -> dict[str, Any]:
        """The swept settings with their parsed values."""
        return {key: toml_value(text) for key, text in self.texts.items()}


def make_trials(
    path: str | Path, overrides: Sequence[str], sweeps: Sequence[str], base: Config | None = None
) -> list[Trial]:
    """One trial per combination of the values; each of `sweeps` is `table.key=value,value,...`. For `base` see
    `load_config`.

    Raises `UserError` if a configuration is invalid, if two are equal, or if there is no held-out text.
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
        trial = Trial(chosen, load_config(path, [*overrides, *(f"{key}={text}" for key, text in chosen.items())], base))
        if not trial.config.held_out_sources:
            raise UserError("a sweep compares its runs on held-out text: name it with data.held_out")
        if any(trial.config == other.config or trial.name == other.name for other in trials):
            raise UserError(f"--sweep: {trial.name} occurs twice")
        trials.append(trial)
    return trials


def sweep(trials: Sequence[Trial], output: Path, start_from: Path | None = None) -> dict[str, Any]:
    """Train and compare; returns the content of `OUTPUT/sweep.json`, and {} on all ranks but the first.

    Also writes `sweep.md` and `sweep.png`. `lowest` is the run with the lowest loss on held-out text. It is the `best`
    if there are others and the paired interval of each one's difference from it is above 0; otherwise `best` is None. A
    run that fails is listed with its `error`, and the others continue. Raises the first error if all fail, and
    `CheckError` if two were evaluated on different masks.
    """
    if (output / RUN).exists() or (output.exists() and not output.is_dir()):
        raise UserError(f"{output} is not the folder of a sweep: choose another --output")
    own = ranks()
    with ExitStack() as stack:
        own.from_first(lambda: stack.enter_context(locked(output)))
        own.close()  # each run joins again, with the backend that its device needs
        return _sweep(trials, output, own, start_from)


def _sweep(trials: Sequence[Trial], output: Path, own: Ranks, start_from: Path | None) -> dict[str, Any]:
    rows, errors = [], []
    for number, trial in enumerate(trials, 1):
        if own.is_first:
            log.info("run %d of %d: %s", number, len(trials), trial.name)
        row = {"run": trial.name, "values": trial.values, "error": ""}
        try:
            train(trial.config, output / trial.name, start_from)
            if own.is_first:
                run = output / trial.name
                sets = read_record(run / HELD_OUT_METRICS, f"delete {run} and run again")
                row |= {**sets.pop(next(iter(trial.config.held_out_sources))), "other_sets": sets}
        except (UserError, CheckError) as error:
            if own.is_first:
                log.error("%s failed: %s", trial.name, error)
            row["error"] = str(error)
            errors.append(error)
        rows.append(row)
    if len(errors) == len(trials):
        raise errors[0]
    return _compare(rows, trials, output) if own.is_first else {}


def check(result: dict[str, Any]) -> None:
    """Raise `CheckError` if a run of the sweep failed."""
    if failed := [row for row in result["runs"] if row["error"]]:
        count = len(result["runs"])
        raise CheckError(f"{len(failed)} of {count} runs failed: {failed[0]['run']}: {failed[0]['error']}")


def _compare(rows: list[dict[str, Any]], trials: Sequence[Trial], output: Path) -> dict[str, Any]:
    evaluated = [row for row in rows if not row["error"]]
    first = evaluated[0]
    for row in evaluated:
        if row["mask_digest"] != first["mask_digest"]:
            raise CheckError(
                f"{first['run']} and {row['run']} were evaluated on different masks, so they do not compare: "
                "sweep settings that leave tokenizer and held-out text unchanged"
            )
    lowest = min(evaluated, key=lambda row: row[METRIC]["value"])
    others = [row for row in evaluated if row is not lowest]
    name, source = next(iter(trials[0].config.held_out_sources.items()))
    for row in evaluated:
        pair = output / lowest["run"], output / row["run"]
        row["above_lowest"] = None if row is lowest else _difference(*pair, name)
    result = {
        "metric": METRIC,
        "held_out": source.name,
        "mask_digest": first["mask_digest"],
        "unigram_entropy": first["unigram_entropy"],
        "lowest": lowest["run"],
        "best": lowest["run"] if others and all(map(_is_above, others)) else None,
        "runs": rows,
    }
    write_json(output / "sweep.json", result)
    header, *lines = table(result)
    markdown = markdown_table(header, lines, "r" * (len(header) - 1))
    write_text(output / "sweep.md", "\n".join([markdown, *explain(result), ""]))
    if can_draw(output / "sweep.png"):
        from mlmkit.eval.plots import sweep_curves

        sweep_curves(evaluated, result["best"], Path(result["held_out"]).name, output / "sweep.png")
    return result


def _difference(lowest: Path, run: Path, held_out: str) -> dict[str, Any] | None:
    """How much higher a run's loss is: the value with its paired interval; None if an evaluation is gone."""
    folders = [held_out_folder(last_checkpoint(each) or each, held_out) for each in (lowest, run)]
    try:
        [other] = compare(folders, top=0)["comparisons"]
    except UserError as error:
        log.warning("%s is not compared with %s: %s", run.name, lowest.name, error)
        return None
    row = other["metrics"][METRIC]
    interval = {"low": row["low"], "high": row["high"]}
    return {"value": row["difference"], **interval, "distinguishable": is_distinguishable(row)}


def _is_above(row: dict[str, Any]) -> bool:
    """Whether the run's loss is distinguishable from the lowest."""
    return row["above_lowest"] is not None and row["above_lowest"]["distinguishable"]


def table(result: dict[str, Any]) -> list[list[str]]:
    """The comparison, its header first. The last column says which run is the best, or which are tied."""
    others = next(list(run["other_sets"]) for run in result["runs"] if not run["error"])
    columns = ["cross-entropy", INTERVAL, "above the lowest", ACCURACY, *others, ""]
    rows = [[*result["runs"][0]["values"], *columns]]
    for run in result["runs"]:
        if run["error"]:
            measured = [*("" for _ in columns[1:]), "failed"]
        else:
            losses = [f"{metrics[METRIC]['value']:.4f}" for metrics in run["other_sets"].values()]
            accuracy = f"{run['masked_accuracy']['value']:.4f}"
            interval = span(run[METRIC], "{:.4f}")
            measured = [f"{run[METRIC]['value']:.4f}", interval, _above(run), accuracy, *losses, _note(run, result)]
        rows.append([*map(str, run["values"].values()), *measured])
    return rows


def explain(result: dict[str, Any]) -> list[str]:
    """Lines that say what the table compares."""
    entropy = result["unigram_entropy"]
    beaten = "" if entropy is None else f"; unigram entropy, to beat: {entropy:.4f}"
    return [
        f"Masked cross-entropy in nats on {result['held_out']}{beaten}.",
        f"All with the same masks, digest {result['mask_digest']}.",
        "Above the lowest: paired difference and its 95 % interval. Tied: it includes 0.",
        "The intervals do not cover what another train.seed would change.",
        *(f"{run['run']} failed: {run['error']}" for run in result["runs"] if run["error"]),
    ]


def _above(run: dict[str, Any]) -> str:
    difference = run["above_lowest"]
    return f"{signed(difference['value'])} ({span(difference, SMALL)})" if difference else ""


def _note(run: dict[str, Any], result: dict[str, Any]) -> str:
    if run["run"] == result["lowest"]:
        return "best" if result["best"] else "lowest"
    if run["above_lowest"] is None:
        return "not compared"
    return "" if _is_above(run) else "tied"
