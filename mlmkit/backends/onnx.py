"""An artifact on ONNX Runtime: the CPU, or CUDA where there is a driver."""

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from mlmkit.artifact import AGAIN, GRAPH, refuse_changes
from mlmkit.backends import Batch, Scored, open_artifact
from mlmkit.backends.graph import graph_problems, read_graph
from mlmkit.distributed import cores
from mlmkit.errors import CheckError, UserError, first_line

NO_BF16 = "it has no bf16 on the CPU: use --device cuda, or export with --precision fp32"


class OnnxBackend:
    """One session over the artifact's graph, made of the bytes that were hashed."""

    name = "onnx"

    def __init__(self, path: str, device: str = "auto") -> None:
        self.manifest, files, self.tokenizer, self.info = open_artifact(path)
        graph = files[GRAPH].content
        try:
            problems = graph_problems(read_graph(graph), self.manifest)
        except ValueError as error:
            problems = [str(error)]
        if problems:
            raise UserError(f"{path}/{GRAPH} {problems[0]}: {AGAIN}")
        self.device = _pick_device(device)
        if self.manifest.precision == "bf16" and self.device == "cpu":
            raise UserError(f"{path}: ONNX Runtime cannot run it: {NO_BF16}")
        self._session = self._open(Path(path), graph)
        refuse_changes(Path(path), files)  # the session has opened weights beside the graph by their path

    def score(self, batch: Batch) -> Scored:
        try:
            if self.device == "cpu":
                return Scored(*self._session.run(Scored._fields, batch._asdict()))  # pyright: ignore[reportArgumentType]
            # Binding lets the inputs go to the device in one step each and keeps every intermediate there; the outputs
            # are a few numbers a masked position.
            binding = self._session.io_binding()
            for name, values in batch._asdict().items():
                binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(_contiguous(values), "cuda", 0))
            for name in Scored._fields:
                binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(binding)
            return Scored(*binding.copy_outputs_to_cpu())
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise CheckError(
                f"{self.info.path}: ONNX Runtime failed on a batch of shape {batch.input_ids.shape}, in a model "
                f"of {self.info.max_length} tokens and {self.info.vocabulary_size} ids: {first_line(error)}"
            ) from error

    def shrink(self, batch: Batch) -> None:
        """Return what the CPU's arena keeps of earlier calls, behind a call on a small batch."""
        options = ort.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._session.run(None, batch._asdict(), options)

    def _open(self, folder: Path, graph: bytes) -> ort.InferenceSession:
        # The optimizer would merge the quantizers that query, key and value have each, and a product whose input others
        # read does not become an int8 kernel: 6 of 13 in a BERT of two layers.
        without = ["CommonSubexpressionElimination"] if self.info.precision == "int8" else []
        try:
            session = ort.InferenceSession(
                graph,
                _options(folder, self.device),
                providers=_providers(self.device),
                disabled_optimizers=without,
                enable_fallback=False,  # it would print to standard output, and change the device unasked
            )
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise UserError(f"{folder}/{GRAPH}: ONNX Runtime cannot load it: {first_line(error)}") from None
        if self.device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
            raise UserError("ONNX Runtime could not start CUDA (its messages are above): use --device cpu")
        return session


def _options(folder: Path, device: str) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3 if device == "cuda" else 4  # its exceptions say the same, but for why CUDA fails
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # as torchrun sets it
    options.intra_op_num_threads = max(cores() // sharing, 1)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.absolute()))
    # Not to be guessed from the bytes: another format could name files that read_graph has not seen.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    return options


def _providers(device: str) -> list[Any]:
    cuda_options = {
        "device_id": "0",
        "use_tf32": "0",  # ten bits of mantissa would break the parity that the manifest states
        "arena_extend_strategy": "kSameAsRequested",
    }
    cuda: list[Any] = [("CUDAExecutionProvider", cuda_options)] if device == "cuda" else []
    return [*cuda, "CPUExecutionProvider"]


def why_no_cuda() -> str:
    """Why ONNX Runtime cannot run on CUDA here; empty if it can. Trying it out prints errors where it cannot."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "this onnxruntime is built without CUDA"
    try:
        return "" if ctypes.CDLL("libcuda.so.1").cuInit(0) == 0 else "the CUDA driver finds no GPU"
    except OSError:
        return "no CUDA driver"


def _pick_device(device: str) -> str:
    reason = "" if device == "cpu" else why_no_cuda()
    if device == "cpu" or (device == "auto" and reason):
        return "cpu"
    if reason:
        raise UserError(f"{reason}: use --device cpu")
    ort.preload_dlls()
    return "cuda"


def _contiguous(array: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.ascontiguousarray(array, dtype=np.int64)
