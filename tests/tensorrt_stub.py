"""A stand-in for TensorRT's runtime on a machine without a GPU: control flow only, no proof that a plan runs.

Enums, the logger and everything else that works without a GPU are those of the real `tensorrt_rtx`. ONNX Runtime
computes what a plan would, so the numbers that come out of the backend went through its buffers, copies and splits. The
stand-ins also fail on what is undefined in the C++ library: memory must be live and large enough, a context runs one
thread at a time and must not change until its work is done.
"""

import ctypes
import json
import sys
import threading
import types
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from typing import Any

import cuda_stub
import numpy as np
import onnxruntime as ort
import pytest
from cuda_stub import MACHINE, Machine, check_memory, stream_of

trt: Any = pytest.importorskip(
    "tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux on x86-64 only", exc_type=ImportError
)

MODULES = ("cuda", "execution_contexts", "rtx", "backend", "bindings")
OURS = tuple(f"mlmkit.backends.tensorrt.{name}" for name in MODULES)
SESSIONS: dict[bytes, ort.InferenceSession] = {}


def install(monkeypatch: Any, flavour: str = "tensorrt") -> Machine:
    """Return a fresh machine. Its modules can be imported; those of mlmkit that import them are not imported yet."""
    MACHINE.__init__()
    replaced: dict[str, Any] = {"tensorrt": None, "tensorrt_rtx": None}
    replaced |= {name: module(name) for name in ("cuda", "cuda.bindings")}
    replaced[flavour] = module(flavour, vars(trt), Runtime=Runtime, __version__=MACHINE.version)
    replaced["cuda.bindings.runtime"] = runtime = module("cuda.bindings.runtime", vars(cuda_stub))
    replaced["cuda.bindings"].runtime = runtime
    if flavour == "tensorrt":
        del replaced[flavour].ComputeCapability
    for name, value in replaced.items():
        monkeypatch.setitem(sys.modules, name, value)
    forget()
    return MACHINE


def module(name: str, *contents: Mapping[str, Any], **values: Any) -> Any:
    created = types.ModuleType(name)
    for given in (*contents, values):
        vars(created).update(given)
    created.__name__, created.__spec__ = name, ModuleSpec(name, None)
    return created


def forget() -> None:
    """Unload every module of mlmkit that holds the stand-ins."""
    for name in OURS:
        sys.modules.pop(name, None)


class Runtime:
    def __init__(self, logger) -> None:
        if not MACHINE.starts:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    def get_engine_validity(self, plan):
        return trt.EngineValidity.__members__[MACHINE.validity[0]], MACHINE.validity[1]

    def deserialize_cuda_engine(self, plan):
        header, _, graph = bytes(plan).partition(b"\n")
        if MACHINE.load_error:
            self._logger.log(trt.ILogger.Severity.ERROR, MACHINE.load_error)
            return None
        return Engine(json.loads(header), graph, self._logger)


class Engine:
    def __init__(self, header: dict[str, Any], graph: bytes, logger: Any) -> None:
        if graph not in SESSIONS:
            SESSIONS[graph] = ort.InferenceSession(graph)
        self.header, self.session, self.logger = header, SESSIONS[graph], logger
        self.names = [*header["profiles"][0], *header["outputs"]]
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), len(header["profiles"])

    def get_tensor_name(self, index):
        return self.names[index]

    def get_tensor_dtype(self, name):
        return trt.float32 if "log_prob" in name else trt.DataType.__members__[MACHINE.indices]

    def get_tensor_location(self, name):
        return trt.TensorLocation.HOST if name == MACHINE.host_tensor else trt.TensorLocation.DEVICE

    def get_tensor_shape(self, name):
        return next(tuple(value.shape) for value in self.session.get_outputs() if value.name == name)

    def create_runtime_config(self):
        return RuntimeConfig()

    def create_execution_context(self, strategy_or_config):
        strategy = strategy_or_config
        if isinstance(strategy_or_config, RuntimeConfig):
            strategy, cache = strategy_or_config.strategy, strategy_or_config.cache
            MACHINE.calls.append(("kernels", cache.content))
            cache.content = (cache.content or MACHINE.gpu.encode()) + b"."
        assert strategy == trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        return None if MACHINE.refuses == "context" else ExecutionContext(self)


class RuntimeConfig:
    """TensorRT for RTX's."""

    strategy: Any
    cache: Any

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        return RuntimeCache()

    def set_runtime_cache(self, cache):
        self.cache = cache


class RuntimeCache:
    """Its content is the GPU's name and one byte for each context that was made with it."""

    content = b""

    def deserialize(self, content):
        if valid := content.startswith(MACHINE.gpu.encode()):
            self.content = content
        return valid

    def serialize(self):
        return self.content


class ExecutionContext:
    def __init__(self, engine: Engine) -> None:
        self._engine, self._profile = engine, 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._changes, self._running = 0, threading.Lock()

    def set_optimization_profile_async(self, profile, stream):
        stream_of(stream)
        self._profile, self._shapes, self._changes = profile, {}, self._changes + 1
        return True

    def set_input_shape(self, name, shape):
        smallest, _, largest = self._engine.header["profiles"][self._profile][name]
        if MACHINE.refuses == "shape" or not all(
            low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
        ):
            self._engine.logger.log(trt.ILogger.Severity.ERROR, f"{name} is out of\nthe profile")
            return False
        self._shapes[name], self._changes = tuple(shape), self._changes + 1
        return True

    def set_tensor_address(self, name, address):
        self._addresses[name], self._changes = address, self._changes + 1
        return MACHINE.refuses != "address"

    def get_tensor_shape(self, name):
        if MACHINE.refuses == "output shape":
            return (-1,)
        return (*self._shapes["positions"], *self._engine.get_tensor_shape(name)[1:])

    def execute_async_v3(self, stream):
        if MACHINE.refuses == "execution" or self._addresses.keys() != set(self._engine.names):
            return False
        shapes, addresses, changes = dict(self._shapes), dict(self._addresses), self._changes
        MACHINE.calls.append(("execute", (self._profile, shapes)))

        def work() -> None:
            assert self._changes == changes, "the context was changed under running work"
            assert self._running.acquire(blocking=False), "two threads run one context"
            try:
                self._compute(shapes, addresses)
            finally:
                self._running.release()

        stream_of(stream).waiting.append(work)
        return True

    def _compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        feed = {name: self._at(name, addresses[name], shape).astype(np.int64) for name, shape in shapes.items()}
        outputs = self._engine.header["outputs"]
        for name, value in zip(outputs, self._engine.session.run(outputs, feed), strict=True):
            self._at(name, addresses[name], np.asarray(value).shape)[...] = value

    def _at(self, name: str, address: int, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(trt.nptype(self._engine.get_tensor_dtype(name)))
        size = int(np.prod(shape)) * dtype.itemsize
        check_memory("device", address, size, alignment=256)  # as cudaMalloc aligns
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(dtype).reshape(shape)
