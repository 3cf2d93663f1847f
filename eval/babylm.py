"""Predictions in the files that BabyLM's `collate_preds.py` takes, as its `run.py` of each task writes them.

https://github.com/babylm-org/babylm-eval, strict/evaluation_pipeline/{sentence_zero_shot,reading,AoA_word}/run.py
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlmkit.errors import UserError
from mlmkit.eval.data import EvalData
from mlmkit.eval.item_data import ItemData
from mlmkit.eval.item_metrics import item_scores
from mlmkit.eval.sets import Request
from mlmkit.eval.suites import Suite
from mlmkit.files import write_json

AGE_OF_ACQUISITION = "AoA_word"
MAIN = "main"  # BabyLM's name for the finished model
MILLION = 10**6


def check_places(suite: Suite, requests: Sequence[Request]) -> None:
    """Raise `UserError` unless `suite.babylm` says where the predictions of some of its sets go, and of no others."""
    if not suite.babylm:
        raise UserError(f"the suite {suite.name} has no table [babylm], which says where BabyLM expects predictions")
    names = {request.name for request in requests if request.task != "text"}
    if unknown := sorted({*suite.babylm} - names):
        raise UserError(f"the suite {suite.name}: [babylm] names {unknown[0]}, which is not one of its sets of items")
    for place in map(Path, suite.babylm.values()):
        if place.is_absolute() or ".." in place.parts:
            raise UserError(
                f"the suite {suite.name}: [babylm] has {str(place)!r}, which is outside the folder of "
                "predictions: name a folder in it"
            )


def revision(words: int) -> str:
    """BabyLM's name for the checkpoint after so many words, such as chck_10M; "" before the first million."""
    return f"chck_{words // MILLION}M" if words >= MILLION else ""


class Predictions:
    """Writes the predictions of a model, and of its checkpoints, to `folder/REVISION/zero_shot/mlm/PLACE`.

    `places` are those of a suite: for a set its task and dataset, such as `blimp/blimp_filtered`. The surprisals for
    the age of acquisition are in one file, under `main`, for all revisions.
    """

    def __init__(self, folder: Path, places: Mapping[str, str]) -> None:
        self.folder, self.places = folder, places
        self._surprisals: list[dict[str, Any]] = []

    def write(self, name: str, data: EvalData, result: Path, revision: str = MAIN, words: int | None = None) -> str:
        """Write those of a set's result and return where; "" if the suite has no place for the set."""
        place = self.places.get(name)
        if not place or not isinstance(data, ItemData):  # text was refused (`check_places`)
            return ""
        task = place.partition("/")[0]
        if task == AGE_OF_ACQUISITION:
            self._surprisals += _surprisals(data, result, revision, words)
            written: dict[str, Any] = {"results": self._surprisals}
            path = self.folder / MAIN / "zero_shot" / "mlm" / place / "surprisal.json"
        else:
            predicted = _reading(data, result) if task == "reading" else _sentences(task, data, result)
            written = {subtask: {"predictions": rows} for subtask, rows in predicted.items()}
            path = self.folder / revision / "zero_shot" / "mlm" / place / "predictions.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, written)
        return str(path)


def _surprisals(data: ItemData, result: Path, step: str, words: int | None) -> list[dict[str, Any]]:
    """The surprisal of each word in each of its contexts, in nats."""
    surprisal = -np.nan_to_num(item_scores(result, "none").score[:, 0])
    number: Counter[str] = Counter()
    rows = []
    for item, value in zip(data.items, surprisal.tolist(), strict=True):
        option = item.options[0]
        row = {"step": step, "word_count": words, "target_word": item.paradigm, "context_id": number[item.paradigm]}
        rows.append(row | {"context": option.text[: option.begin], "surprisal": value})
        number[item.paradigm] += 1
    return rows


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
        shown = option.text if task == "comps" else option.scored
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
