"""Proof that a TensorRT plan computes what the graph does, on the GPU that runs it. Needs no torch."""

import logging
import os
from dataclasses import replace
from pathlib import Path

from mlmkit.artifact import MANIFEST, Manifest, read_manifest, weight_bytes, write_manifest
from mlmkit.backends import Backend, tensorrt_obstacle
from mlmkit.backends.onnx import OnnxBackend
from mlmkit.errors import UserError
from mlmkit.export.parity import BOUNDS, check_parity, is_within, require_parity
from mlmkit.export.proof_text import ProofText, proof_text
from mlmkit.files import locked

log = logging.getLogger(__name__)


def prove(artifact: Path, *, text: ProofText | None = None, allow_drift: bool = False) -> Manifest:
    """Run an artifact's plan beside its graph on ONNX Runtime, and write the report into its manifest.

    Raises `UserError` where the plan cannot run, and `CheckError` when parity does not hold; the manifest then stays.
    """
    with locked(artifact):
        manifest = read_manifest(artifact)
        if reason := tensorrt_obstacle(manifest):
            raise UserError(f"{artifact}: {reason}")
        if not os.access(artifact, os.W_OK):
            raise UserError(f"{artifact} cannot be written, and the proof is kept in its {MANIFEST}")
        text = text or proof_text(str(artifact))
        return prove_plan(artifact, manifest, None, text, allow_drift=allow_drift)


def prove_plan(
    folder: Path, manifest: Manifest, reference: Backend | None, text: ProofText, *, allow_drift: bool
) -> Manifest:
    """Hold the plan to `reference`, by default the graph on ONNX Runtime. Writes the manifest, and returns it."""
    from mlmkit.backends.tensorrt.backend import TensorRTBackend  # needs TensorRT and cuda-python

    engine = TensorRTBackend(str(folder))
    log.info("checking parity with TensorRT on real text")
    _, proven = text.split(manifest.precision)
    reference = reference or OnnxBackend(str(folder))
    parity = check_parity(reference, engine, proven, BOUNDS[manifest.precision], weight_bytes(folder))
    require_parity(parity, allow_drift)
    assert manifest.tensorrt is not None  # or the backend had refused
    manifest = replace(
        manifest,
        tensorrt=replace(manifest.tensorrt, gpu=engine.gpu, parity=parity.as_dict()),
        drift_allowed=not (parity.passed and is_within(manifest.parity)),
    )
    write_manifest(folder, manifest)
    return manifest
