"""Runs an artifact's graph with ONNX Runtime, on the CPU or with CUDA."""

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from mlmkit.artifact import GRAPH, REEXPORT_HINT, WEIGHTS, Manifest, refuse_changes
from mlmkit.backends.protocol import INPUTS, OUTPUTS, Batch, Scored, open_artifact
from mlmkit.distributed import cores
from mlmkit.errors import CheckError, UserError, first_line

NO_BF16 = "ONNX Runtime has no bf16 on the CPU: use --device cuda, or export with --precision fp32"


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph: `type` as numpy names it, `shape` with None for a dynamic axis."""

    type: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Graph:
    """The inputs and outputs that a graph declares, by name."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class OnnxBackend:
    """One session over the artifact's graph, created from the bytes that were hashed.

    Raises `UserError` if the artifact is damaged or ONNX Runtime cannot run it on the device.
    """

    name = "onnx"

    def __init__(self, path: str, device: str = "auto") -> None:
        self.manifest, files, self.tokenizer, self.info = open_artifact(path)
        self.device = _pick_device(device)
        if self.manifest.precision == "bf16" and self.device == "cpu":
            raise UserError(f"{path}: {NO_BF16}")
        self._session = open_session(Path(path), self.manifest, files[GRAPH].content, self.device)
        if problems := graph_problems(describe_graph(self._session), self.manifest):
            raise UserError(f"{path}/{GRAPH} {problems[0]}: {REEXPORT_HINT}")
        refuse_changes(Path(path), files)  # the session has opened the weights file by its path

    def score(self, batch: Batch) -> Scored:
        if not len(batch.positions):  # on the CPU, ONNX Runtime 1.30 divides by zero, and the process dies of SIGFPE
            return Scored(*(np.zeros((0, self.info.top_k)[:axes], kind) for kind, axes in OUTPUTS.values()))
        try:
            if self.device == "cpu":
                return Scored(*self._session.run(Scored._fields, batch._asdict()))  # pyright: ignore[reportArgumentType]
            # With a binding, each input is copied to the device once and all intermediate results stay there. The
            # outputs are small: a few numbers per masked position.
            binding = self._session.io_binding()
            for name, values in batch._asdict().items():
                contiguous = np.ascontiguousarray(values, dtype=np.int64)
                binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(contiguous, "cuda", 0))
            for name in Scored._fields:
                binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(binding)
            return Scored(*binding.copy_outputs_to_cpu())
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise CheckError(
                f"{self.info.path}: ONNX Runtime failed on a batch of shape {batch.input_ids.shape}; the model takes "
                f"{self.info.max_length} tokens and has {self.info.vocabulary_size} ids: {first_line(error)}"
            ) from error

    def shrink(self, batch: Batch) -> None:
        """Score a small batch and free the memory that the CPU arena has kept from earlier calls."""
        options = ort.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._session.run(None, batch._asdict(), options)


def open_session(folder: Path, manifest: Manifest, graph: bytes, device: str) -> ort.InferenceSession:
    """A session over an artifact's graph on `cpu` or `cuda`. Raises `UserError` if ONNX Runtime cannot load it."""
    # In int8 graphs, common subexpression elimination would merge the quantizers of query, key and value. ONNX Runtime
    # makes no int8 kernel of a product whose quantized input has other readers: 6 of 13 in a BERT of two layers.
    disabled = ["CommonSubexpressionElimination"] if manifest.precision == "int8" else []
    try:
        session = ort.InferenceSession(
            graph,
            _options(folder, manifest, device),
            providers=_providers(device),
            disabled_optimizers=disabled,
            enable_fallback=False,  # it would print to standard output, and change the device unasked
        )
    except Exception as error:  # onnxruntime's own exceptions share no public base
        reason = first_line(error)[:300]
        reason = reason if reason.isprintable() else ascii(reason)  # it may quote a name from the graph
        raise UserError(f"{folder}/{GRAPH}: ONNX Runtime cannot load it: {reason}") from None
    if device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise UserError("ONNX Runtime could not start CUDA (its messages are above): use --device cpu")
    return session


def describe_graph(session: ort.InferenceSession) -> Graph:
    """The inputs and outputs of a session's graph."""
    return Graph(_describe(session.get_inputs()), _describe(session.get_outputs()))


def graph_problems(graph: Graph, manifest: Manifest) -> list[str]:
    """How a graph differs from the contract and from its manifest, one phrase each; empty if it fits both."""
    problems = []
    for kind, tensors, expected in (("input", graph.inputs, INPUTS), ("output", graph.outputs, OUTPUTS)):
        if {name: (tensor.type, len(tensor.shape)) for name, tensor in tensors.items()} != expected:
            problems.append(f"does not have the {kind}s {', '.join(expected)} with their types")
    if not problems and (k := graph.outputs["top_id"].shape[1]) != manifest.top_k:
        problems.append(f"gives {k} candidates, its manifest says {manifest.top_k}")
    return problems


def _describe(values: Sequence[Any]) -> dict[str, Tensor]:
    tensors = {}
    for value in values:
        kind = value.type.removeprefix("tensor(").removesuffix(")")
        shape = tuple(size if isinstance(size, int) else None for size in value.shape)
        tensors[value.name] = Tensor("float32" if kind == "float" else kind, shape)
    return tensors


def _options(folder: Path, manifest: Manifest, device: str) -> ort.SessionOptions:
    options = ort.SessionOptions()
    # Errors reach the user as exceptions. For CUDA, only the log says why it could not start.
    options.log_severity_level = 3 if device == "cuda" else 4
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
    options.intra_op_num_threads = max(cores() // processes, 1)
    # ONNX Runtime opens the files that a graph names, but only inside this folder. Without a weights file in the
    # manifest it gets the path of the graph itself, in which no file can lie.
    weights_folder = folder if WEIGHTS in manifest.files else folder / GRAPH
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(weights_folder.absolute())
    )
    options.add_session_config_entry("session.load_model_format", "ONNX")  # do not guess another format
    return options


def _providers(device: str) -> list[Any]:
    cuda_options = {
        "device_id": "0",
        "use_tf32": "0",  # with 10 bits of mantissa, the parity that the manifest states would not hold
        "arena_extend_strategy": "kSameAsRequested",
    }
    cuda: list[Any] = [("CUDAExecutionProvider", cuda_options)] if device == "cuda" else []
    return [*cuda, "CPUExecutionProvider"]


def why_no_cuda() -> str:
    """Why ONNX Runtime cannot use CUDA here, or an empty string if it can.

    Asks the driver itself, because a failed attempt of ONNX Runtime prints errors.
    """
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "this onnxruntime is built without CUDA"
    try:
        return "" if ctypes.CDLL("libcuda.so.1").cuInit(0) == 0 else "the CUDA driver finds no GPU"
    except OSError:
        return "no CUDA driver"


def _pick_device(device: str) -> str:
    obstacle = "" if device == "cpu" else why_no_cuda()
    if device == "cpu" or (device == "auto" and obstacle):
        return "cpu"
    if obstacle:
        raise UserError(f"{obstacle}: use --device cpu")
    ort.preload_dlls()
    return "cuda"
