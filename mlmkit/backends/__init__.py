"""Everything that runs a model: torch, ONNX Runtime or TensorRT, behind one small protocol, `Backend`.

`load` picks one and imports its libraries only then, so running an artifact imports neither torch nor transformers.
"""

import logging
import shlex
from dataclasses import dataclass, fields
from os import PathLike, fspath
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mlmkit.artifact import DYNAMIC_INT8, CheckedFile, Manifest, is_artifact, open_files, parse_manifest, read_tokenizer
from mlmkit.errors import UserError, require
from mlmkit.files import locate_model
from mlmkit.tokenizer import Tokenizer

log = logging.getLogger(__name__)

INSTALL_TENSORRT = "pip install 'mlmkit[rtx]' (RTX cards) or 'mlmkit[trt]' (data-centre GPUs)"
BACKENDS = ("auto", "torch", "onnx", "tensorrt")
DEVICES = ("auto", "cpu", "cuda")
# The tensors of the scoring graph (docs/architecture.md): type and number of axes.
INPUTS = {"input_ids": ("int64", 2), "attention_mask": ("int64", 2), "positions": ("int64", 1), "targets": ("int64", 1)}
OUTPUTS = {"log_prob": ("float32", 1), "rank": ("int64", 1), "top_log_prob": ("float32", 2), "top_id": ("int64", 2)}


class Batch(NamedTuple):
    """The scoring graph's inputs, all int64.

    `input_ids` (corrupted, with special tokens) and `attention_mask` (1 = token) are `[batch, seq]`. `positions`, flat
    indices into batch x seq, and `targets`, the ids to score there, are `[masked]`. Positions may repeat.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    positions: NDArray[np.int64]
    targets: NDArray[np.int64]


class Scored(NamedTuple):
    """The scoring graph's outputs.

    `log_prob` is the natural log of each target's probability, float32 `[masked]`. `rank` is the number of other ids
    with a logit at least as large, int64 `[masked]`. `top_log_prob` and `top_id`, float32 and int64 `[masked, k]`, are
    the k best ids at each position, best first.
    """

    log_prob: NDArray[np.float32]
    rank: NDArray[np.int64]
    top_log_prob: NDArray[np.float32]
    top_id: NDArray[np.int64]


@dataclass(frozen=True)
class ModelInfo:
    """Properties of a loaded model.

    `fingerprint` is that of the checkpoint's weights; its artifacts have the same one. `max_length` counts special
    tokens too. `sees_padding` means that a row's scores change with the padding after it, so that all rows of a batch
    must have the same length.
    """

    path: str
    fingerprint: str
    architecture: str
    vocabulary_size: int
    max_length: int
    precision: str
    top_k: int
    sees_padding: bool

    @property
    def couples_batch(self) -> bool:
        """Whether a row's scores change with the other rows of its batch: dynamic int8 computes its scales from all."""
        return self.precision == DYNAMIC_INT8


class Backend(Protocol):
    """A loaded model with its tokenizer. `name` is one of `BACKENDS`, `device` is `cpu` or `cuda`."""

    name: str
    device: str
    info: ModelInfo
    tokenizer: Tokenizer

    @property
    def manifest(self) -> Manifest | None:
        """The artifact's manifest as it was when it was loaded; None for a checkpoint."""
        ...

    def score(self, batch: Batch) -> Scored:
        """Score the targets and find the `info.top_k` best candidates at their positions. Thread-safe.

        Raises `CheckError` if the model cannot run the batch and `UserError` if the GPU is out of memory.
        """
        ...


def capacity(backend: Backend) -> int:
    """The most tokens of a text that fit in a row next to the special tokens. Raises `UserError` if none fits."""
    room = backend.info.max_length - backend.tokenizer.added_tokens
    if room < 1:
        raise UserError(
            f"{backend.info.path} takes {backend.info.max_length} tokens, and the special tokens need all of them"
        )
    return room


def open_artifact(path: str) -> tuple[Manifest, dict[str, CheckedFile], Tokenizer, ModelInfo]:
    """Check every file of an artifact. Returns its manifest, files, tokenizer and model properties.

    Raises `UserError` if a file has changed or the tokenizer does not fit the model.
    """
    manifest, files = open_files(Path(path))
    tokenizer = read_tokenizer(Path(path), manifest, files)
    described = {field.name: getattr(manifest, field.name) for field in fields(ModelInfo) if field.name != "path"}
    return manifest, files, tokenizer, ModelInfo(path=path, **described)


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


def load(path: str | PathLike[str], backend: str = "auto", device: str = "auto") -> Backend:
    """Load a checkpoint (a folder or a hub name) or an artifact.

    With `auto`, a checkpoint runs on torch, an artifact on TensorRT if it has a proven plan for this machine, otherwise
    on ONNX Runtime. Raises `UserError` if `path` is neither or cannot run on that backend and device.
    """
    if backend not in BACKENDS:
        raise UserError(f"unknown backend {backend!r}: choose {', '.join(BACKENDS)}")
    if device not in DEVICES:
        raise UserError(f"unknown device {device!r}: choose {', '.join(DEVICES)}")
    path = locate_model(fspath(path))
    if is_artifact(Path(path)):
        if backend == "torch":
            raise UserError(f"{path} is an artifact, which torch cannot run: name the checkpoint it came from")
        if _picks_tensorrt(path, backend, device):
            from mlmkit.backends.tensorrt.backend import TensorRTBackend

            return TensorRTBackend(path)
        from mlmkit.backends.onnx import OnnxBackend

        return OnnxBackend(path, device)
    if backend in ("onnx", "tensorrt"):
        raise UserError(f"{path} is not an artifact: export it first (mlmkit export {path} --output ARTIFACT)")
    require("train", "torch", "transformers", "safetensors")
    from mlmkit.backends.torch import TorchBackend

    return TorchBackend(path, device)


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
