"""Writing the scoring graph with torch's dynamo exporter."""

from pathlib import Path

import torch

from mlmkit.backends import Batch, Scored
from mlmkit.errors import UserError
from mlmkit.export.attention import ComplexForms, exported_forms
from mlmkit.export.graphs import quiet, save_graph
from mlmkit.model import MaskedLM

OPSET = 20  # at 23 ModernBERT's graph fails at run time and a fully masked row is off by 4e-3 (docs/decisions.md)


def write_onnx(model: MaskedLM, path: Path, *, opset: int = OPSET) -> None:
    """Export a model on the CPU to `path` with dynamic batch, seq and masked axes; weights over 64 MB go beside it.

    Raises `UserError` for an architecture that torch cannot export, or only for rows of one length.
    """
    architecture = model.network.config.model_type
    input_ids = torch.full((2, 7), model.vocabulary_size // 2)
    sample = (input_ids, torch.ones_like(input_ids), torch.tensor([1, 4, 9]), torch.tensor([5, 6, 7]))
    batch, seq, masked = (torch.export.Dim(name) for name in ("batch", "seq", "masked"))
    try:
        with quiet(), exported_forms(model), ComplexForms():
            program = torch.onnx.export(
                model.eval(),
                sample,
                dynamo=True,
                opset_version=opset,
                input_names=Batch._fields,
                output_names=Scored._fields,
                dynamic_shapes=({0: batch, 1: seq}, {0: batch, 1: seq}, {0: masked}, {0: masked}),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"torch cannot export a {architecture} model: {_root_cause(error)}") from error
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    # Where the network's code uses a length as a Python number, the exporter silently fixes that axis.
    inputs = zip(Batch._fields, program.model.graph.inputs, strict=True)
    if fixed := [name for name, value in inputs if any(isinstance(size, int) for size in value.shape or ())]:
        raise UserError(f"torch can export a {architecture} model for one shape only: it fixed {', '.join(fixed)}")
    save_graph(program.model, path)


def _root_cause(error: BaseException) -> str:
    """The first line of the first cause; the exporter's own message only gives general advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
