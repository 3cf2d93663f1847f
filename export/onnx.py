"""Writing the scoring graph with torch's dynamo exporter."""

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch

from mlmkit.model import MaskedLM

OPSET = 20  # at 23 ModernBERT's graph fails at run time and a fully masked row is off by 4e-3 (docs/decisions.md)
INPUTS = ("input_ids", "attention_mask", "positions", "targets")
OUTPUTS = ("log_prob", "rank", "top_log_prob", "top_id")
# Larger weights go to a file of their own, which the runtime maps instead of parsing; protobuf itself ends at 2 GB.
EXTERNAL_DATA_BYTES = 64 << 20


def write_onnx(model: MaskedLM, path: Path, *, opset: int = OPSET) -> None:
    """Export a model on the CPU with dynamic batch, seq and masked axes to `path`, weights over 64 MB beside it."""
    input_ids = torch.full((2, 7), model.network.config.vocab_size // 2)
    sample = (input_ids, torch.ones_like(input_ids), torch.tensor([1, 4, 9]), torch.tensor([5, 6, 7]))
    batch, seq, masked = (torch.export.Dim(name) for name in ("batch", "seq", "masked"))
    axes = ({0: batch, 1: seq}, {0: batch, 1: seq}, {0: masked}, {0: masked})
    with _quiet():
        program = torch.onnx.export(
            model.eval(),
            sample,
            dynamo=True,
            opset_version=opset,
            input_names=INPUTS,
            output_names=OUTPUTS,
            dynamic_shapes=axes,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    program.save(path, external_data=size > EXTERNAL_DATA_BYTES)


@contextlib.contextmanager
def _quiet():
    """The exporter warns of its own deprecations and prints its stages: nothing a user can act on."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
