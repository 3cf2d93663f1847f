"""What is measured: the settings of an evaluation, and the passes over the corpus that they ask for."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlmkit.errors import UserError
from mlmkit.eval.parts import Part
from mlmkit.eval.plan import VARIANTS, Plan, masked_plan, pseudo_plan, scorable
from mlmkit.masking import MaskRecipe, corrupt
from mlmkit.tokenizer import Tokenizer

METRICS = ("masked", "pseudo")
TYPICAL_ROW = 512  # bounds the estimated cost of a token's row, whatever the model takes, so that parts stay the same


@dataclass(frozen=True)
class Settings:
    """What to measure.

    `metrics`: `masked`, `pseudo` or both. `recipe` and `mask_seeds` are those of the masks. `variant` (`original` or
    `within-word`) and `pseudo_sample`, the share of tokens to score, chosen by mask-v1, are the pseudo-likelihood's.

    Raises `UserError` for values outside their range.
    """

    metrics: tuple[str, ...] = ("masked",)
    recipe: MaskRecipe = field(default_factory=MaskRecipe)
    mask_seeds: tuple[int, ...] = (0,)
    variant: str = "original"
    pseudo_sample: float = 1.0

    def __post_init__(self) -> None:
        for metric in self.metrics:
            if metric not in METRICS:
                raise UserError(f"no metric {metric!r}: choose {' or '.join(METRICS)}")
        if not self.metrics:
            raise UserError("no metric to measure")
        if self.variant not in VARIANTS:
            raise UserError(f"no pseudo-likelihood variant {self.variant!r}: choose {' or '.join(VARIANTS)}")
        if not 0.0 < self.pseudo_sample <= 1.0:
            raise UserError(f"the pseudo-likelihood sample must be above 0 and at most 1, not {self.pseudo_sample}")
        if not self.mask_seeds or len(set(self.mask_seeds)) < len(self.mask_seeds):
            raise UserError("the mask seeds must be different numbers, one at least")
        for seed in self.mask_seeds:
            if not 0 <= seed < 1 << 64:
                raise UserError(f"a mask seed must be between 0 and 2**64 - 1, not {seed}")

    def describe(self) -> dict[str, Any]:
        """As `result.json` carries it."""
        return {
            "metrics": sorted(set(self.metrics), key=METRICS.index),
            "masking": {**self.recipe.describe(), "seeds": list(self.mask_seeds), "epoch": 0},
            "pseudo": {"variant": self.variant, "sample": self.pseudo_sample} if "pseudo" in self.metrics else None,
        }

    def passes(self, chosen: NDArray[np.int64] | None = None) -> list["Pass"]:
        """One for each mask seed, one for pseudo-likelihood, restricted to the flat tokens `chosen` if given."""
        found: list[Pass] = []
        if "masked" in self.metrics:
            found += [MaskedPass(self.recipe, seed) for seed in self.mask_seeds]
        if "pseudo" in self.metrics:
            found.append(PseudoPass(self.variant, self.pseudo_sample, self.mask_seeds[0], chosen))
        return found


@dataclass(frozen=True)
class MaskedPass:
    """Every token that mask-v1 selects at epoch 0, all of a row's at once."""

    recipe: MaskRecipe
    mask_seed: int
    metric = "masked"

    @property
    def name(self) -> str:
        """Unique in an evaluation, and fit for the names of its part files."""
        return f"masked-{self.mask_seed}"

    def cost(self, lengths: NDArray[np.int64]) -> NDArray[np.float64]:
        """Tokens that a model reads for documents of these lengths, about: each once."""
        return lengths.astype(np.float64)

    def plan(self, part: Part, tokenizer: Tokenizer, capacity: int) -> Plan:
        corpus, lengths = part.corpus, part.corpus.lengths
        corruption = corrupt(
            corpus.ids, lengths, corpus.keys, self.recipe, tokenizer.masking, seed=self.mask_seed, words=corpus.words
        )
        return masked_plan(corpus, corruption, capacity)


@dataclass(frozen=True)
class PseudoPass:
    """Every scorable token alone; or the share `sample` of them; or those of `chosen`, flat and ascending.

    mask-v1's draws choose the sample. Its rule that an unknown token is never selected does not apply here: all
    scorable tokens must be equally likely to be drawn, or the estimate would be biased.
    """

    variant: str
    sample: float
    seed: int
    chosen: NDArray[np.int64] | None = None
    metric = "pseudo"
    mask_seed = None
    name = "pseudo"

    def cost(self, lengths: NDArray[np.int64]) -> NDArray[np.float64]:
        """Tokens that a model reads for documents of these lengths, about: a row for each."""
        return self.sample * lengths * np.minimum(lengths, TYPICAL_ROW)

    def plan(self, part: Part, tokenizer: Tokenizer, capacity: int) -> Plan:
        return pseudo_plan(part.corpus, tokenizer, capacity, self.variant, self._tokens(part, tokenizer))

    def _tokens(self, part: Part, tokenizer: Tokenizer) -> NDArray[np.int64] | None:
        corpus = part.corpus
        if self.chosen is not None:
            begin, end = np.searchsorted(self.chosen, [part.first_token, part.first_token + len(corpus.ids)])
            return self.chosen[begin:end] - part.first_token
        if self.sample == 1.0:
            return None
        selecting = MaskRecipe(mask_prob=self.sample)
        return corrupt(corpus.ids, corpus.lengths, corpus.keys, selecting, scorable(tokenizer), seed=self.seed).selected


Pass = MaskedPass | PseudoPass  # one way through the corpus, part by part
