"""Held-out evaluation during training: the harness's own masked cross-entropy, on the checkpoint just written."""

import json
from pathlib import Path
from typing import Any

from mlmkit.backends import load
from mlmkit.distributed import Ranks
from mlmkit.documents import Source
from mlmkit.eval.evaluate import evaluate
from mlmkit.eval.passes import Settings
from mlmkit.eval.sets import Request
from mlmkit.train.checkpoint import HELD_OUT, held_out_result


def evaluate_checkpoint(checkpoint: Path, source: Source, device: str, ranks: Ranks) -> dict[str, Any]:
    """`result.json` of `CHECKPOINT/held-out`, evaluated now unless it is there already; every rank takes part.

    The masks are mask-v1's default recipe with seed 0 whatever the run trains with, so any two checkpoints compare.
    """
    folder = checkpoint / HELD_OUT
    if not ranks.from_first(lambda: held_out_result(checkpoint)):
        backend = load(str(checkpoint), "torch", device)
        material = Request(source.location, "text", source.location, source=source).read(backend.tokenizer)
        evaluate(backend, material, Settings(), folder, ranks=ranks)
    return ranks.from_first(lambda: json.loads((folder / "result.json").read_text()))
