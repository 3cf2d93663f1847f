"""The held-out text, evaluated at every checkpoint.

The masks are mask-v1's default recipe with seed 0, whatever the run trains with, so any two checkpoints compare.
`CHECKPOINT/held-out` is a result of `mlmkit eval`.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

from mlmkit.backends import load
from mlmkit.corpus import Corpus, load_corpus
from mlmkit.distributed import Ranks
from mlmkit.errors import UserError
from mlmkit.eval.data import FileData
from mlmkit.eval.evaluate import run_evaluation
from mlmkit.eval.rows import Settings
from mlmkit.masking import DIGEST_MODULUS, corrupt, format_digest, mask_digest
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.checkpoints import HELD_OUT, held_out_result
from mlmkit.train.config import Config

log = logging.getLogger(__name__)

SETTINGS = Settings()


def held_out_digest(config: Config, tokenizer: Tokenizer, corpus: Corpus | None = None) -> str:
    """The mask digest of the held-out text, which identifies its evaluations; "" without one.

    `corpus` is the held-out text if it is already loaded. Raises `UserError` when the masks select no token.
    """
    if not config.data.held_out:
        return ""
    digest = targets = 0
    for block in (corpus or load_corpus(config.data.held_out_source, tokenizer)).blocks():
        text, seed = (block.ids, block.lengths, block.keys), SETTINGS.mask_seeds[0]
        corruption = corrupt(*text, SETTINGS.recipe, tokenizer.masking, seed=seed)
        digest += mask_digest(corruption, *text[1:])
        targets += len(corruption.selected)
    if not targets:
        raise UserError(f"data.held_out: the masks select no token of {config.data.held_out}: use a longer text")
    return format_digest(digest % DIGEST_MODULUS)


def evaluate_checkpoint(checkpoint: Path, config: Config, digest: str, device: str, ranks: Ranks) -> dict[str, Any]:
    """`result.json` of `CHECKPOINT/held-out`, which is made unless it exists; every rank takes part.

    An existing result with another mask digest, so of another text, is kept as `held-out-DIGEST`.
    """
    folder, source = checkpoint / HELD_OUT, config.data.held_out_source
    result = ranks.from_first(lambda: held_out_result(checkpoint))
    if result and result["mask_digest"] == digest:
        return result
    if result:
        kept = folder.with_name(f"{HELD_OUT}-{result['mask_digest'][:8]}")
        log.info("%s was evaluated on another text than %s: see %s", checkpoint, source.location, kept)
        ranks.from_first(lambda: (shutil.rmtree(kept, ignore_errors=True), folder.rename(kept)))
    backend = load(str(checkpoint), "torch", device)
    # Overwrites what a killed evaluation of another text left behind.
    run_evaluation(backend, FileData(source, backend.tokenizer), SETTINGS, folder, overwrite=True, ranks=ranks)
    return ranks.from_first(lambda: held_out_result(checkpoint) or {})
