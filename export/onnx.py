"""Writing the scoring graph with torch's dynamo exporter."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from mlmkit.backends import Batch, Scored
from mlmkit.errors import UserError
from mlmkit.export.attention import exported_attention
from mlmkit.export.graph_files import save_graph
from mlmkit.model import MaskedLM

OPSET = 20  # at 23 ModernBERT's graph fails at run time and a fully masked row is off by 4e-3 (docs/decisions.md)


def write_onnx(model: MaskedLM, path: Path, *, opset: int = OPSET) -> None:
    """Export a model on the CPU with dynamic batch, seq and masked axes to `path`, weights over 64 MB beside it.

    Raises `UserError` for an architecture that torch cannot export, or not for rows of every length.
    """
    kind = model.network.config.model_type
    input_ids = torch.full((2, 7), model.vocabulary_size // 2)
    sample = (input_ids, torch.ones_like(input_ids), torch.tensor([1, 4, 9]), torch.tensor([5, 6, 7]))
    batch, seq, masked = (torch.export.Dim(name) for name in ("batch", "seq", "masked"))
    axes = ({0: batch, 1: seq}, {0: batch, 1: seq}, {0: masked}, {0: masked})
    try:
        with quiet(), exported_attention(model):
            program = torch.onnx.export(
                model.eval(),
                sample,
                dynamo=True,
                opset_version=opset,
                input_names=Batch._fields,
                output_names=Scored._fields,
                dynamic_shapes=axes,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"torch cannot export a {kind} model: {_first_cause(error)}") from error
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    # Where the network's code needs a length as a number, the exporter fixes it without a word.
    inputs = zip(Batch._fields, program.model.graph.inputs, strict=True)
    if fixed := [name for name, value in inputs if any(isinstance(size, int) for size in value.shape or ())]:
        raise UserError(f"torch can export a {kind} model for one shape only: it fixed {', '.join(fixed)}")
    save_graph(program.model, path)


def _first_cause(error: BaseException) -> str:
    """The exporter's own message is advice; what went wrong stands in the first of its causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporter and quantizer warn of their own affairs and print their stages: nothing a user can act on."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
