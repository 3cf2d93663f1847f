"""The sizes that a TensorRT plan is built for."""

from dataclasses import dataclass

from mlmkit.artifact import Profile
from mlmkit.errors import UserError

TARGETS = {"sm75": "7.5", "sm121": "12.1"}  # compute capabilities that TensorRT for RTX builds for only on request
PORTABLE = ["8.0", "8.6", "8.9", "12.0+"]  # those of its default plan, which is no larger than a plan for one of them


@dataclass(frozen=True)
class PlanOptions:
    """The largest run of a plan: `max_batch` rows of at most `max_seq` tokens, and `max_masked` positions.

    Larger batches are split at run time. Rows longer than `max_seq`, up to the model's limit, run one at a time.
    `target` is a key of `TARGETS`, for TensorRT for RTX only. Raises `UserError` for invalid values.
    """

    max_batch: int = 64
    max_seq: int = 512
    max_masked: int = 4096
    target: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_seq", "max_masked"):
            if not 1 <= getattr(self, name) < 1 << 31:  # TensorRT's sizes are 32-bit
                raise UserError(f"--{name.replace('_', '-')} must be between 1 and {(1 << 31) - 1}")
        if self.target not in (None, *TARGETS):
            raise UserError(f"unknown target {self.target!r}: choose {', '.join(TARGETS)}")


def make_profiles(options: PlanOptions, max_length: int) -> list[Profile]:
    """A profile for a few short texts, one for full batches and, if the model takes longer rows, one for a single row.

    A profile needs memory for its largest batch times its longest row, so many rows and long rows must not share one.
    The sizes that the profiles are tuned for have not been measured yet.
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
