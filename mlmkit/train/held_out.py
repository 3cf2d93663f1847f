"""The held-out texts, evaluated at every checkpoint and, for a model that was already trained, before the first step.

The masks are mask-v1's default recipe with seed 0, whatever the run trains with, so any two checkpoints compare.
`CHECKPOINT/held-out` is a result of `mlmkit eval`; each of several texts has a `CHECKPOINT/held-out-NAME`.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mlmkit.backends import Backend, load
from mlmkit.distributed import Ranks
from mlmkit.errors import UserError
from mlmkit.eval.data import file_data
from mlmkit.eval.evaluate import run_evaluation
from mlmkit.eval.rows import Settings
from mlmkit.locations import Source
from mlmkit.masking import DIGEST_MODULUS, corrupt, format_digest, mask_digest
from mlmkit.model import MaskedLM
from mlmkit.stored import StoredCorpus
from mlmkit.token_cache import load_corpus
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.checkpoints import INITIAL, held_out_folder, last_checkpoint, read_remeasurable, save_initial
from mlmkit.train.config import HELD_OUT, Config

log = logging.getLogger(__name__)

SETTINGS = Settings()
Results = dict[str, dict[str, Any]]  # `result.json` of each held-out text by its name, in the configuration's order


def held_out_digests(
    config: Config, tokenizer: Tokenizer, corpora: Mapping[str, StoredCorpus] | None = None
) -> dict[str, str]:
    """The mask digest of each held-out text by its name, which identifies its evaluations.

    `corpora` are the texts if they are already loaded. Raises `UserError` when the masks select no token of one.
    """
    corpora = corpora or {name: load_corpus(source, tokenizer) for name, source in config.held_out_sources.items()}
    return {name: _digest(corpus, tokenizer) for name, corpus in corpora.items()}


def _digest(corpus: StoredCorpus, tokenizer: Tokenizer) -> str:
    digest = targets = 0
    for block in corpus.blocks():
        text, seed = (block.ids, block.lengths, block.keys), SETTINGS.mask_seeds[0]
        corruption = corrupt(*text, SETTINGS.recipe, tokenizer.masking, seed=seed)
        digest += mask_digest(corruption, *text[1:])
        targets += len(corruption.selected)
    if not targets:
        raise UserError(f"the masks select no token of the held-out text {corpus.name}: use a longer text")
    return format_digest(digest % DIGEST_MODULUS)


def evaluate_checkpoint(
    checkpoint: Path, config: Config, digests: Mapping[str, str], device: str, ranks: Ranks
) -> Results:
    """The checkpoint's results on all held-out texts, which are made unless they exist; every rank takes part.

    An existing result with another mask digest, which means another text, is kept as `held-out-DIGEST`.
    """
    backend = cache(lambda: load(str(checkpoint), "torch", device))
    return {
        name: _evaluate(backend, checkpoint, name, source, digests[name], ranks)
        for name, source in config.held_out_sources.items()
    }


def _evaluate(
    backend: Callable[[], Backend], checkpoint: Path, name: str, source: Source, digest: str, ranks: Ranks
) -> dict[str, Any]:
    folder = held_out_folder(checkpoint, name)
    result = ranks.from_first(lambda: read_remeasurable(folder / "result.json"))
    if result and result["mask_digest"] == digest:
        return result
    if result:
        kept = checkpoint / f"{HELD_OUT}-{result['mask_digest'][:8]}"
        log.info("%s was evaluated on another text than %s: see %s", checkpoint, source.name, kept)
        ranks.from_first(lambda: (shutil.rmtree(kept, ignore_errors=True), folder.rename(kept)))
    data = file_data(source, backend().tokenizer)
    # Overwrites what a killed evaluation of another text left behind.
    run_evaluation(backend(), data, SETTINGS, folder, overwrite=True, ranks=ranks)
    return ranks.from_first(lambda: read_remeasurable(folder / "result.json") or {})


def evaluate_initial(
    run: Path, model: MaskedLM, config: Config, digests: Mapping[str, str], device: str, ranks: Ranks
) -> Results:
    """The results of the model before its first step, written to `RUN/initial`; every rank takes part.

    Empty without held-out texts, and for a run that has checkpoints but no `initial`: it is too late then.
    """
    folder = run / INITIAL
    exists, is_late = ranks.from_first(lambda: (folder.exists(), last_checkpoint(run) is not None))
    if not digests or (is_late and not exists):
        return {}
    if not exists:
        save_initial(run, model, ranks)
    return evaluate_checkpoint(folder, config, digests, device, ranks)
