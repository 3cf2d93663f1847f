"""What runs a model: torch, ONNX Runtime or TensorRT behind one small protocol. `load` picks.

Heavy imports happen in the module that is picked: running an artifact imports neither torch nor transformers.
"""

import logging
import shlex
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mlmkit.artifact import (
    DYNAMIC_INT8,
    CheckedFile,
    Manifest,
    is_artifact,
    open_files,
    parse_manifest,
    read_tokenizer,
)
from mlmkit.errors import UserError, require
from mlmkit.files import locate_model
from mlmkit.tokenizer import Tokenizer

log = logging.getLogger(__name__)

INSTALL_TENSORRT = "pip install 'mlmkit[rtx]' (RTX cards) or 'mlmkit[trt]' (data-centre GPUs)"
BACKENDS = ("auto", "torch", "onnx", "tensorrt")
DEVICES = ("auto", "cpu", "cuda")


class Batch(NamedTuple):
    """Inputs of the scoring graph, int64. `input_ids`, `attention_mask` `[batch, seq]`; the rest `[masked]`.

    `positions` are flat, into batch x seq. `targets` are the ids whose probability is asked for.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    positions: NDArray[np.int64]
    targets: NDArray[np.int64]


class Scored(NamedTuple):
    """The scoring graph's outputs: of the targets `log_prob` float32, natural log, and `rank` int64, both `[masked]`.

    And the `k` best ids of each position with their log-probabilities, `[masked, k]`, best first.
    """

    log_prob: NDArray[np.float32]
    rank: NDArray[np.int64]
    top_log_prob: NDArray[np.float32]
    top_id: NDArray[np.int64]


@dataclass(frozen=True)
class ModelInfo:
    """What a backend runs. `fingerprint` is that of the checkpoint's weights, the same for its artifact.

    With `sees_padding`, a row's scores change with the padding behind it, so a batch must hold rows of one length.
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
        """Whether a row's scores change with the other rows of its batch, as scales found while it runs make them."""
        return self.precision == DYNAMIC_INT8


class Backend(Protocol):
    """A loaded model with its tokenizer. `name` and `device` say what runs it.

    `score` may be called from several threads at once.
    """

    name: str
    device: str
    info: ModelInfo
    tokenizer: Tokenizer

    @property
    def manifest(self) -> Manifest | None:
        """The artifact's, as it was when it was loaded; None for a checkpoint."""
        ...

    def score(self, batch: Batch) -> Scored:
        """Log-probability and rank of each target, and the `info.top_k` best candidates at its position."""
        ...


def capacity(backend: Backend) -> int:
    """How many tokens of a text fit in a row, beside the special tokens. Raises `UserError` if none does."""
    room = backend.info.max_length - backend.tokenizer.added_tokens
    if room < 1:
        raise UserError(
            f"{backend.info.path} takes {backend.info.max_length} tokens, and the special tokens take all of them"
        )
    return room


def open_artifact(path: str) -> tuple[Manifest, dict[str, CheckedFile], Tokenizer, ModelInfo]:
    """An artifact's manifest and its files, every one checked, its tokenizer, and what they say of the model.

    Raises `UserError` when a file has changed or the tokenizer does not fit the model.
    """
    manifest, files = open_files(Path(path))
    tokenizer = read_tokenizer(Path(path), manifest, files)
    info = ModelInfo(
        path=path,
        fingerprint=manifest.fingerprint,
        architecture=manifest.architecture,
        vocabulary_size=manifest.vocabulary_size,
        max_length=manifest.max_length,
        precision=manifest.precision,
        top_k=manifest.top_k,
        sees_padding=manifest.sees_padding,
    )
    return manifest, files, tokenizer, info


def tensorrt_obstacle(manifest: Manifest) -> str | None:
    """Why this machine cannot run the artifact's TensorRT plans, or None if it can."""
    if manifest.tensorrt is None:
        return "the artifact has no TensorRT plan: mlmkit export --trt builds one"
    try:
        from mlmkit.backends.tensorrt import obstacle
    except (ImportError, OSError) as error:  # OSError: a library that the bindings want
        return f"TensorRT or cuda-python cannot be imported ({error}): {INSTALL_TENSORRT}"
    return obstacle(manifest.tensorrt)


def unproven(path: str | Path, manifest: Manifest) -> str | None:
    """Why `auto` does not pick the artifact's TensorRT plan although it may run here, or None if it does."""
    if manifest.tensorrt is None or manifest.tensorrt.parity is not None:
        return None
    command = f"mlmkit export {shlex.quote(str(path))} --prove"
    return f"no GPU has run its TensorRT plan yet: {command} compares it with the graph"


def load(path: str | PathLike[str], backend: str = "auto", device: str = "auto") -> Backend:
    """A checkpoint folder or hub name with torch; an artifact with TensorRT if it can be, else with ONNX Runtime.

    Raises `UserError` when `path` is neither, or cannot be run with what was asked for.
    """
    if backend not in BACKENDS:
        raise UserError(f"no backend {backend!r}: choose {', '.join(BACKENDS)}")
    if device not in DEVICES:
        raise UserError(f"no device {device!r}: choose {', '.join(DEVICES)}")
    path = locate_model(fspath(path))
    if is_artifact(Path(path)):
        if backend == "torch":
            raise UserError(f"{path} is an artifact, which torch cannot run: name the checkpoint it came from")
        if _picks_tensorrt(path, backend, device):
            from mlmkit.backends.tensorrt import TensorRTBackend

            return TensorRTBackend(path)
        from mlmkit.backends.onnx import OnnxBackend

        return OnnxBackend(path, device)
    if backend in ("onnx", "tensorrt"):
        raise UserError(f"{path} is no artifact: export it first (mlmkit export {path} --output ARTIFACT)")
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
