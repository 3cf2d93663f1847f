"""Evaluation from Python: `mlmkit.evaluate` and `mlmkit.pseudo_log_likelihood`."""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from os import PathLike, fspath
from pathlib import Path
from typing import Any, SupportsIndex

import pyarrow as pa
import pyarrow.parquet as pq

from mlmkit.backends import Backend, load
from mlmkit.documents import Source
from mlmkit.errors import UserError
from mlmkit.eval.evaluate import evaluate as run_evaluation
from mlmkit.eval.material import GivenTexts
from mlmkit.eval.passes import Settings
from mlmkit.eval.pseudo import TextScore, score_texts
from mlmkit.eval.sets import Request, data_folder, find_set
from mlmkit.eval.statistics import Metrics
from mlmkit.eval.stored import DOCUMENTS, TOKENS
from mlmkit.files import changed_file
from mlmkit.masking import MaskRecipe


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    `result` is what `result.json` holds. `tokens` has a row a scored token, `documents` a row a document; both are
    Arrow tables (`.to_pandas()`), with the columns that `docs/evaluation.md` lists.
    """

    result: dict[str, Any]
    tokens: pa.Table
    documents: pa.Table

    @property
    def metrics(self) -> Metrics:
        """`{name: {"value", "low", "high"}}`, the interval at 95 %."""
        return self.result["metrics"]

    def __repr__(self) -> str:
        values = (f"{name}={metric['value']}" for name, metric in self.metrics.items())
        return f"Evaluation({', '.join(values)})"


def evaluate(
    model: str | PathLike[str] | Backend,
    data: str | PathLike[str] | Iterable[str] | Source | Request,
    *,
    metrics: Sequence[str] | str = ("masked",),
    mask_seed: SupportsIndex | Iterable[SupportsIndex] = 0,
    recipe: MaskRecipe | None = None,
    variant: str = "original",
    pseudo_sample: float = 1.0,
    output: str | PathLike[str] | None = None,
    overwrite: bool = False,
    batch_tokens: int = 0,
    allow_batch_coupling: bool = False,
    backend: str = "auto",
    device: str = "auto",
) -> Evaluation:
    """Measure a masked language model, with masks that anyone can reproduce.

    ```python
    import mlmkit
    evaluation = mlmkit.evaluate("artifact", ["O rato roeu a roupa.", "Era uma vez."], metrics=["masked", "pseudo"])
    evaluation.metrics["masked_cross_entropy"]   # {"value": ..., "low": ..., "high": ...}, in nats
    evaluation.tokens.to_pandas().nsmallest(10, "log_prob")
    ```

    `model` is a checkpoint (folder or hub name), an artifact, or what `mlmkit.load` returned. `data` is a list of
    texts, the name of a set (`mlmkit eval --list-sets`), or a file's path. `metrics`: `masked` (cross-entropy and what
    goes with it) and `pseudo` (exact pseudo-likelihood; `variant` `original` or `within-word`, on a share
    `pseudo_sample` of the tokens); a set of pairs is measured by its pairs. Several `mask_seed`s give the spread
    between masks.

    With `output` the result is kept in that folder, and an interrupted call goes on where it stopped. Raises
    `mlmkit.UserError` for what cannot be measured and `mlmkit.CheckError` when a score is not finite.
    """
    loaded = load(model, backend, device) if isinstance(model, str | PathLike) else model
    wanted = _find(data)
    is_pairs = isinstance(wanted, Request) and wanted.task == "pairs"
    settings = Settings(
        metrics=("pseudo",) if is_pairs else (metrics,) if isinstance(metrics, str) else tuple(metrics),
        recipe=recipe or MaskRecipe(),
        mask_seeds=_seeds(mask_seed),
        variant=variant,
        pseudo_sample=pseudo_sample,
    )
    is_request = isinstance(wanted, Request)
    material = wanted.read(loaded.tokenizer) if is_request else GivenTexts(wanted, loaded.tokenizer)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(output) if output else Path(temporary) / "result"
        result = run_evaluation(
            loaded,
            material,
            settings,
            folder,
            declared=wanted.declared if is_request else None,
            batch_tokens=batch_tokens,
            allow_batch_coupling=allow_batch_coupling,
            overwrite=overwrite,
        )
        tables = [pq.read_table(folder / name) for name in (TOKENS, DOCUMENTS)]
        if output and changed_file(folder, result["files"]):
            raise UserError(f"another process has written to {folder} meanwhile: choose another output")
        return Evaluation(result, *tables)


def pseudo_log_likelihood(
    model: str | PathLike[str] | Backend,
    texts: Iterable[str],
    *,
    variant: str = "original",
    batch_tokens: int = 0,
    allow_batch_coupling: bool = False,
    backend: str = "auto",
    device: str = "auto",
) -> list[TextScore]:
    """Pseudo-log-likelihood of each text, in nats: every token masked alone (Salazar et al. 2020).

    ```python
    good, bad = mlmkit.pseudo_log_likelihood("artifact", ["The keys are here.", "The keys is here."])
    good.pseudo_log_likelihood > bad.pseudo_log_likelihood
    ```

    An unknown token is scored like any other. A text without a scored token has None, not a sum. `model` and the
    exceptions are those of `evaluate`. With `variant="within-word"` the later tokens of the same word are masked too
    (Kauf and Ivanova 2023).
    """
    if isinstance(texts, str):
        texts = [texts]
    loaded = load(model, backend, device) if isinstance(model, str | PathLike) else model
    return score_texts(
        loaded, texts, variant=variant, batch_tokens=batch_tokens, allow_batch_coupling=allow_batch_coupling
    )


def _seeds(given: SupportsIndex | Iterable[SupportsIndex]) -> tuple[int, ...]:
    """Plain numbers, from numpy's too."""
    try:
        return (index(given),)  # pyright: ignore[reportArgumentType]
    except TypeError:
        pass
    try:
        return tuple(index(seed) for seed in given)  # pyright: ignore[reportGeneralTypeIssues]
    except TypeError:
        raise UserError(f"a mask seed must be a whole number, not {given!r}") from None


def _find(data: str | PathLike[str] | Iterable[str] | Source | Request) -> Iterable[str] | Request:
    if isinstance(data, Source):
        return Request(data.location, "text", data.location, source=data)
    if isinstance(data, str | PathLike):
        return find_set(fspath(data), data_folder(None))
    return data
