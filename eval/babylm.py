"""Predictions in the files that BabyLM's `collate_preds.py` takes, as its `run.py` of each task writes them.

https://github.com/babylm-org/babylm-eval, strict/evaluation_pipeline/{sentence_zero_shot,reading}/run.py
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlmkit.errors import UserError
from mlmkit.eval.item_data import ItemData
from mlmkit.eval.item_metrics import item_scores
from mlmkit.eval.sets import Request
from mlmkit.eval.suites import Suite
from mlmkit.files import write_json

AGE_OF_ACQUISITION = "AoA_word"


def check_places(suite: Suite, requests: Sequence[Request]) -> None:
    """Raise `UserError` unless `suite.babylm` says where the predictions of some of its sets go, and of no others."""
    if not suite.babylm:
        raise UserError(f"the suite {suite.name} has no table [babylm], which says where BabyLM expects predictions")
    names = {request.name for request in requests if request.task != "text"}
    if unknown := sorted({*suite.babylm} - names):
        raise UserError(f"the suite {suite.name}: [babylm] names {unknown[0]}, which is none of its sets of items")


def write_predictions(folder: Path, place: str, data: ItemData, result: Path) -> Path | None:
    """Write those of a result to `folder/place`, such as `blimp/blimp_filtered`, and return the file.

    None for the age of acquisition, for which BabyLM takes no predictions of one model, but those of 19 or 28
    checkpoints.
    """
    task = place.partition("/")[0]
    if task == AGE_OF_ACQUISITION:
        return None
    predicted = _reading(data, result) if task == "reading" else _sentences(task, data, result)
    path = folder / place / "predictions.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {name: {"predictions": rows} for name, rows in predicted.items()})
    return path


def _sentences(task: str, data: ItemData, result: Path) -> dict[str, list[dict[str, Any]]]:
    """The option with the highest score by subtask, the first on a tie. An option without a token has the sum 0."""
    scores = item_scores(result, "none")
    exists = np.arange(scores.score.shape[1]) < scores.sizes[:, None]
    score = np.where(exists, np.nan_to_num(scores.score), -np.inf)
    best = score.argmax(axis=1).tolist()
    probability = np.exp(score[:, 0] - np.logaddexp.reduce(score, axis=1)).tolist()
    predicted: dict[str, list[dict[str, Any]]] = {}
    for item, index, share in zip(data.items, best, probability, strict=True):
        option = item.options[index]
        subtask = _subtask(task, item.paradigm)
        rows = predicted.setdefault(subtask, [])
        shown = option.text if task == "comps" else option.text[option.begin : option.end]
        row = {"id": f"{subtask}_{len(rows)}", "pred": shown}
        rows.append(row | ({"prob": share} if task.startswith("wug") else {}))
    return predicted


def _subtask(task: str, paradigm: str) -> str:
    """BabyLM's name for the group of an item."""
    return paradigm.removeprefix("comps_").replace("-", "_") if task == "comps" else paradigm or task


def _reading(data: ItemData, result: Path) -> dict[str, list[dict[str, Any]]]:
    """The surprisal of each word and of the one before in nats; NaN, which Python's JSON has, where there is none."""
    scores = item_scores(result, "none").score
    both = np.column_stack([-scores, np.full(len(scores), np.nan)])[:, :2].tolist()
    return {"reading": [{"id": row, "pred": own, "prev_pred": before} for row, (own, before) in enumerate(both)]}
