"""What changes during a phase: the learning rate, the mask rate and the batch size, each a function of the cursor."""

import math
from dataclasses import dataclass
from typing import Any

from mlmkit.errors import UserError
from mlmkit.masking import MaskRecipe
from mlmkit.train.config import Config
from mlmkit.train.order import Cursor


@dataclass(frozen=True)
class Schedule:
    """The schedule of a phase. `total` and `warmup` count its steps or, with `in_tokens`, its real tokens."""

    config: Config
    in_tokens: bool
    total: int
    warmup: int

    def done(self, cursor: Cursor) -> int:
        """How much of `total` is done."""
        return cursor.phase_tokens if self.in_tokens else cursor.phase_steps

    def is_over(self, cursor: Cursor) -> bool:
        """Whether the phase ends here."""
        return self.done(cursor) >= self.total

    def learning_rate_factor(self, before: Cursor, after: Cursor) -> float:
        """The factor on the peak learning rate for the step between two cursors: above 0, at most 1.

        Linear warm-up, then `constant`; decay to zero at the end of the phase, so that the last step still learns; or
        `wsd`: constant, then decay (Hu et al. 2024, MiniCPM). `1-sqrt` is 1 - sqrt(share of the decay that is done)
        (Hägele et al. 2024, section 3).
        """
        done = self.done(before)
        if done < self.warmup:
            return min(self.done(after) / self.warmup, 1.0)
        optim = self.config.optim
        is_wsd = optim.schedule == "wsd"
        left = min((self.total - done) / (self.total - (self.decay_start if is_wsd else self.warmup)), 1.0)
        match optim.decay_shape if is_wsd else optim.schedule:
            case "linear":
                return left
            case "cosine":
                return 0.5 - 0.5 * math.cos(math.pi * left)
            case "1-sqrt":
                return 1.0 - math.sqrt(1.0 - left)
        return 1.0

    @property
    def decay_start(self) -> int:
        """Where `wsd` begins to decay."""
        decay = round(self.config.optim.decay_share * self.total)
        return self.total - max(1, min(decay, self.total - self.warmup))

    def recipe(self, before: Cursor, after: Cursor) -> MaskRecipe:
        """The recipe of mask-v1 for the step between two cursors: that of the start first, and of the end last."""
        step = self.done(after) - self.done(before)
        return self.config.masking.recipe(min(self.done(before) / max(self.total - step, 1), 1.0))

    def micro_batches(self, cursor: Cursor) -> int:
        """The number of micro-batches of the next step.

        In a batch warm-up, batches of 1, 2, ... k - 1 times the initial size get equally many steps, and then the batch
        is k times that size (Warner et al. 2024, ModernBERT, section 2.2.2).
        """
        run = self.config.train
        full = run.global_batch_tokens // run.micro_batch_tokens
        if not (run.initial_batch_tokens and run.batch_warmup_tokens):
            return full
        most = run.global_batch_tokens // run.initial_batch_tokens
        # The sizes 1 ... n take n (n + 1) / (k (k - 1)) of the tokens.
        reached = cursor.phase_tokens * most * (most - 1)
        sizes = (size for size in range(1, most) if reached < run.batch_warmup_tokens * size * (size + 1))
        return next(sizes, most) * full // most

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run compares; until `constant_until`, its steps do not depend on `total`."""
        until = {"constant": 1 << 60, "wsd": self.decay_start}.get(self.config.optim.schedule, self.warmup)
        return {
            "unit": "tokens" if self.in_tokens else "steps",
            "total": self.total,
            "warmup": self.warmup,
            "constant_until": until if self.config.masking.final_mask_prob is None else 0,
        }


def may_follow(before: dict[str, Any], now: dict[str, Any], cursor: Cursor) -> bool:
    """Whether a phase may continue from `cursor` with the schedule `now`, because its steps so far would be the same.

    Both are a `Schedule.identity`.
    """
    done = cursor.phase_tokens if now["unit"] == "tokens" else cursor.phase_steps
    is_same = all(before[name] == now[name] for name in ("unit", "warmup"))
    return is_same and done <= min(before["constant_until"], now["constant_until"], now["total"])


def make_schedule(config: Config, epoch_tokens: float) -> Schedule:
    """The schedule of a phase whose texts have `epoch_tokens` per epoch, special tokens included.

    Raises `UserError` if a warm-up does not end before the phase does.
    """
    run = config.train
    in_tokens = bool(run.tokens or run.epochs)
    total = math.ceil(run.tokens or (run.epochs or 0) * epoch_tokens) if in_tokens else config.steps
    if (run.batch_warmup_tokens or 0) >= total * (1 if in_tokens else run.global_batch_tokens):
        raise UserError(f"train.batch_warmup_tokens ({run.batch_warmup_tokens}) must end before the phase does")
    return Schedule(config, in_tokens, total, config.warmup(total))
