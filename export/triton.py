"""An artifact as a model repository for NVIDIA's Triton Inference Server.

Triton's dynamic batcher joins requests along the first axis of every tensor. The scoring graph's `positions` are flat
indices into batch x seq and cannot be joined, so the graph gets a layer around it in which every tensor has a batch
axis. The layout is that of https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_repository.md,
the configuration's fields are those of model_configuration.md beside it.
"""

import logging
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

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
from mlmkit.backends import INPUTS, OUTPUTS
from mlmkit.errors import UserError
from mlmkit.files import new_folder, refuse_existing

log = logging.getLogger(__name__)

CONFIG = "config.pbtxt"
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # it stands in URLs
MAX_BATCH = 64
TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32"}


def write_repository(artifact: Path, output: Path, *, overwrite: bool = False) -> list[str]:
    """Write the model repository `output` for an artifact, and return the names of the models in it.

    The first is the graph, named after the artifact's folder; an artifact with a TensorRT plan gives a second one, with
    `-plan` behind the name, unless it is of TensorRT for RTX, which Triton does not load. Raises `UserError` for an
    artifact that is not whole and as `check_repository` does.
    """
    name = artifact.resolve().name
    check_repository(name, output, overwrite=overwrite)
    manifest, files = open_files(artifact)
    with new_folder(output, replaces=f"{name}/{CONFIG}" if overwrite else "") as folder:
        _write_graph(artifact, folder / name / "1", manifest)
        (folder / name / CONFIG).write_text(graph_config(name, manifest), encoding="utf-8")
        models = [name]
        if manifest.tensorrt is not None and manifest.tensorrt.flavour != "tensorrt":
            log.warning("Triton loads no plan of %s: the repository holds the graph alone", FLAVOURS["tensorrt_rtx"])
        elif manifest.tensorrt is not None and PLAN in manifest.files:
            models.append(f"{name}-plan")
            (folder / models[1] / "1").mkdir(parents=True)
            shutil.copyfile(artifact / PLAN, folder / models[1] / "1" / PLAN)
            (folder / models[1] / CONFIG).write_text(plan_config(models[1], manifest), encoding="utf-8")
        refuse_changes(artifact, files)  # what was copied is what was checked
    return models


def check_repository(name: str, output: Path, *, overwrite: bool) -> None:
    """Raise `UserError` now rather than after an export if `write_repository` would refuse the names.

    A repository is replaced only where it holds this model and no other.
    """
    if not MODEL_NAME.fullmatch(name):
        raise UserError(
            f"Triton's model is named after the artifact's folder, and {name!r} does not do in a URL: use letters, "
            "digits, '.', '_' and '-'"
        )
    refuse_existing(output, f"{name}/{CONFIG}" if overwrite else "")
    others = {path.name for path in output.iterdir()} - {name, f"{name}-plan"} if output.is_dir() else set()
    if others:
        raise UserError(f"{output} holds {min(others)} too, which --overwrite would delete: choose another folder")


def graph_config(name: str, manifest: Manifest) -> str:
    """`config.pbtxt` of the batched graph."""
    # Scales found over a whole batch would let a request's numbers change with whoever came along: a row at a time.
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
            "# Nothing waits: while one batch runs, the next one gathers. More trades latency for larger batches.",
            "dynamic_batching { max_queue_delay_microseconds: 0 }",
        ]
    if kind != "KIND_CPU":
        lines += [
            "# TF32's ten bits of mantissa would break the parity that was proven at export.",
            "optimization { execution_accelerators { gpu_execution_accelerator [",
            '  { name: "cuda" parameters { key: "use_tf32" value: "0" } }',
            "] } }",
        ]
    return "\n".join(lines) + "\n"


def plan_config(name: str, manifest: Manifest) -> str:
    """`config.pbtxt` of the TensorRT plan, with the contract's own shapes and so without batching by Triton."""
    assert manifest.tensorrt is not None
    profiles = manifest.tensorrt.profiles
    lines = [
        f'name: "{name}"',
        'backend: "tensorrt"',
        "# positions are flat indices into batch x seq: a client sends whole batches, and Triton joins none.",
        "max_batch_size: 0",
        *_tensors("input", INPUTS, lambda axes: [-1] * axes),
        *_tensors("output", OUTPUTS, lambda axes: [-1, manifest.top_k][:axes]),
        *[
            f"# profile {number}, {profile.name}: batch {_range(profile.batch)}, seq {_range(profile.seq)}, "
            f"masked {_range(profile.masked)}"
            for number, profile in enumerate(profiles)
        ],
        f"instance_group [ {{ count: 1 kind: KIND_GPU profile: {_list(range(len(profiles)))} }} ]",
    ]
    return "\n".join(lines) + "\n"


def batched(model: ir.Model, top_k: int) -> None:
    """Give every input and output of the scoring graph a batch axis, in place; the weights are not touched.

    `positions` and `targets` become `[batch, masked]`, the positions columns of their own row; the outputs become
    `[batch, masked]` and `[batch, masked, k]`. A position that is not in its row gives NaN and -1: as a flat index it
    would lead into the row of another request.
    """
    layer = _Layer(model.graph)
    inputs = {str(value.name): value for value in model.graph.inputs}
    columns = layer.replace_input(inputs["positions"])
    targets = layer.replace_input(inputs["targets"])
    rows = layer.add("Squeeze", layer.add("Shape", inputs["input_ids"], start=0, end=1))
    seq = layer.add("Shape", inputs["input_ids"], start=1, end=2)
    numbers = layer.add("Range", layer.constant(0), rows, layer.constant(1))
    begins = layer.add("Mul", layer.add("Unsqueeze", numbers, layer.constant([1])), seq)
    valid = layer.add("And", layer.add("GreaterOrEqual", columns, layer.constant(0)), layer.add("Less", columns, seq))
    safe = layer.add("Where", valid, columns, layer.constant(0))
    layer.feed(inputs["positions"], layer.add("Add", safe, begins))
    layer.feed(inputs["targets"], targets)

    shape = layer.add("Shape", columns)
    candidates = layer.add("Concat", shape, layer.constant([top_k]), axis=0)
    each = layer.add("Unsqueeze", valid, layer.constant([2]))
    for index, value in enumerate(model.graph.outputs):
        kind, axes = OUTPUTS[str(value.name)]
        nothing = layer.constant(-1 if kind == "int64" else math.nan)
        layer.replace_output(index, shape if axes == 1 else candidates, valid if axes == 1 else each, nothing)


class _Layer:
    """Nodes around a graph: those before it go to its head, those behind it to its end."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph, self._first = graph, graph[0]
        self._count = 0

    def constant(self, number: int | float | list[int]) -> ir.Value:
        value = np.asarray(number, np.float32 if isinstance(number, float) else np.int64)
        name = self._name()
        constant = ir.Value(name=name, const_value=ir.tensor(value, name=name))
        self._graph.register_initializer(constant)
        return constant

    def add(self, operator: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(operator, list(inputs), attributes)
        node.outputs[0].name = self._name()
        self._graph.insert_before(self._first, node)
        return node.outputs[0]

    def replace_input(self, old: ir.Value) -> ir.Value:
        """An input `[batch, masked]` in the place and with the name of `old`, which keeps its readers until `feed`."""
        new = ir.Value(name=old.name, type=old.type, shape=ir.Shape(["batch", "row_masked"]))
        self._graph.inputs[self._graph.inputs.index(old)] = new
        return new

    def feed(self, old: ir.Value, value: ir.Value) -> None:
        """Let the readers of `old` read `value`, flat."""
        old.replace_all_uses_with(self.add("Reshape", value, self.constant([-1])))

    def replace_output(self, index: int, shape: ir.Value, valid: ir.Value, nothing: ir.Value) -> None:
        """The output in another shape, and `nothing` where it is not valid."""
        old = self._graph.outputs[index]
        name, old.name = old.name, f"{old.name}_flat"
        # Without allowzero, a size of zero would mean "as it was".
        reshaped = ir.node("Reshape", [old, shape], {"allowzero": 1})
        reshaped.outputs[0].name = self._name()
        chosen = ir.node("Where", [valid, reshaped.outputs[0], nothing])
        output = chosen.outputs[0]
        candidates = list(old.shape or ())[1:]
        output.name, output.type = name, old.type
        output.shape = ir.Shape(["batch", "row_masked", *candidates])
        self._graph.extend([reshaped, chosen])
        self._graph.outputs[index] = output

    def _name(self) -> str:
        self._count += 1
        return f"batched_{self._count}"


def _write_graph(artifact: Path, version: Path, manifest: Manifest) -> None:
    """`version/model.onnx`, or a folder of that name where the weights are in files of their own."""
    model = ir.load(artifact / GRAPH)
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


def _range(sizes: tuple[int, int, int]) -> str:
    return f"{sizes[0]} to {sizes[2]}"


def _list(numbers: range) -> str:
    quoted = ", ".join(f'"{number}"' for number in numbers)
    return f"[ {quoted} ]"
