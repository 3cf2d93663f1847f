"""Everything that runs a model: torch, ONNX Runtime or TensorRT, behind one small protocol, `Backend`.

`load` picks one and imports its libraries only then, so running an artifact imports neither torch nor transformers.
"""

import logging
import shlex
from os import PathLike, fspath
from pathlib import Path

from mlmkit.artifact import Manifest, is_artifact, parse_manifest, refuse_other_graphs
from mlmkit.backends.protocol import Backend, Batch, ModelInfo, Scored, capacity, merge_rows, score_together
from mlmkit.collector import collector_paused
from mlmkit.errors import UserError, install_hint, require
from mlmkit.files import locate_model

__all__ = [
    "Backend",
    "Batch",
    "ModelInfo",
    "Scored",
    "capacity",
    "load",
    "merge_rows",
    "score_together",
    "tensorrt_obstacle",
    "unproven",
]

log = logging.getLogger(__name__)

INSTALL_TENSORRT = f"{install_hint('rtx')} for RTX cards, or with trt for data-centre GPUs"
BACKENDS = ("auto", "torch", "onnx", "tensorrt")
DEVICES = ("auto", "cpu", "cuda")


def tensorrt_obstacle(manifest: Manifest) -> str | None:
    """Why this machine cannot run the artifact's TensorRT plan, or None if it can."""
    if manifest.tensorrt is None:
        return "the artifact has no TensorRT plan: mlmkit export --trt builds one"
    try:
        from mlmkit.backends.tensorrt.backend import obstacle
    except (ImportError, OSError) as error:  # OSError: the bindings miss a shared library
        return f"TensorRT or cuda-python cannot be imported ({error}): {INSTALL_TENSORRT}"
    return obstacle(manifest.tensorrt)


def unproven(path: str | Path, manifest: Manifest) -> str | None:
    """Why `auto` does not use the artifact's TensorRT plan even if it can run here, or None if it does."""
    if manifest.tensorrt is None or manifest.tensorrt.parity is not None:
        return None
    command = f"mlmkit export {shlex.quote(str(path))} --prove"
    return f"no GPU has run its TensorRT plan yet: {command} compares it with the graph"


def load(
    path: str | PathLike[str], backend: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> Backend:
    """Load a checkpoint (a folder or a hub name) or an artifact.

    With `auto`, a checkpoint runs on torch, an artifact on TensorRT if it has a proven plan for this machine, otherwise
    on ONNX Runtime. With `trust_remote_code`, Python code that comes with a checkpoint runs, and weights may be in
    `pytorch_model.bin`. Raises `UserError` if `path` is neither or cannot run on that backend and device, and for an
    artifact with `trust_remote_code`.
    """
    if backend not in BACKENDS:
        raise UserError(f"unknown backend {backend!r}: choose {', '.join(BACKENDS)}")
    if device not in DEVICES:
        raise UserError(f"unknown device {device!r}: choose {', '.join(DEVICES)}")
    path = locate_model(fspath(path))
    if is_artifact(Path(path)):
        if backend == "torch":
            raise UserError(f"{path} is an artifact, which torch cannot run: name the checkpoint it came from")
        if trust_remote_code:
            raise UserError(f"{path} is an artifact, which has no code: leave out --trust-remote-code")
        if _picks_tensorrt(path, backend, device):
            from mlmkit.backends.tensorrt.backend import TensorRTBackend

            return TensorRTBackend(path)
        from mlmkit.backends.onnx import OnnxBackend

        return OnnxBackend(path, device)
    if backend in ("onnx", "tensorrt"):
        refuse_other_graphs(Path(path))
        raise UserError(f"{path} is not an artifact: export it first (mlmkit export {path} --output ARTIFACT)")
    require("train", "torch", "transformers", "safetensors")
    with collector_paused():
        from mlmkit.backends.torch import TorchBackend

        return TorchBackend(path, device, trust_remote_code=trust_remote_code)


def _picks_tensorrt(path: str, backend: str, device: str) -> bool:
    if backend == "onnx" or (backend == "auto" and device == "cpu"):
        return False
    if device == "cpu":
        raise UserError("TensorRT runs on CUDA only: use --backend onnx for the CPU")
    manifest = parse_manifest(Path(path))
    reason, doubt = tensorrt_obstacle(manifest), unproven(path, manifest)
    if backend == "tensorrt":
        if reason:
            raise UserError(f"{path}: {reason}")
        if doubt:
            log.warning("%s", doubt)
        return True
    if manifest.tensorrt and (reason or doubt):
        log.info("not using the TensorRT plan of %s: %s", path, reason or doubt)
    return not reason and not doubt
