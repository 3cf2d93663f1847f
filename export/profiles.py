"""The sizes that a TensorRT plan is built for."""

from dataclasses import dataclass

from mlmkit.artifact import Profile
from mlmkit.errors import UserError

TARGETS = {"sm75": "7.5", "sm121": "12.1"}  # what TensorRT for RTX builds for only if asked, by compute capability
PORTABLE = ["8.0", "8.6", "8.9", "12.0+"]  # what it builds for otherwise: one plan, no larger than for one of them


@dataclass(frozen=True)
class PlanOptions:
    """What one run may hold: at most `max_batch` rows of at most `max_seq` tokens, and `max_masked` positions.

    Larger batches are split when they run. Rows longer than `max_seq`, up to what the model takes, run one by one.
    `target` is one of `TARGETS`, for TensorRT for RTX alone.
    """

    max_batch: int = 64
    max_seq: int = 512
    max_masked: int = 4096
    target: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_seq", "max_masked"):
            if not 1 <= getattr(self, name) < 1 << 31:  # as TensorRT has sizes
                raise UserError(f"--{name.replace('_', '-')} must be between 1 and {(1 << 31) - 1}")
        if self.target not in (None, *TARGETS):
            raise UserError(f"no target {self.target!r}: choose {', '.join(TARGETS)}")


def make_profiles(options: PlanOptions, max_length: int) -> list[Profile]:
    """One for few short texts, one for full batches and, if the model takes longer rows than those, one for such a row.

    A profile's memory is that of its largest batch times its longest row, so that many rows and long ones must not
    share one. What they are tuned for has not been measured yet.
    """
    batch, seq, masked = options.max_batch, min(options.max_seq, max_length), options.max_masked
    usual_rows, usual_length = -(-batch // 2), min(128, seq)
    usual_masked = min(max(usual_rows * usual_length * 15 // 100, 1), masked)  # mask-v1's default share
    profiles = [
        Profile("latency", (1, 1, min(4, batch)), (1, min(32, seq), seq), (1, min(4, masked), min(64, masked))),
        Profile("throughput", (1, usual_rows, batch), (1, usual_length, seq), (1, usual_masked, masked)),
    ]
    if seq < max_length:
        usual_masked = min(max(max_length * 15 // 100, 1), masked)
        profiles.append(Profile("long", (1, 1, 1), (1, max_length, max_length), (1, usual_masked, masked)))
    return profiles
