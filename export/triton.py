"""An artifact → a model repository for NVIDIA's Triton Inference Server.

Triton's dynamic batcher concatenates requests along the first axis of every tensor. The scoring graph's `positions` are
flat indices into batch x seq and cannot be concatenated, so `batched` wraps the graph in nodes that give every tensor a
batch axis. Source of the layout and the configuration's fields: model_repository.md and model_configuration.md in
https://github.com/triton-inference-server/server/blob/main/docs/user_guide/.
"""

import logging
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from google.protobuf.message import DecodeError

from mlmkit.artifact import (
    DYNAMIC_INT8,
    FLAVOURS,
    GRAPH,
    PLAN,
    REEXPORT_HINT,
    WEIGHTS,
    Manifest,
    open_files,
    refuse_changes,
)
from mlmkit.backends.protocol import INPUTS, OUTPUTS
from mlmkit.errors import UserError
from mlmkit.export.graphs import add_constant
from mlmkit.files import new_folder, refuse_existing

log = logging.getLogger(__name__)

CONFIG = "config.pbtxt"
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # part of URLs
MAX_BATCH = 64
TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32"}


def write_repository(artifact: Path, output: Path, *, overwrite: bool = False) -> list[str]:
    """Write the model repository `output` for an artifact; return the names of its models.

    The first model is the graph, named after the artifact's folder. A TensorRT plan becomes a second model, named with
    `-plan` at the end; plans of TensorRT for RTX are left out, as Triton cannot load them. Raises `UserError` for a
    damaged artifact, and as `check_repository` does.
    """
    name = artifact.resolve().name
    check_repository(name, output, overwrite=overwrite)
    manifest, files = open_files(artifact)
    with new_folder(output, replaces=f"{name}/{CONFIG}" if overwrite else "") as folder:
        _write_graph(artifact, folder / name / "1", manifest)
        (folder / name / CONFIG).write_text(graph_config(name, manifest), encoding="utf-8")
        models = [name]
        if manifest.tensorrt is not None and manifest.tensorrt.flavour != "tensorrt":
            log.warning("Triton cannot load a plan of %s: the repository has the graph only", FLAVOURS["tensorrt_rtx"])
        elif manifest.tensorrt is not None and PLAN in manifest.files:
            models.append(f"{name}-plan")
            (folder / models[1] / "1").mkdir(parents=True)
            shutil.copyfile(artifact / PLAN, folder / models[1] / "1" / PLAN)
            (folder / models[1] / CONFIG).write_text(plan_config(models[1], manifest), encoding="utf-8")
        refuse_changes(artifact, files)  # what was copied is what was checked
    return models


def check_repository(name: str, output: Path, *, overwrite: bool) -> None:
    """Raise `UserError` now rather than after an export if `write_repository` would refuse the name or the folder.

    With `overwrite`, a repository is replaced only if it holds no other model.
    """
    if not MODEL_NAME.fullmatch(name):
        raise UserError(
            f"Triton's model is named after the artifact's folder, and {name!r} cannot be part of a URL: use letters, "
            "digits, '.', '_' and '-'"
        )
    refuse_existing(output, f"{name}/{CONFIG}" if overwrite else "")
    others = {path.name for path in output.iterdir()} - {name, f"{name}-plan"} if output.is_dir() else set()
    if others:
        raise UserError(f"{output} also holds {min(others)}, which --overwrite would delete: choose another folder")


def graph_config(name: str, manifest: Manifest) -> str:
    """`config.pbtxt` of the batched graph."""
    # Scales measured over a whole batch would make a request's scores depend on the other requests: one row at a time.
    coupled = manifest.precision == DYNAMIC_INT8
    kind = "KIND_CPU" if coupled else "KIND_GPU" if manifest.precision == "bf16" else "KIND_AUTO"
    lines = [
        f'name: "{name}"',
        'backend: "onnxruntime"',
        f"max_batch_size: {1 if coupled else MAX_BATCH}",
        *_tensors("input", INPUTS, lambda axes: [-1]),
        *_tensors("output", OUTPUTS, lambda axes: [-1, manifest.top_k][:axes]),
        f"instance_group [ {{ count: 1 kind: {kind} }} ]",
    ]
    if not coupled:
        lines += [
            "# No request waits: while one batch runs, the next one fills. A longer delay gives larger batches.",
            "dynamic_batching { max_queue_delay_microseconds: 0 }",
        ]
    if kind != "KIND_CPU":
        lines += [
            "# TF32's ten-bit mantissa would break the parity that was proven at export.",
            "optimization { execution_accelerators { gpu_execution_accelerator [",
            '  { name: "cuda" parameters { key: "use_tf32" value: "0" } }',
            "] } }",
        ]
    return "\n".join(lines) + "\n"


def plan_config(name: str, manifest: Manifest) -> str:
    """`config.pbtxt` of the TensorRT plan, which has the scoring graph's own shapes, so Triton cannot batch it."""
    assert manifest.tensorrt is not None
    profiles = manifest.tensorrt.profiles
    numbers = ", ".join(f'"{number}"' for number in range(len(profiles)))
    lines = [
        f'name: "{name}"',
        'backend: "tensorrt"',
        "# positions are flat indices into batch x seq: clients send whole batches, and Triton does no batching.",
        "max_batch_size: 0",
        *_tensors("input", INPUTS, lambda axes: [-1] * axes),
        *_tensors("output", OUTPUTS, lambda axes: [-1, manifest.top_k][:axes]),
        *[
            f"# profile {number}, {profile.name}: batch {profile.batch[0]} to {profile.batch[2]}, "
            f"seq {profile.seq[0]} to {profile.seq[2]}, masked {profile.masked[0]} to {profile.masked[2]}"
            for number, profile in enumerate(profiles)
        ],
        f"instance_group [ {{ count: 1 kind: KIND_GPU profile: [ {numbers} ] }} ]",
    ]
    return "\n".join(lines) + "\n"


def batched(model: ir.Model, top_k: int) -> None:
    """Give every input and output of the scoring graph a batch axis, in place; the weights stay as they are.

    `positions` and `targets` become `[batch, masked]`, where a position is a column of its own row. The outputs become
    `[batch, masked]` and `[batch, masked, k]`. A position outside its row gives NaN and -1: used as a flat index, it
    would read another request's row.
    """
    graph, tape = model.graph, ir.tape.Tape(model.graph)
    inputs = {str(value.name): value for value in graph.inputs}
    input_ids, flat_positions, flat_targets = (inputs[name] for name in ("input_ids", "positions", "targets"))

    def constant(number: float | list[int]) -> ir.Value:
        kind = np.float32 if isinstance(number, float) else np.int64
        return add_constant(graph, f"batched_{number}", np.asarray(number, kind))

    columns, targets = (
        ir.val(value.name, shape=["batch", "row_masked"], type=value.type) for value in (flat_positions, flat_targets)
    )
    zero, seq = constant(0), tape.op("Shape", [input_ids], {"start": 1, "end": 2})
    valid = tape.op("And", [tape.op("GreaterOrEqual", [columns, zero]), tape.op("Less", [columns, seq])])
    rows = tape.op("Squeeze", [tape.op("Shape", [input_ids], {"start": 0, "end": 1})])
    row_numbers = tape.op("Unsqueeze", [tape.op("Range", [zero, rows, constant(1)]), constant([1])])
    positions = tape.op("Add", [tape.op("Where", [valid, columns, zero]), tape.op("Mul", [row_numbers, seq])])
    for flat, value in ((flat_positions, positions), (flat_targets, targets)):
        flat.replace_all_uses_with(tape.op("Reshape", [value, constant([-1])]))
    graph.inputs[:] = [{"positions": columns, "targets": targets}.get(str(name), old) for name, old in inputs.items()]

    shape = tape.op("Shape", [columns])
    candidates = tape.op("Concat", [shape, constant([top_k])], {"axis": 0})
    valid_candidates = tape.op("Unsqueeze", [valid, constant([2])])
    for index, flat in enumerate([*graph.outputs]):
        kind, axes = OUTPUTS[str(flat.name)]
        output = ir.val(flat.name, shape=["batch", "row_masked", *list(flat.shape or ())[1:]], type=flat.type)
        flat.name = f"{flat.name}_flat"
        # allowzero: without it a size of zero would mean "the size of the input".
        reshaped = tape.op("Reshape", [flat, shape if axes == 1 else candidates], {"allowzero": 1})
        nothing = constant(-1 if kind == "int64" else math.nan)
        tape.op("Where", [valid if axes == 1 else valid_candidates, reshaped, nothing], output=output)
        graph.outputs[index] = output
    graph.sort()  # the tape appends, but some of these nodes come first


def _write_graph(artifact: Path, version: Path, manifest: Manifest) -> None:
    """Write `version/model.onnx`, or a folder of that name if the weights are in files of their own."""
    try:
        model = ir.load(artifact / GRAPH)
    except DecodeError:
        raise UserError(f"{artifact / GRAPH} is not an ONNX graph: {REEXPORT_HINT}") from None
    for kind, values, tensors in (("input", model.graph.inputs, INPUTS), ("output", model.graph.outputs, OUTPUTS)):
        if {value.name for value in values} != set(tensors):
            raise UserError(f"{artifact / GRAPH} does not have the {kind}s {', '.join(tensors)}: {REEXPORT_HINT}")
    has_weights = WEIGHTS in manifest.files
    target = version / GRAPH if has_weights else version
    target.mkdir(parents=True)
    batched(model, manifest.top_k)
    ir.save(model, target / GRAPH)
    if has_weights:
        shutil.copyfile(artifact / WEIGHTS, target / WEIGHTS)


def _tensors(field: str, tensors: Mapping[str, tuple[str, int]], dims: Callable[[int], list[int]]) -> list[str]:
    entries = [
        f'  {{ name: "{name}" data_type: {TYPES[kind]} dims: [ {", ".join(map(str, dims(axes)))} ] }}'
        for name, (kind, axes) in tensors.items()
    ]
    return [f"{field} [", ",\n".join(entries), "]"]
