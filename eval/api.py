"""Evaluation from Python: `mlmkit.evaluate`."""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from os import PathLike, fspath
from pathlib import Path
from typing import SupportsIndex

import pyarrow as pa
import pyarrow.parquet as pq

from mlmkit.backends import Backend, load
from mlmkit.errors import UserError
from mlmkit.eval.data import texts_data
from mlmkit.eval.evaluate import run_evaluation
from mlmkit.eval.result import Metrics, Result
from mlmkit.eval.results_store import DOCUMENTS, TOKENS
from mlmkit.eval.rows import Settings
from mlmkit.eval.sets import Request, data_folder, find_set
from mlmkit.files import changed_file
from mlmkit.locations import Source
from mlmkit.masking import MaskRecipe


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    `result` is the content of `result.json`. `tokens` has one row per scored token and `documents` one per document,
    as Arrow tables (`.to_pandas()`) with the columns that `docs/evaluation.md` lists.
    """

    result: Result
    tokens: pa.Table
    documents: pa.Table

    @property
    def metrics(self) -> Metrics:
        """`{name: {"value", "low", "high"}}`, with the 95 % interval."""
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
    variant: str | None = None,
    pseudo_sample: float = 1.0,
    output: str | PathLike[str] | None = None,
    overwrite: bool = False,
    batch_tokens: int = 0,
    allow_batch_coupling: bool = False,
    backend: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Evaluation:
    """Evaluate a masked language model, with masks that others can reproduce exactly.

    ```python
    import mlmkit
    evaluation = mlmkit.evaluate("artifact", ["O rato roeu a roupa.", "Era uma vez."], metrics=["masked", "pseudo"])
    evaluation.metrics["masked_cross_entropy"]   # {"value": ..., "low": ..., "high": ...}, in nats
    evaluation.tokens.to_pandas().nsmallest(10, "log_prob")
    ```

    `model` is a checkpoint (folder or hub name), an artifact, or what `mlmkit.load` returned. `data` is a list of
    texts, the name of a set (`mlmkit eval --list-sets`), or a file's path. `metrics`: `masked` (cross-entropy, accuracy
    and similar) and `pseudo` (exact pseudo-likelihood; `variant` `original` or `within-word`, on a share
    `pseudo_sample` of the tokens), or `pairs`, for a file of pairs. A set of items (pairs, choices, cloze) is always
    measured by them, in the variant that it declares. Several `mask_seed`s give the spread between masks.

    `backend`, `device` and `trust_remote_code` are those of `mlmkit.load`, for a `model` that is not loaded yet. With
    `output` the result is kept in that folder, and the same call resumes an interrupted one. Raises
    `mlmkit.UserError` for data or options that cannot be used, and `mlmkit.CheckError` when a score is not finite.
    """
    is_path = isinstance(model, str | PathLike)
    loaded = load(model, backend, device, trust_remote_code) if is_path else model
    wanted = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    if isinstance(data, Source):
        data = Request(data.name, "text", data.name, source=data)
    elif isinstance(data, str | PathLike):
        data = find_set(fspath(data), data_folder(None), pairs="pairs" in wanted)
    request = data if isinstance(data, Request) else None
    if request and request.task != "text":
        wanted = ("pseudo",)
    elif "pairs" in wanted:
        raise UserError("the metric pairs is for a file or set of pairs, and this is text: choose masked or pseudo")
    settings = Settings(
        metrics=wanted,
        recipe=recipe or MaskRecipe(),
        mask_seeds=_seeds(mask_seed),
        variant=variant or "original",
        pseudo_sample=pseudo_sample,
    )
    if request:
        settings = request.settings(settings, variant)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(output) if output else Path(temporary) / "result"
        result = run_evaluation(
            loaded,
            data.read(loaded.tokenizer) if isinstance(data, Request) else texts_data(data, loaded.tokenizer),
            settings,
            folder,
            declared=request.declared if request else None,
            batch_tokens=batch_tokens,
            allow_batch_coupling=allow_batch_coupling,
            overwrite=overwrite,
        )
        tokens, documents = (pq.read_table(folder / name) for name in (TOKENS, DOCUMENTS))
        if output and changed_file(folder, result.get("files", {})):
            raise UserError(f"another process has written to {folder} meanwhile: choose another output")
        return Evaluation(result, tokens, documents)


def _seeds(seeds: SupportsIndex | Iterable[SupportsIndex]) -> tuple[int, ...]:
    """Convert seeds to Python integers; numpy's integers are accepted."""
    try:
        return tuple(index(seed) for seed in (seeds if isinstance(seeds, Iterable) else [seeds]))
    except TypeError:
        raise UserError(f"a mask seed must be a whole number, not {seeds!r}") from None
