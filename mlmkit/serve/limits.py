"""What a server takes on: every number that bounds it."""

from dataclasses import dataclass

# On a CPU larger calls gain nothing and hold others up; on a GPU they fill it (docs/decisions.md).
BATCH_TOKENS = {"cpu": 512, "cuda": 16384}
QUEUE_TOKENS = {"cpu": 1 << 16, "cuda": 1 << 20}
LARGEST_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 26}  # positions x vocabulary of a call, which takes 16 bytes for each


@dataclass(frozen=True)
class Limits:
    """Bounds of a request, of the queue, and of time.

    `text_tokens` counts special tokens too; `queue_tokens` those of all rows that wait; `candidates` also the targets
    that are looked up at each mask; `requests` those being read, waiting or answered. Times are in seconds:
    `deadline_seconds` from a request's head to its answer, `drain_seconds` from SIGTERM to the end.
    """

    text_tokens: int
    queue_tokens: int
    batch_tokens: int
    body_bytes: int = 2_000_000
    texts: int = 64
    text_masks: int = 64
    targets: int = 100
    candidates: int = 25_000
    requests: int = 512
    deadline_seconds: float = 30.0
    drain_seconds: float = 25.0
    wait_seconds: float = 0.005
