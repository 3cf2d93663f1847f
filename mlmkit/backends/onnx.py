"""An artifact on ONNX Runtime: the CPU, or CUDA where there is a driver."""

import ctypes
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from mlmkit.backends import Batch, Predicted, Scored, open_artifact
from mlmkit.backends.graph import drop_outputs
from mlmkit.errors import CheckError, UserError

TOP_OUTPUTS = {"top_log_prob", "top_id"}


class OnnxBackend:
    """Two sessions over one graph, each made when first needed: scoring, without the top-k, and prediction."""

    name = "onnx"

    def __init__(self, path: str, device: str = "auto") -> None:
        _, self.tokenizer, self.info = open_artifact(path)
        self.device = _pick_device(device)
        self._graph = Path(path) / "model.onnx"

    def score(self, batch: Batch) -> Scored:
        """See `Backend`."""
        return Scored(*self._run(self._scoring, batch))

    def predict(self, batch: Batch) -> Predicted:
        """See `Backend`."""
        return Predicted(*self._run(self._predicting, batch))

    @cached_property
    def _predicting(self) -> ort.InferenceSession:
        session = _session(self._graph, str(self._graph), self.device)
        k = next(output.shape[-1] for output in session.get_outputs() if output.name == "top_id")
        if k != self.info.top_k:
            raise UserError(f"{self._graph} gives {k} candidates, its manifest says {self.info.top_k}: export it again")
        return session

    @cached_property
    def _scoring(self) -> ort.InferenceSession:
        try:
            graph = drop_outputs(self._graph.read_bytes(), TOP_OUTPUTS)
        except ValueError as error:
            raise UserError(f"{self._graph}: {error}: export the checkpoint again") from None
        return _session(self._graph, graph, self.device)

    def _run(self, session: ort.InferenceSession, batch: Batch) -> list[Any]:
        outputs = [output.name for output in session.get_outputs()]
        if self.device == "cpu":
            try:
                return list(session.run(outputs, batch._asdict()))
            except Exception as error:  # onnxruntime's own exceptions share no public base
                raise CheckError(
                    f"{self.info.path}: ONNX Runtime failed on a batch of shape {batch.input_ids.shape}, in a model "
                    f"of {self.info.max_length} tokens and {self.info.vocabulary_size} ids: {_first_line(error)}"
                ) from error
        # Binding lets the inputs go to the device in one step each and keeps every intermediate there; the outputs
        # are a few numbers a masked position.
        binding = session.io_binding()
        for name, values in batch._asdict().items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(_contiguous(values), "cuda", 0))
        for name in outputs:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()


def _session(path: Path, graph: str | bytes, device: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # as torchrun sets it
    options.intra_op_num_threads = max(cores // sharing, 1) if cores else 0
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent.absolute())
    )
    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        cuda_options = {
            "device_id": "0",
            "use_tf32": "0",  # ten bits of mantissa would break the parity that the manifest states
            "arena_extend_strategy": "kSameAsRequested",
        }
        providers.insert(0, ("CUDAExecutionProvider", cuda_options))
    try:
        session = ort.InferenceSession(graph, options, providers=providers)
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise UserError(f"{path}: ONNX Runtime cannot load it: {_first_line(error)}") from None
    if device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise UserError("ONNX Runtime could not start CUDA (its messages are above): use --device cpu")
    return session


def _pick_device(device: str) -> str:
    """CUDA only where a driver answers: asking ONNX Runtime for it elsewhere prints errors."""
    if device == "cpu":
        return "cpu"
    if _has_cuda_driver() and "CUDAExecutionProvider" in ort.get_available_providers():
        ort.preload_dlls()
        return "cuda"
    if device == "cuda":
        raise UserError("no CUDA driver, or an onnxruntime without CUDA: use --device cpu")
    return "cpu"


def _has_cuda_driver() -> bool:
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _contiguous(array: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.ascontiguousarray(array, dtype=np.int64)
