"""TensorRT plans for an artifact, proven like the graph they are built from. Needs neither torch nor transformers."""

import logging
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from mlmkit.artifact import (
    GRAPH,
    MANIFEST,
    PLAN,
    REEXPORT_HINT,
    Manifest,
    hash_files,
    open_files,
    refuse_changes,
    weight_bytes,
    write_manifest,
)
from mlmkit.backends import Backend, tensorrt_obstacle
from mlmkit.backends.onnx import OnnxBackend
from mlmkit.errors import UserError
from mlmkit.export.graph_files import copy_artifact, save_graph
from mlmkit.export.lowering import lower
from mlmkit.export.parity import BOUNDS, check_parity, require_parity
from mlmkit.export.plan_graph import plan_graph
from mlmkit.export.profiles import PlanOptions
from mlmkit.export.proof_text import ProofText, proof_text
from mlmkit.export.prove import prove_plan
from mlmkit.export.tensorrt import LAYERS, build_plan, plan_targets
from mlmkit.files import file_sha256, new_folder

log = logging.getLogger(__name__)


def add_plans(
    artifact: Path,
    output: Path,
    *,
    plans: PlanOptions,
    text: ProofText | None = None,
    allow_drift: bool = False,
    overwrite: bool = False,
) -> Manifest:
    """Write a copy of an artifact with plans to `output`, and return its manifest.

    The plans are held to the artifact's own graph on ONNX Runtime. Raises as `mlmkit.export.export.export` does.
    """
    manifest, files = open_files(artifact)
    plan_targets(manifest.architecture, manifest.precision, plans)
    with new_folder(output, replaces=MANIFEST if overwrite else "") as folder:
        kept = {name: sha256 for name, sha256 in manifest.files.items() if name not in (PLAN, LAYERS)}
        for name in kept:
            shutil.copyfile(artifact / name, folder / name)
        refuse_changes(artifact, files)
        manifest = replace(manifest, files=kept, tensorrt=None)
        write_manifest(folder, manifest)
        return with_plans(folder, manifest, plans, None, text or proof_text(str(artifact)), allow_drift=allow_drift)


def with_plans(
    folder: Path,
    manifest: Manifest,
    options: PlanOptions,
    reference: Backend | None,
    text: ProofText,
    *,
    allow_drift: bool,
) -> Manifest:
    """Build the plans of the graph in `folder`, and prove them where this machine can run them.

    They are held to `reference`, by default the graph on ONNX Runtime. Writes the manifest, and returns it.
    """
    with _plan_graph(folder, manifest, reference, text, allow_drift=allow_drift) as (graph, drifts):
        built = build_plan(folder, manifest, options, graph)
    drift_allowed = manifest.drift_allowed or drifts
    files = manifest.files | {name: file_sha256(folder / name) for name in (PLAN, LAYERS)}
    manifest = replace(manifest, files=files, tensorrt=built, drift_allowed=drift_allowed)
    write_manifest(folder, manifest)  # the plans are loaded as a user will load them
    if reason := tensorrt_obstacle(manifest):
        log.info("the plan is unproven: %s", reason)
        return manifest
    return prove_plan(folder, manifest, reference, text, allow_drift=allow_drift)


@contextmanager
def _plan_graph(
    folder: Path, manifest: Manifest, reference: Backend | None, text: ProofText, *, allow_drift: bool
) -> Iterator[tuple[Path, bool]]:
    """The graph that TensorRT is given, and whether it drifts. That of an int8 artifact is proven like any other."""
    overflowing = (manifest.calibration or {}).get("overflowing")
    if manifest.precision != "int8":
        overflowing = []
    elif not isinstance(overflowing, list) or not all(isinstance(name, str) for name in overflowing):
        raise UserError(f"{MANIFEST} does not say what overflows float16 (calibration.overflowing): {REEXPORT_HINT}")
    model = plan_model(folder / GRAPH, manifest.precision, overflowing)
    with TemporaryDirectory() as temporary:
        graph = Path(temporary) / "plan" / GRAPH
        if manifest.precision != "int8":
            graph.parent.mkdir()
            save_graph(model, graph)
            yield graph, False
            return
        copy_artifact(folder, graph.parent, model)
        write_manifest(graph.parent, replace(manifest, files=hash_files(graph.parent)))
        log.info("checking parity of int8 with float16, as TensorRT will compute it, with ONNX Runtime")
        reference, engine = reference or OnnxBackend(str(folder), "cpu"), OnnxBackend(str(graph.parent), "cpu")
        _, proven = text.split(manifest.precision)
        parity = check_parity(reference, engine, proven, BOUNDS[manifest.precision], weight_bytes(folder))
        require_parity(parity, allow_drift)
        yield graph, not parity.passed


def plan_model(graph: Path, precision: str, overflowing: Collection[str] = ()) -> ir.Model:
    """An artifact's graph in the form that TensorRT builds best; ONNX Runtime keeps the artifact's own.

    What an int8 graph leaves in float32 becomes float16, but for values that are `overflowing`: in float32 attention is
    not fused (docs/decisions.md).
    """
    model = ir.load(graph)
    if precision == "int8":
        lower(model, "fp16", overflowing)
    plan_graph(model)
    return model
