"""A run's texts: checked before the first step, and the held-out one evaluated at every checkpoint."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlmkit.backends import load
from mlmkit.corpus import Corpus, load_corpus, warn_of_words
from mlmkit.distributed import Ranks
from mlmkit.errors import UserError
from mlmkit.eval.evaluate import evaluate
from mlmkit.eval.material import TextMaterial
from mlmkit.eval.passes import Settings
from mlmkit.masking import DIGEST_MODULUS, corrupt, format_digest, mask_digest
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.checkpoint import HELD_OUT, held_out_result
from mlmkit.train.config import Config

log = logging.getLogger(__name__)

WARN_ABOVE, REFUSE_ABOVE = 0.01, 0.5  # shares of a text's characters that become unknown tokens
# mask-v1's default recipe with seed 0, whatever the run trains with, so that any two checkpoints compare.
SETTINGS = Settings()


def load_texts(config: Config, tokenizer: Tokenizer) -> list[Corpus]:
    """The tokenised texts to train on.

    Raises `UserError` for one, or held-out text, that cannot be read, is mostly unknown, or has nothing to predict.
    """
    corpora = [load_corpus(source, tokenizer) for source in config.data.sources]
    held_out = [load_corpus(config.data.held_out_source, tokenizer)] if config.data.held_out else []
    for corpus in [*corpora, *held_out]:
        characters, (tokens, special) = corpus.unknown_share, token_shares([corpus], tokenizer)
        lost = f"{corpus.name}: {characters:.2%} of the characters ({tokens:.2%} of the tokens) are unknown"
        if characters > WARN_ABOVE:
            lost += ': a tokenizer trained with tokenizer.kind = "bpe" knows all'
        if characters > REFUSE_ABOVE:
            raise UserError(lost)
        if special == 1:
            raise UserError(f"{corpus.name}: every token is a special one, so there is nothing to predict")
        if characters:
            log.log(logging.WARNING if characters > WARN_ABOVE else logging.INFO, lost)
    if config.masking.whole_word:
        for corpus in corpora:
            warn_of_words(corpus)
    held_out_digest(config, tokenizer, *held_out)
    return corpora


def token_shares(corpora: Sequence[Corpus], tokenizer: Tokenizer) -> tuple[float, float]:
    """Shares of the tokens that are unknown, and that are special."""
    counts = np.zeros(tokenizer.vocabulary_size)
    for block in (block for corpus in corpora for block in corpus.blocks()):
        counts += np.bincount(block.ids, minlength=len(counts))
    unknown = [] if tokenizer.unk_id is None else [tokenizer.unk_id]
    counts /= max(counts.sum(), 1)
    return float(counts[unknown].sum()), float(counts[sorted(tokenizer.special_ids)].sum())


def held_out_digest(config: Config, tokenizer: Tokenizer, corpus: Corpus | None = None) -> str:
    """The mask digest of every evaluation of the held-out text, which identifies it; empty if there is none.

    `corpus` is that text where it has been loaded already. Raises `UserError` when the masks select no token.
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
    """`result.json` of `CHECKPOINT/held-out`, evaluated now unless it is there already; every rank takes part.

    A result with another mask digest is that of another text: it stays as `held-out-DIGEST`.
    """
    folder, source = checkpoint / HELD_OUT, config.data.held_out_source
    found = ranks.from_first(lambda: held_out_result(checkpoint))
    if found and found["mask_digest"] == digest:
        return found
    if found:
        kept = folder.with_name(f"{HELD_OUT}-{found['mask_digest'][:8]}")
        log.info("%s was evaluated on another text than %s: see %s", checkpoint, source.location, kept)
        ranks.from_first(lambda: (shutil.rmtree(kept, ignore_errors=True), folder.rename(kept)))
    backend = load(str(checkpoint), "torch", device)
    # It overwrites what an evaluation of another text that was killed has left.
    evaluate(backend, TextMaterial(source, backend.tokenizer), SETTINGS, folder, overwrite=True, ranks=ranks)
    return ranks.from_first(lambda: held_out_result(checkpoint) or {})
