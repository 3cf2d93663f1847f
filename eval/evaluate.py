"""Evaluating a model on a corpus: plan, score, measure, and the record of it all."""

import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlmkit import __version__
from mlmkit.backends import Backend, Scored, capacity
from mlmkit.corpus import Corpus, Source, load_corpus
from mlmkit.errors import UserError
from mlmkit.eval.metrics import masked_metrics, pseudo_metrics
from mlmkit.eval.plan import VARIANTS, Plan, corrupt_corpus, masked_plan, pseudo_plan
from mlmkit.eval.scoring import run_plan, shown_ids
from mlmkit.eval.statistics import Metrics
from mlmkit.files import new_folder
from mlmkit.masking import MaskRecipe, format_digest
from mlmkit.progress import progress

RESULT_FORMAT = 1
METRICS = ("masked", "pseudo")


@dataclass(frozen=True)
class PseudoOptions:
    """`variant`: `original` or `within-word`. `sample`: the share of tokens to score, chosen by mask-v1."""

    variant: str = "original"
    sample: float = 1.0

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise UserError(f"no pseudo-likelihood variant {self.variant!r}: choose {' or '.join(VARIANTS)}")
        if not 0.0 < self.sample <= 1.0:
            raise UserError(f"the pseudo-likelihood sample must be above 0 and at most 1, not {self.sample}")


@dataclass(frozen=True)
class Evaluation:
    """`result` is what `result.json` holds, `tokens` what `tokens.parquet` holds: a row a scored token."""

    result: dict[str, Any]
    tokens: pa.Table

    @property
    def metrics(self) -> Metrics:
        """`{name: {value, low, high}}`."""
        return self.result["metrics"]


def evaluate(
    backend: Backend,
    source: Source,
    *,
    metrics: Sequence[str] = ("masked",),
    recipe: MaskRecipe | None = None,
    mask_seed: int = 0,
    pseudo: PseudoOptions | None = None,
    batch_tokens: int = 0,
) -> Evaluation:
    """Measure a model on a corpus.

    Raises `UserError` for unusable text or options and `CheckError` when a score is not finite.
    """
    recipe, pseudo = recipe or MaskRecipe(), pseudo or PseudoOptions()
    for metric in metrics:
        if metric not in METRICS:
            raise UserError(f"no metric {metric!r}: choose {' or '.join(METRICS)}")
    began = time.perf_counter()
    corpus = load_corpus(source, backend.tokenizer)
    room = capacity(backend)
    corruption, digest = corrupt_corpus(corpus, backend.tokenizer, recipe, mask_seed)
    is_special = backend.tokenizer.masking.is_special
    plans: list[Plan] = []
    if "masked" in metrics:
        if not len(corruption.selected):
            raise UserError(f"{source.location}: the masks select no token: use more text or a higher --mask-prob")
        plans.append(masked_plan(corpus, corruption, room))
    if "pseudo" in metrics:
        sample = None
        if pseudo.sample < 1:
            selecting = MaskRecipe(mask_prob=pseudo.sample)
            sample = corrupt_corpus(corpus, backend.tokenizer, selecting, mask_seed)[0].selected
        plans.append(pseudo_plan(corpus, backend.tokenizer, room, pseudo.variant, sample))
        if not len(plans[-1]):
            raise UserError(f"{source.location}: there is no token to score")

    measured: Metrics = {}
    tables, timing = [], {}
    for plan in plans:
        scored, seconds = _run_with_progress(backend, corpus, plan, batch_tokens)
        if plan.metric == "masked":
            measured |= masked_metrics(corpus, plan, scored)
        else:
            ordinary = np.flatnonzero(~is_special[corpus.ids])
            document = np.searchsorted(corpus.starts, ordinary, side="right") - 1
            scorable = np.bincount(document, minlength=len(corpus))
            measured |= pseudo_metrics(corpus, plan, scored, scorable)
        tables.append(_token_table(corpus, plan, scored, backend.tokenizer.mask_id))
        tokens = int(plan.rows.length.sum()) + len(plan) * backend.tokenizer.added_tokens
        timing[plan.metric] = {"seconds": seconds, "rows": len(plan), "tokens_per_second": tokens / seconds}

    result = {
        "format": RESULT_FORMAT,
        "metrics": measured,
        "mask_digest": format_digest(digest),
        "corpus": {
            "source": asdict(source),
            "fingerprint": corpus.fingerprint,
            "documents": len(corpus),
            "documents_without_tokens": int((corpus.lengths == 0).sum()),
            "windowed_documents": int((corpus.lengths > room).sum()),
            "tokens": len(corpus.ids),
            "words": int(corpus.text_sizes[:, 0].sum()),
            "characters": int(corpus.text_sizes[:, 1].sum()),
            "bytes": int(corpus.text_sizes[:, 2].sum()),
        },
        "masking": {**recipe.describe(), "seed": mask_seed, "epoch": 0, "selected": len(corruption.selected)},
        "scored": {plan.metric: len(plan.offset) for plan in plans},
        "model": {**asdict(backend.info), "tokenizer": backend.tokenizer.fingerprint},
        "backend": {"name": backend.name, "device": backend.device},
        "seconds": time.perf_counter() - began,
        "timing": timing,
        "versions": _versions(),
        "command": sys.argv,
    }
    if "pseudo" in metrics:
        result["pseudo"] = asdict(pseudo)
    return Evaluation(result, pa.concat_tables(tables))


def write_evaluation(evaluation: Evaluation, folder: Path, *, overwrite: bool = False) -> None:
    """`result.json` and `tokens.parquet`, both or neither. Raises `UserError` if the folder exists."""
    with new_folder(folder, replaces="result.json" if overwrite else "") as building:
        (building / "result.json").write_text(json.dumps(evaluation.result, indent=2) + "\n", encoding="utf-8")
        pq.write_table(evaluation.tokens, building / "tokens.parquet", compression="zstd")


def _run_with_progress(backend: Backend, corpus: Corpus, plan: Plan, batch_tokens: int) -> tuple[Scored, float]:
    began = time.perf_counter()
    with progress() as bar:
        task = bar.add_task(f"{plan.metric} rows", total=len(plan))
        scored = run_plan(backend, corpus, plan, batch_tokens, lambda rows: bar.advance(task, rows))
    return scored, time.perf_counter() - began


def _token_table(corpus: Corpus, plan: Plan, scored: Scored, mask_id: int) -> pa.Table:
    flat = corpus.starts[plan.document] + plan.offset
    words = corpus.words[flat].astype(np.int32)
    return pa.table(
        {
            "document": plan.document.astype(np.int64),
            "offset": plan.offset.astype(np.int32),
            "token_id": corpus.ids[flat].astype(np.int32),
            "input_id": shown_ids(corpus, plan, mask_id).astype(np.int32),
            "word": pa.array(words, mask=words < 0),
            "log_prob": scored.log_prob,
            "rank": scored.rank.astype(np.int32),
            "metric": pa.array([plan.metric] * len(flat)),
        }
    )


def _versions() -> dict[str, str]:
    found = {"mlmkit": __version__, "python": platform.python_version()}
    for package in ("numpy", "onnxruntime", "onnxruntime-gpu", "tokenizers", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
