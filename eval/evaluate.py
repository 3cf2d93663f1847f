"""Evaluate a model.

    data → parts → rows of each pass (`rows`) → scores (`scoring`) → stored parts (`results_store`)
    stored parts → tokens.parquet + documents.parquet → metrics (`metrics`, `item_metrics`) → result.json → report.html

Every part is stored as soon as it is scored, so an interrupted evaluation resumes after its last part.
"""

import logging
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mlmkit import __version__
from mlmkit.backends import Backend, capacity
from mlmkit.distributed import Ranks
from mlmkit.errors import UserError
from mlmkit.eval.correlation import measure_correlations
from mlmkit.eval.data import EvalData, Part, cut_parts
from mlmkit.eval.examples import token_examples
from mlmkit.eval.item_data import ItemData
from mlmkit.eval.item_metrics import item_scores, measure_items
from mlmkit.eval.metrics import PER_TEXT, UNKNOWN_LIMIT, measure, seed_spread
from mlmkit.eval.report import write_report
from mlmkit.eval.result import RESULT_FORMAT, Result, Timing
from mlmkit.eval.results_store import PartRecord, ResultsStore, StoredResult, token_table
from mlmkit.eval.rows import Pass, Rows, Settings
from mlmkit.eval.scoring import refuse_batch_coupling, score_parts
from mlmkit.eval.sets import EvalSet
from mlmkit.eval.statistics import unigram_entropy
from mlmkit.files import locked
from mlmkit.masking import DIGEST_MODULUS, format_digest
from mlmkit.overlap import find_overlap
from mlmkit.progress import progress
from mlmkit.stored import warn_of_words

log = logging.getLogger(__name__)

Records = dict[str, list[PartRecord]]  # by name of the pass


def run_evaluation(
    backend: Backend,
    data: EvalData,
    settings: Settings,
    folder: Path,
    *,
    declared: EvalSet | None = None,
    batch_tokens: int = 0,
    allow_batch_coupling: bool = False,
    overwrite: bool = False,
    report: bool = False,
    ranks: Ranks | None = None,
) -> Result:
    """Evaluate a model into `folder`, with the HTML page if `report`, and return its `result.json`.

    A call with the same arguments resumes what an interrupted one left in `folder`, and returns a finished result at
    once. All `ranks` share the parts; those other than the first return an empty result.

    Raises `UserError` for unusable text or options, or if another evaluation is in `folder`, and `CheckError` when a
    score is not finite.
    """
    ranks = ranks or Ranks()
    began = time.perf_counter()
    refuse_batch_coupling(backend, allow_batch_coupling)
    passes = settings.passes(data.pseudo_targets())
    store = ResultsStore(folder, _identity(backend, data, settings, declared))
    with ExitStack() as stack:
        ranks.from_first(lambda: stack.enter_context(locked(folder)))
        finished, store.folder = ranks.from_first(lambda: (store.finished(overwrite=overwrite), store.folder))
        if finished:
            if ranks.is_first:
                log.info("%s is finished: nothing to evaluate", folder)
                if report:
                    write_report(StoredResult(store.final, finished))
            return finished
        if ranks.is_first:
            stack.enter_context(store.working())
            if count := store.count_parts():
                log.info("%s: resuming, %d parts of the text are scored already", folder, count)
        ranks.barrier()
        for item in passes:
            _score_pass(backend, data, item, store, batch_tokens, ranks)
        ranks.barrier()
        if not ranks.is_first:
            return cast(Result, {})
        records = {item.name: store.parts(item.name) for item in passes}
        _require_tokens(passes, records, data, store)
        if settings.recipe.whole_word and "masked" in settings.metrics:
            warn_of_words(data.corpus)
        frequency = store.write_tables(records, data, backend.tokenizer)
        result = _build_result(backend, data, settings, passes, records, store, frequency, declared)
        result["seconds"] = time.perf_counter() - began
        result = store.finish(result)
        if report:
            write_report(StoredResult(store.final, result))
        return result


def _score_pass(
    backend: Backend, data: EvalData, item: Pass, store: ResultsStore, batch_tokens: int, ranks: Ranks
) -> None:
    """Score and store every part of a pass that is this rank's and not stored yet."""
    room, tokenizer = capacity(backend), backend.tokenizer

    def remaining(parts: Iterator[Part]) -> Iterator[tuple[Part, Rows]]:
        for part in parts:
            if part.index % ranks.world != ranks.rank or store.part(item.name, part.index):
                bar.advance(len(part.corpus))
            else:
                yield part, item.rows(part, tokenizer, room)

    with progress(item.title, len(data.corpus), "documents") as bar:
        work = remaining(cut_parts(data.corpus.blocks(), item.cost))
        began = time.perf_counter()
        for part, rows, scores in score_parts(backend, work, batch_tokens=batch_tokens, advance=bar.advance):
            record = PartRecord.of(part, rows, tokenizer, time.perf_counter() - began)
            store.write_part(item.name, part.index, token_table(item, part, rows, scores, tokenizer), record)
            began = time.perf_counter()


def _identity(backend: Backend, data: EvalData, settings: Settings, declared: EvalSet | None) -> dict[str, Any]:
    """Everything that must be equal for a call to resume an unfinished evaluation. A different batch size is fine."""
    return {
        "format": RESULT_FORMAT,
        "text": data.corpus.fingerprint,
        "model": backend.info.fingerprint,
        "tokenizer": backend.tokenizer.fingerprint,
        "backend": [backend.name, backend.device, backend.info.precision],
        **settings.describe(),
        "correlation": repr(declared.correlation if declared else ()),
    }


def _require_tokens(passes: Sequence[Pass], records: Records, data: EvalData, store: ResultsStore) -> None:
    """Raise `UserError` when a kind of score has no token."""
    problems = {
        "masked": "the masks select no token (never an unknown one): use more text or a higher --mask-prob",
        "pseudo": "there is no token to score",
    }
    for metric in {item.metric for item in passes}:
        if not any(record.scored for item in passes if item.metric == metric for record in records[item.name]):
            store.discard()
            raise UserError(f"{data.source['location']}: {problems[metric]}")


# ---------------------------------------------------------------- result.json


def _build_result(
    backend: Backend,
    data: EvalData,
    settings: Settings,
    passes: Sequence[Pass],
    records: Records,
    store: ResultsStore,
    frequency: NDArray[np.int64],
    declared: EvalSet | None,
) -> Result:
    """The result of an evaluation whose tables are in the store's folder, but for its `seconds`.

    `frequency` counts each id of the corpus, `[vocabulary]`.
    """
    corpus, mask_id, described = data.corpus, backend.tokenizer.mask_id, settings.describe()
    lengths, unk_id = corpus.lengths, backend.tokenizer.unk_id
    unknown_tokens = 0 if unk_id is None else int(frequency[unk_id])
    words, characters, size, unknown_characters = corpus.sizes.values()
    by_metric: Records = {}
    for item in passes:
        by_metric.setdefault(item.metric, []).extend(records[item.name])
    scored = {metric: sum(record.scored for record in parts) for metric, parts in by_metric.items()}
    digests = {name: sum(int(record.digest, 16) for record in parts) for name, parts in records.items()}
    masked = [item.name for item in passes if item.metric == "masked"]
    result: Result = {
        "format": RESULT_FORMAT,
        "unknown": {
            "tokens": unknown_tokens,
            "characters": unknown_characters,
            "token_share": unknown_tokens / corpus.tokens,
            "character_share": corpus.unknown_share,
        },
        "metrics": {},
        "unigram_entropy": unigram_entropy(frequency[~backend.tokenizer.masking.is_special]),
        "mask_digest": _format_digest(sum(digests[name] for name in masked or digests)),
        "digests": {name: _format_digest(digest) for name, digest in digests.items()},
        "slices": {},
        "corpus": {
            "source": data.source,
            "fingerprint": corpus.fingerprint,
            "documents": len(corpus),
            "empty_texts": corpus.empty_texts,
            "documents_without_tokens": int((lengths == 0).sum()),
            "windowed_documents": int((lengths > capacity(backend)).sum()),
            "tokens": corpus.tokens,
            "words": words,
            "characters": characters,
            "bytes": size,
            "overlap": find_overlap(backend.info.path, corpus),
        },
        "masking": {**described["masking"], "seed": settings.mask_seeds[0], "selected": scored.get("masked", 0)},
        "pseudo": described["pseudo"],
        "scored": scored,
        "model": {
            **cast(Any, asdict(backend.info)),
            "tokenizer": backend.tokenizer.fingerprint,
            "mask_id": mask_id,
        },
        "backend": {"name": backend.name, "device": backend.device},
        "batch_coupling": backend.info.couples_batch,
        "timing": {metric: _timing(parts) for metric, parts in by_metric.items()},
        "versions": _versions(),
        "command": sys.argv,
        "set": asdict(declared) if declared else None,
        "identity": store.identity,
        "examples": token_examples(store.folder, passes[0], data, backend.tokenizer),
        "seconds": 0.0,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    for metric in by_metric:
        if metric == "pseudo" and isinstance(data, ItemData):
            scores = item_scores(store.folder, data.source["normalisation"])
            metrics, result["items"] = measure_items(store.folder, scores, data.source)
            correlations = declared.correlation if declared else ()
            correlated, counts = measure_correlations(store.folder, scores, correlations)
            result["metrics"] |= metrics | correlated
            result["items"] |= {"correlated": counts} if counts else {}
            continue
        seeds = settings.mask_seeds if metric == "masked" else [None]
        measured = measure(store.folder, metric, seeds, len(corpus), mask_id)
        result["metrics"] |= measured.metrics
        result["slices"][metric] = measured.slices
        if len(seeds) > 1:
            digest_of = {seed: result["digests"][f"masked-{seed}"] for seed in measured.by_seed}
            by_seed = {seed: {"mask_digest": digest_of[seed], **own} for seed, own in measured.by_seed.items()}
            result["mask_seeds"] = {"by_seed": by_seed, "spread": seed_spread(measured.by_seed)}
    if "items" in result and declared and declared.metric and declared.metric not in result["metrics"]:
        known = ", ".join(result["metrics"])
        raise UserError(f"{declared.name} cannot have the main metric {declared.metric!r}: choose {known}")
    if corpus.unknown_share > UNKNOWN_LIMIT:
        for name in result["metrics"].keys() & PER_TEXT:
            result["metrics"][name] = {"value": None, "low": None, "high": None}
    return result


def _format_digest(digest: int) -> str:
    return format_digest(digest % DIGEST_MODULUS)


def _timing(parts: Sequence[PartRecord]) -> Timing:
    seconds, tokens = sum(part.seconds for part in parts), sum(part.tokens for part in parts)
    return {"seconds": seconds, "rows": sum(part.rows for part in parts), "tokens_per_second": tokens / seconds}


def _versions() -> dict[str, str]:
    versions = {"mlmkit": __version__, "python": platform.python_version()}
    for package in ("numpy", "onnxruntime", "onnxruntime-gpu", "tokenizers", "torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
