"""Evaluating a model: passes over parts, gathered into tables, measured, and the record of it all."""

import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlmkit import __version__
from mlmkit.backends import Backend, capacity
from mlmkit.console import progress
from mlmkit.corpus import Corpus, warn_of_words
from mlmkit.distributed import Ranks
from mlmkit.errors import UserError
from mlmkit.eval.examples import token_examples
from mlmkit.eval.material import Material
from mlmkit.eval.measure import measure, spread
from mlmkit.eval.metrics import PER_TEXT, UNKNOWN_LIMIT
from mlmkit.eval.pair_metrics import measure_pairs
from mlmkit.eval.pairs import PairMaterial
from mlmkit.eval.parts import Part, cut_parts
from mlmkit.eval.passes import Pass, Settings
from mlmkit.eval.plan import Plan
from mlmkit.eval.report import write_report
from mlmkit.eval.scoring import refuse_batch_coupling, score_parts
from mlmkit.eval.sets import EvalSet
from mlmkit.eval.store import PartFacts, Store, part_facts, token_table
from mlmkit.eval.stored import RESULT_FORMAT, Stored
from mlmkit.files import locked
from mlmkit.masking import DIGEST_MODULUS, format_digest

Facts = dict[str, list[PartFacts]]  # by pass


def evaluate(
    backend: Backend,
    material: Material,
    settings: Settings,
    folder: Path,
    *,
    declared: EvalSet | None = None,
    batch_tokens: int = 0,
    allow_batch_coupling: bool = False,
    overwrite: bool = False,
    report: bool = False,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Measure a model into `folder` and return its `result.json`; on other ranks than the first, nothing.

    What an interrupted call with the same arguments left in `folder` is not done again. With `report`, the page is
    written too. Raises `UserError` for unusable text, options or another evaluation there, and `CheckError` when a
    score is not finite.
    """
    ranks = ranks or Ranks()
    began = time.perf_counter()
    refuse_batch_coupling(backend, allow_batch_coupling)
    passes = settings.passes(material.chosen())
    store = Store(folder, _identity(backend, material, settings))
    with ExitStack() as stack:
        ranks.from_first(lambda: stack.enter_context(locked(folder)))
        finished, store.folder = ranks.from_first(lambda: (store.finished(overwrite=overwrite), store.folder))
        if finished:
            if report and ranks.is_first:
                write_report(Stored(store.final, finished))
            return finished
        if ranks.is_first:
            stack.enter_context(store.working())
        if ranks.is_first and ranks.world > 1:
            material.corpus()  # tokenised once for all
        ranks.barrier()
        for item in passes:
            _score(backend, material, item, store, batch_tokens, ranks)
        ranks.barrier()
        if not ranks.is_first:
            return {}
        facts = {item.name: store.parts(item.name) for item in passes}
        _require_tokens(passes, facts, material, store)
        if settings.recipe.whole_word and "masked" in settings.metrics:
            warn_of_words(material.corpus())
        unknown = _unknown(material.corpus(), store.gather(facts, material, backend.tokenizer))
        result: dict[str, Any] = {
            "format": RESULT_FORMAT,
            "unknown": unknown,
            **_measured(store.folder, settings, material, backend.tokenizer.mask_id, facts),
            **_record(backend, material, settings, passes, facts),
            "set": asdict(declared) if declared else None,
            "identity": store.identity,
            "examples": token_examples(store.folder, passes[0], material.corpus(), backend.tokenizer),
            "seconds": time.perf_counter() - began,
        }
        if unknown["character_share"] > UNKNOWN_LIMIT:
            nothing = {"value": None, "low": None, "high": None}
            result["metrics"] |= {name: nothing for name in PER_TEXT if name in result["metrics"]}
        result = store.finish(result)
        if report:
            write_report(Stored(store.final, result))
        return result


def _score(backend: Backend, material: Material, item: Pass, store: Store, batch_tokens: int, ranks: Ranks) -> None:
    """One pass: every part that is this rank's and not yet done, written as it is finished."""
    room, tokenizer = capacity(backend), backend.tokenizer

    def work(parts: Iterator[Part]) -> Iterator[tuple[Part, Plan]]:
        for part in parts:
            if part.index % ranks.world != ranks.rank or store.part(item.name, part.index):
                bar.advance(task, len(part.corpus))
            else:
                yield part, item.plan(part, tokenizer, room)

    with progress() as bar:
        task = bar.add_task(f"{item.name}, documents", total=material.known_size())
        planned = work(cut_parts(material.blocks(), item.cost))
        began = time.perf_counter()
        for part, plan, scores in score_parts(
            backend,
            planned,
            batch_tokens=batch_tokens,
            advance=lambda documents: bar.advance(task, documents),
        ):
            facts = part_facts(part, plan, tokenizer, time.perf_counter() - began)
            store.write_part(item.name, part.index, token_table(item, part, plan, scores, tokenizer), facts)
            began = time.perf_counter()


def _identity(backend: Backend, material: Material, settings: Settings) -> dict[str, Any]:
    """What an evaluation must share with an unfinished one to go on with it; a batch size changes nothing."""
    return {
        "format": RESULT_FORMAT,
        "text": material.identity(),
        "model": backend.info.fingerprint,
        "tokenizer": backend.tokenizer.fingerprint,
        "backend": [backend.name, backend.device, backend.info.precision],
        **settings.describe(),
    }


def _require_tokens(passes: Sequence[Pass], facts: Facts, material: Material, store: Store) -> None:
    """Raise `UserError` when a metric has no token at all."""
    problems = {
        "masked": "the masks select no token (never an unknown one): use more text or a higher --mask-prob",
        "pseudo": "there is no token to score",
    }
    for metric in {item.metric for item in passes}:
        if not any(part.scored for item in passes if item.metric == metric for part in facts[item.name]):
            store.discard()
            raise UserError(f"{material.describe()['location']}: {problems[metric]}")


def _measured(folder: Path, settings: Settings, material: Material, mask_id: int, facts: Facts) -> dict[str, Any]:
    """The numbers: everything that follows from the two tables."""
    documents, digests = len(material.corpus()), {name: format_digest(_digest(parts)) for name, parts in facts.items()}
    masked = [f"masked-{seed}" for seed in settings.mask_seeds if "masked" in settings.metrics]
    # Without masked passes, of the positions that pseudo-likelihood scored.
    digest = sum(int(digests[name], 16) for name in masked or digests) % DIGEST_MODULUS
    found: dict[str, Any] = {"metrics": {}, "mask_digest": format_digest(digest), "digests": digests, "slices": {}}
    if masked:
        measured = measure(folder, "masked", settings.mask_seeds, documents, mask_id)
        found["metrics"] |= measured.metrics
        found["slices"]["masked"] = measured.slices
        if len(masked) > 1:
            by_seed = {
                seed: {"mask_digest": digests[f"masked-{seed}"], **values} for seed, values in measured.by_seed.items()
            }
            found["mask_seeds"] = {"by_seed": by_seed, "spread": spread(measured.by_seed)}
    if isinstance(material, PairMaterial):
        found["metrics"], found["pairs"] = measure_pairs(folder)
    elif "pseudo" in settings.metrics:
        measured = measure(folder, "pseudo", [None], documents, mask_id)
        found["metrics"] |= measured.metrics
        found["slices"]["pseudo"] = measured.slices
    return found


def _unknown(corpus: Corpus, tokens: int) -> dict[str, Any]:
    """How much of the text the tokenizer has no token for: counts, and shares of all tokens and all characters."""
    shares = {"token_share": tokens / len(corpus.ids), "character_share": corpus.unknown_share}
    return {"tokens": tokens, "characters": int(corpus.text_sizes[:, 3].sum()), **shares}


def _record(
    backend: Backend, material: Material, settings: Settings, passes: Sequence[Pass], facts: Facts
) -> dict[str, Any]:
    """What was measured, by what, and how fast."""
    by_metric: dict[str, list[PartFacts]] = {}
    for item in passes:
        by_metric.setdefault(item.metric, []).extend(facts[item.name])
    scored = {metric: sum(part.scored for part in parts) for metric, parts in by_metric.items()}
    described = settings.describe()
    masking = {"seed": settings.mask_seeds[0], "selected": scored.get("masked", 0)}
    return {
        "corpus": _describe_corpus(material, capacity(backend)),
        "masking": {**described["masking"], **masking},
        "pseudo": described["pseudo"],
        "scored": scored,
        "model": {
            **asdict(backend.info),
            "tokenizer": backend.tokenizer.fingerprint,
            "mask_id": backend.tokenizer.mask_id,
        },
        "backend": {"name": backend.name, "device": backend.device},
        "batch_coupling": backend.info.couples_batch,
        "timing": {metric: _timing(parts) for metric, parts in by_metric.items()},
        "versions": _versions(),
        "command": sys.argv,
    }


def _digest(facts: Sequence[PartFacts]) -> int:
    return sum(int(part.digest, 16) for part in facts) % DIGEST_MODULUS


def _timing(facts: Sequence[PartFacts]) -> dict[str, float]:
    seconds = sum(part.seconds for part in facts)
    rows, tokens = (sum(getattr(part, name) for part in facts) for name in ("rows", "tokens"))
    return {"seconds": seconds, "rows": rows, "tokens_per_second": tokens / seconds}


def _describe_corpus(material: Material, room: int) -> dict[str, Any]:
    corpus = material.corpus()
    lengths = corpus.lengths
    words, characters, size, _ = corpus.text_sizes.sum(axis=0).tolist()
    return {
        "source": material.describe(),
        "fingerprint": corpus.fingerprint,
        "documents": len(corpus),
        "empty_texts": corpus.empty_texts,
        "documents_without_tokens": int((lengths == 0).sum()),
        "windowed_documents": int((lengths > room).sum()),
        "tokens": int(lengths.sum()),
        "words": words,
        "characters": characters,
        "bytes": size,
    }


def _versions() -> dict[str, str]:
    found = {"mlmkit": __version__, "python": platform.python_version()}
    for package in ("numpy", "onnxruntime", "onnxruntime-gpu", "tokenizers", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
