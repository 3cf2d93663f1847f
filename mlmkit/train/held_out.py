"""Held-out evaluation during training: the harness's own masked cross-entropy, on the checkpoint just written."""

import json
import logging
from pathlib import Path
from typing import Any

from mlmkit.backends import load
from mlmkit.distributed import Ranks
from mlmkit.documents import Source
from mlmkit.eval.evaluate import evaluate
from mlmkit.eval.passes import Settings
from mlmkit.eval.sets import Request
from mlmkit.train.checkpoint import HELD_OUT

log = logging.getLogger(__name__)


def evaluate_checkpoint(checkpoint: Path, source: Source, device: str, ranks: Ranks) -> dict[str, Any]:
    """`result.json` of `CHECKPOINT/held-out`, evaluated now unless it is there already; every rank takes part.

    The masks are mask-v1's default recipe with seed 0 whatever the run trains with, so any two checkpoints compare.
    """
    folder = checkpoint / HELD_OUT
    if not (folder / "result.json").exists():
        backend = load(str(checkpoint), "torch", device)
        material = Request(source.location, "text", source.location, source=source).read(backend.tokenizer)
        evaluate(backend, material, Settings(), folder, ranks=ranks)
    ranks.barrier()
    return json.loads((folder / "result.json").read_text())
