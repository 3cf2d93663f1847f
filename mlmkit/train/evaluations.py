"""Evaluations over the course of a run: each checkpoint that it has kept, on a few sets.

checkpoints ── run_evaluation ──> OUTPUT/SET/step-N ── main metrics ──> OUTPUT/evaluations.json ──> evaluations.png

`evaluations.json` keeps the values of checkpoints that training has removed since they were measured.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow.csv import write_csv

from mlmkit.backends import load
from mlmkit.distributed import Ranks
from mlmkit.errors import UserError
from mlmkit.eval.acquisition import PARAMETERS, age_of_acquisition
from mlmkit.eval.babylm import Predictions, revision
from mlmkit.eval.evaluate import run_evaluation
from mlmkit.eval.result import main_metric
from mlmkit.eval.results_store import REMEASURE_HINT, RESULT
from mlmkit.eval.rows import Settings
from mlmkit.eval.sets import Request
from mlmkit.eval.suites import each_or_none
from mlmkit.files import RUN, atomic, read_record, write_record
from mlmkit.pretrained import load_tokenizer
from mlmkit.train.checkpoints import CURSOR, INITIAL, State, read_state, saved_checkpoints
from mlmkit.train.log import can_draw, read_log
from mlmkit.train.order import Cursor

EVALUATIONS, FIGURE = "evaluations.json", "evaluations.png"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A model folder of a run. In `step` steps it has seen `tokens`, special tokens included, and about `words`.

    `state` is None for `initial` and `model`.
    """

    folder: Path
    step: int
    tokens: int
    words: int
    state: State | None = None


def kept_checkpoints(run: Path) -> list[Checkpoint]:
    """The checkpoints in a run's folder, oldest first, `initial` too; `model` only where no other one is left.

    Raises `UserError` if it is not a run, or has none yet.
    """
    if not (run / RUN).exists():
        raise UserError(f"{run} is not a training run: name the folder that `mlmkit train` wrote")
    saved = saved_checkpoints(run)
    states = {folder: read_state(folder, verify=False) for folder in saved}
    found = [_at(folder, state.position.cursor, state) for folder, state in states.items()]
    if (run / INITIAL).exists():
        origin = read_state(run, verify=False).position.cursor if (run / CURSOR).exists() else Cursor()
        found.insert(0, _at(run / INITIAL, origin))
    if not saved and (run / "model").exists():
        last = [entry for entry in read_log(run) if "tokens_seen" in entry][-1:]
        found += [Checkpoint(run / "model", at["step"], at["tokens_seen"], round(at["words_seen"])) for at in last]
    if not found:
        raise UserError(f"{run} has no checkpoint yet: it gets one every train.save_every steps")
    if not (run / "model").exists():
        log.info("%s is not finished: it has %d checkpoints so far", run, len(found))
    return found


def _at(folder: Path, cursor: Cursor, state: State | None = None) -> Checkpoint:
    return Checkpoint(folder, cursor.step, cursor.tokens, round(cursor.words), state)


def evaluate_run(
    run: Path,
    sets: Sequence[tuple[Request, Settings]],
    output: Path,
    *,
    backend: str = "auto",
    device: str = "auto",
    ranks: Ranks | None = None,
    predictions: Predictions | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Evaluate the `kept_checkpoints` of a run on each set, into `output`; `options` are those of `run_evaluation`.

    A call with the same arguments resumes, and measures only checkpoints that are new. Returns the rows of
    `evaluations.json`, also those of earlier calls: `set`, `checkpoint` (relative to the run), `step`, `tokens`,
    `words`, and of the main metric its name `metric`, `value`, `low` and `high`. For a cloze set with paradigms,
    `acquisition.csv` has the age of acquisition of each. `predictions` get those of the first checkpoint after each
    million words. All `ranks` share the work; only the first returns rows.

    Raises `UserError` as `kept_checkpoints` and `run_evaluation` do.
    """
    ranks = ranks or Ranks()
    checkpoints = ranks.from_first(lambda: kept_checkpoints(run))
    tokenizer = load_tokenizer(str(run / "tokenizer"))
    texts = each_or_none(lambda each: each[0].read(tokenizer), sets)
    rows = _read(output) if ranks.is_first else {}
    revisions = {revision(each.words): each for each in reversed(checkpoints)}  # the first of each name
    for number, checkpoint in enumerate(checkpoints, 1):
        log.info("checkpoint %d of %d: %s", number, len(checkpoints), checkpoint.folder)
        if not ranks.from_first(checkpoint.folder.exists):
            log.warning("%s is left out: training has removed it", checkpoint.folder)
            continue
        model = load(str(checkpoint.folder), backend, device)
        for (request, settings), text in zip(sets, texts, strict=True):
            folder = output / request.name / f"step-{checkpoint.step:08d}"
            result = run_evaluation(model, text, settings, folder, declared=request.declared, ranks=ranks, **options)
            if ranks.is_first:
                metric = main_metric(result)
                place = {"step": checkpoint.step, "tokens": checkpoint.tokens, "words": checkpoint.words}
                name = checkpoint.folder.relative_to(run).as_posix()
                row = {"set": request.name, "checkpoint": name, **place, "metric": metric, **result["metrics"][metric]}
                rows[request.name, checkpoint.step] = row
                write_record(output / EVALUATIONS, {"evaluations": _sorted(rows)})
                name = revision(checkpoint.words)
                if predictions and name and revisions[name] == checkpoint:
                    predictions.write(request.name, text, folder, name, checkpoint.words)
    if predictions and ranks.is_first:
        found = ", ".join(name for name in reversed(revisions) if name)
        log.info("predictions in %s: %s", predictions.folder, found or "none, as no checkpoint has seen 1M words")
    for request, _ in sets if ranks.is_first else ():
        if request.task == "cloze":
            _write_ages(output / request.name, [row for row in _sorted(rows) if row["set"] == request.name])
    if rows and can_draw(output / FIGURE):
        from mlmkit.eval.plots import evaluation_curves

        evaluation_curves(_sorted(rows), run.resolve().name, output / FIGURE)
    return _sorted(rows)


def _write_ages(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the age of acquisition of each paradigm, which should be a word, to `acquisition.csv`."""
    paths = {row["words"]: folder / f"step-{row['step']:08d}" / RESULT for row in rows if row["words"]}
    results = {words: read_record(path, REMEASURE_HINT) for words, path in paths.items() if path.exists()}
    paradigms = [result["items"].get("paradigms", {}) for result in results.values()]
    if len(results) < PARAMETERS or not paradigms[0]:
        log.info("%s has no ages of acquisition: they need a paradigm and %d checkpoints", folder.name, PARAMETERS)
        return
    x, chance = np.log10([*results]), np.log(next(iter(results.values()))["model"]["vocabulary_size"])
    surprisals = {
        name: -np.array([groups[name]["cloze_log_probability"]["value"] for groups in paradigms], float)
        for name in paradigms[0]
    }
    ages = pa.array([age_of_acquisition(x, each, chance) for each in surprisals.values()], from_pandas=True)
    with atomic(folder / "acquisition.csv") as path:
        write_csv(pa.table({"paradigm": [*surprisals], "log10_words": ages}), path)


def _sorted(rows: dict[tuple[str, int], dict[str, Any]]) -> list[dict[str, Any]]:
    return [rows[key] for key in sorted(rows)]


def _read(output: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The rows of earlier calls by set and step."""
    path = output / EVALUATIONS
    rows = read_record(path, "delete it, and run the command again")["evaluations"] if path.exists() else []
    return {(row["set"], row["step"]): row for row in rows}
