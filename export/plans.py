"""TensorRT plans for an artifact: the graph that they are built from, the build, and the proof.

    plan_model   the artifact's graph, rewritten for TensorRT
    build_plan   that graph -> model.plan (mlmkit.export.tensorrt)
    prove_plan   the plan's scores against the reference, on a GPU that can run it

Needs neither torch nor transformers.
"""

import logging
import os
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values

from mlmkit.artifact import (
    GRAPH,
    MANIFEST,
    PLAN,
    REEXPORT_HINT,
    Manifest,
    open_files,
    read_manifest,
    refuse_changes,
    weight_bytes,
    write_manifest,
)
from mlmkit.backends import Backend, tensorrt_obstacle
from mlmkit.backends.onnx import OnnxBackend
from mlmkit.errors import UserError
from mlmkit.export.graphs import add_constant, artifact_with
from mlmkit.export.parity import ProofText, is_within, proof_text, require_parity
from mlmkit.export.precision import lower
from mlmkit.export.profiles import PlanOptions
from mlmkit.files import file_sha256, locked, new_folder

log = logging.getLogger(__name__)


def add_plan(
    artifact: Path,
    output: Path,
    *,
    plans: PlanOptions,
    text: ProofText | None = None,
    allow_drift: bool = False,
    overwrite: bool = False,
) -> Manifest:
    """Write a copy of an artifact with a plan to `output`; return its manifest.

    The reference of the proof is the artifact's graph on ONNX Runtime. Raises as `mlmkit.export.export.export` does.
    """
    from mlmkit.export.tensorrt import LAYERS, plan_targets  # needs TensorRT

    manifest, files = open_files(artifact)
    plan_targets(manifest.architecture, manifest.precision, plans)  # fail before copying
    with new_folder(output, replaces=MANIFEST if overwrite else "") as folder:
        kept = {name: sha256 for name, sha256 in manifest.files.items() if name not in (PLAN, LAYERS)}
        for name in kept:
            shutil.copyfile(artifact / name, folder / name)
        refuse_changes(artifact, files)
        manifest = replace(manifest, files=kept, tensorrt=None)
        write_manifest(folder, manifest)
        return with_plan(folder, manifest, plans, None, text or proof_text(str(artifact)), allow_drift=allow_drift)


def with_plan(
    folder: Path,
    manifest: Manifest,
    options: PlanOptions,
    reference: Backend | None,
    text: ProofText,
    *,
    allow_drift: bool,
) -> Manifest:
    """Build a plan of the graph in `folder`, and prove it if this machine can run it.

    `reference` is by default the graph on ONNX Runtime. An int8 graph is changed before the build, so its parity is
    checked again. Writes the manifest, and returns it.
    """
    from mlmkit.export.tensorrt import LAYERS, build_plan  # needs TensorRT

    is_int8, drifts = manifest.precision == "int8", False
    overflowing = (manifest.calibration or {}).get("overflowing")
    if is_int8 and not (isinstance(overflowing, list) and all(isinstance(name, str) for name in overflowing)):
        raise UserError(f"{MANIFEST} does not say what overflows float16 (calibration.overflowing): {REEXPORT_HINT}")
    model = plan_model(folder / GRAPH, manifest.precision, overflowing or ())
    with artifact_with(model, folder, manifest) as copy:
        if is_int8:
            log.info("checking parity of int8 with float16, as TensorRT will compute it, with ONNX Runtime")
            own, engine = reference or OnnxBackend(str(folder), "cpu"), OnnxBackend(str(copy), "cpu")
            size = weight_bytes(folder)
            drifts = not require_parity(own, engine, text, "int8", size, allow_drift=allow_drift).passed
        built = build_plan(
            copy / GRAPH,
            folder,
            architecture=manifest.architecture,
            precision=manifest.precision,
            max_length=manifest.max_length,
            options=options,
        )
    files = manifest.files | {name: file_sha256(folder / name) for name in (PLAN, LAYERS)}
    drift_allowed = manifest.drift_allowed or drifts
    manifest = replace(manifest, files=files, tensorrt=built, drift_allowed=drift_allowed)
    write_manifest(folder, manifest)  # the plan is loaded as a user will load it
    if reason := tensorrt_obstacle(manifest):
        log.info("the plan is unproven: %s", reason)
        return manifest
    return _prove(folder, manifest, reference, text, allow_drift=allow_drift)


def prove_plan(artifact: Path, *, text: ProofText | None = None, allow_drift: bool = False) -> Manifest:
    """Compare an artifact's plan with its graph on ONNX Runtime, and write the report into its manifest.

    Returns the new manifest. Raises `UserError` if the plan cannot run here, and `CheckError` if parity does not hold;
    the manifest then stays as it is.
    """
    with locked(artifact):
        manifest = read_manifest(artifact)
        if reason := tensorrt_obstacle(manifest):
            raise UserError(f"{artifact}: {reason}")
        if not os.access(artifact, os.W_OK):
            raise UserError(f"{artifact} is not writable, but its {MANIFEST} must record the parity report: copy it")
        return _prove(artifact, manifest, None, text or proof_text(str(artifact)), allow_drift=allow_drift)


def _prove(
    folder: Path, manifest: Manifest, reference: Backend | None, text: ProofText, *, allow_drift: bool
) -> Manifest:
    from mlmkit.backends.tensorrt.backend import TensorRTBackend  # needs TensorRT and cuda-python

    engine = TensorRTBackend(str(folder))
    log.info("checking parity with TensorRT on real text")
    reference = reference or OnnxBackend(str(folder))
    size = weight_bytes(folder)
    parity = require_parity(reference, engine, text, manifest.precision, size, allow_drift=allow_drift)
    assert manifest.tensorrt is not None  # the backend would have refused
    manifest = replace(
        manifest,
        tensorrt=replace(manifest.tensorrt, gpu=engine.gpu, parity=parity.as_dict()),
        drift_allowed=not (parity.passed and is_within(manifest.parity)),
    )
    write_manifest(folder, manifest)
    return manifest


# ---------------------------------------------------------------- the graph


def plan_model(graph: Path, precision: str, overflowing: Collection[str] = ()) -> ir.Model:
    """An artifact's graph in the form that TensorRT builds best; the artifact keeps its own for ONNX Runtime.

    What is float32 in an int8 graph becomes float16, except for values in `overflowing`: TensorRT does not fuse float32
    attention (docs/decisions.md).
    """
    model = ir.load(graph)
    if precision == "int8":
        lower(model, "fp16", overflowing)
    rewrite_for_tensorrt(model)
    return model


def rewrite_for_tensorrt(model: ir.Model) -> None:
    """Rewrite a graph of any precision in place for TensorRT. Its results change by rounding only.

    - The rank is counted with a sum, which joins the log-softmax's kernel. The matrix product that ONNX Runtime prefers
      (`MaskedLM.forward`) takes 450 to 830 MB at base sizes, and Turing has no float32 product.
    - DeBERTa-v2 multiplies its query with scaled keys and with positions. Here the query is scaled instead of the key:
      in float16 TensorRT joins products that read the same query, and then does not recognise attention.
    """
    graph = model.graph
    for product in [node for node in graph if node.op_type == "MatMul"]:
        left, right = product.inputs
        assert left is not None and right is not None
        scaling = right.producer()
        if _is_column_of_ones(right):
            total = ir.node("ReduceSum", [left, add_constant(graph, "last_axis", [-1])], {"keepdims": 1})
            replace_nodes_and_values(graph, product, [product], [total], product.outputs, total.outputs)
        elif scaling is not None and _scales(scaling) and len(left.uses()) > 1:
            scaled = ir.node(scaling.op_type, [left, scaling.inputs[1]])
            graph.insert_before(product, scaled)
            product.replace_input_with(0, scaled.outputs[0])
            product.replace_input_with(1, scaling.inputs[0])


def _is_column_of_ones(value: ir.Value) -> bool:
    constant = value.const_value
    return constant is not None and constant.shape[1:] == (1,) and bool((constant.numpy() == 1).all())


def _scales(node: ir.Node) -> bool:
    """Whether the node multiplies or divides by a single constant."""
    factor = node.inputs[1] if node.op_type in ("Mul", "Div") else None
    return factor is not None and getattr(factor.const_value, "size", 0) == 1
