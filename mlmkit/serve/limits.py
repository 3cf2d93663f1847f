"""The server's limits with their defaults. The command's options are made from these."""

from dataclasses import dataclass

# On a CPU larger calls are not faster and delay other requests; a GPU needs them to be busy (docs/decisions.md).
BATCH_TOKENS = {"cpu": 512, "cuda": 16384}
QUEUE_TOKENS = {"cpu": 1 << 16, "cuda": 1 << 20}
MAX_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 26}  # positions x vocabulary of a call; each logit takes 16 bytes in all


@dataclass(frozen=True)
class Limits:
    """Limits per request, of the queue, and in time.

    `text_tokens` includes special tokens. `queue_tokens` counts all rows in the queue. `candidates` also bounds the
    targets looked up, over all masks. `requests` counts those being read, waiting or answered. `deadline_seconds` runs
    from a request's head to its answer, `drain_seconds` from SIGTERM to the exit.
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
