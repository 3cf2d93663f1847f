"""Write ONNX graphs, above all the scoring graph, with torch's dynamo exporter."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from mlmkit.backends import Batch, Scored
from mlmkit.errors import UserError
from mlmkit.export.attention import ComplexForms, exported_forms
from mlmkit.export.graphs import quiet, save_graph
from mlmkit.model import MaskedLM

OPSET = 20  # at 23 ModernBERT's graph fails at run time and a fully masked row is off by 4e-3 (docs/decisions.md)


def write_onnx(model: MaskedLM, path: Path, *, opset: int = OPSET) -> None:
    """Export a model's scoring graph to `path`, like `write_graph`."""
    write_graph(model, path, model, Batch._fields, Scored._fields, opset=opset)


def write_graph(
    model: MaskedLM,
    path: Path,
    module: nn.Module,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    axes: tuple[str, str] = ("batch", "seq"),
    opset: int = OPSET,
) -> None:
    """Export a `module` that runs a model on the CPU to `path`; weights over 64 MB go beside it.

    `inputs` are fields of `Batch` or `token_type_ids`. The axes are dynamic: those of rows have the names `axes`, the
    other is `masked`. Raises `UserError` for an architecture that torch cannot export, or only for rows of one length.
    """
    architecture = model.network.config.model_type
    input_ids = torch.full((2, 7), model.vocabulary_size // 2)
    samples = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "token_type_ids": torch.zeros_like(input_ids),
        "positions": torch.tensor([1, 4, 9]),
        "targets": torch.tensor([5, 6, 7]),
    }
    sample = tuple(samples[name] for name in inputs)
    batch, seq, masked = map(torch.export.Dim, (*axes, "masked"))
    try:
        with quiet(), exported_forms(model), ComplexForms():
            program = torch.onnx.export(
                module.eval(),
                sample,
                dynamo=True,
                opset_version=opset,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=tuple({0: batch, 1: seq} if values.ndim == 2 else {0: masked} for values in sample),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"torch cannot export a {architecture} model: {_root_cause(error)}") from error
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    # Where the network's code uses a length as a Python number, the exporter silently fixes that axis.
    written = zip(inputs, program.model.graph.inputs, strict=True)
    if fixed := [name for name, value in written if any(isinstance(size, int) for size in value.shape or ())]:
        raise UserError(f"torch can export a {architecture} model for one shape only: it fixed {', '.join(fixed)}")
    save_graph(program.model, path)


def _root_cause(error: BaseException) -> str:
    """The first line of the first cause; the exporter's own message only gives general advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
