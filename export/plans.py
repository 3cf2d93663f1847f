"""TensorRT plans for an artifact, proven like the graph they are built from. Needs neither torch nor transformers."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

from mlmkit.artifact import GRAPH, MANIFEST, PLAN, Manifest, hash_files, open_files, refuse_changes, write_manifest
from mlmkit.backends import Backend
from mlmkit.backends.onnx import OnnxBackend
from mlmkit.backends.tensorrt import TensorRTBackend
from mlmkit.export.parity import BOUNDS, check_parity, require_parity
from mlmkit.export.proof_text import ProofText, proof_text
from mlmkit.export.tensorrt import LAYERS, PlanOptions, build_plan
from mlmkit.files import new_folder

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
    """Write a copy of an artifact with plans for this machine to `output`, and return its manifest.

    The plans are held to the artifact's own graph on ONNX Runtime. Raises as `mlmkit.export.export.export` does.
    """
    manifest, files = open_files(artifact)
    with new_folder(output, replaces=MANIFEST if overwrite else "") as folder:
        for name in manifest.files.keys() - {PLAN, LAYERS}:
            shutil.copyfile(artifact / name, folder / name)
        refuse_changes(artifact, files)
        reference = OnnxBackend(str(artifact))
        manifest = replace(manifest, tensorrt=None)
        text = text or proof_text(str(artifact))
        return with_plans(folder, manifest, plans, reference, text, allow_drift=allow_drift)


def with_plans(
    folder: Path,
    manifest: Manifest,
    options: PlanOptions,
    reference: Backend,
    text: ProofText,
    *,
    allow_drift: bool,
) -> Manifest:
    """Build the plans of the graph in `folder` and prove them against `reference`; the manifest that says so."""
    built = build_plan(folder, manifest, options)
    manifest = replace(manifest, files=hash_files(folder), tensorrt=built)
    write_manifest(folder, manifest)  # the plans are loaded as a user will load them
    log.info("checking parity with TensorRT on real text")
    weight_bytes = sum(file.stat().st_size for file in folder.glob(f"{GRAPH}*"))
    parity = check_parity(reference, TensorRTBackend(str(folder)), text, BOUNDS[manifest.precision], weight_bytes)
    require_parity(parity, allow_drift)
    manifest = replace(
        manifest,
        tensorrt=replace(built, parity=parity.as_dict()),
        drift_allowed=manifest.drift_allowed or not parity.passed,
    )
    write_manifest(folder, manifest)
    return manifest
