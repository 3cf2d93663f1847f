"""A stand-in for `tensorrt`, with cuda_stub.py for CUDA: control flow alone, no proof that anything runs on a GPU.

ONNX Runtime computes what a plan would, so the numbers that come out of the backend went through its buffers, copies,
splits and pads. The stand-ins do only what the C++ side would, and hold the caller to what is undefined there: memory
must be live and large enough, a context runs one thread and stays as it is until its work is done. That
their names and parameters are those of the real bindings is checked in test_tensorrt_api.py.
"""

import ctypes
import json
import sys
import threading
import types
from enum import IntEnum
from importlib.machinery import ModuleSpec
from typing import Any

import numpy as np
import onnxruntime as ort
from cuda_stub import CUDA, MACHINE, Machine, check_alignment, check_memory, stream_of

OURS = tuple(f"mlmkit.backends.{name}" for name in ("cuda", "contexts", "rtx", "tensorrt", "trt"))
SESSIONS: dict[bytes, ort.InferenceSession] = {}


def install(monkeypatch: Any, flavour: str = "tensorrt") -> Machine:
    """A fresh machine, its modules importable, and mlmkit's that import them not imported yet."""
    MACHINE.__init__()
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime", flavour):
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    publish(sys.modules[flavour], [*TENSORRT, *(RTX if flavour == "tensorrt_rtx" else ())])
    publish(sys.modules["cuda.bindings.runtime"], CUDA)
    sys.modules[flavour].__version__ = MACHINE.version  # type: ignore[attr-defined]
    sys.modules["cuda"].bindings = sys.modules["cuda.bindings"]  # type: ignore[attr-defined]
    sys.modules["cuda.bindings"].runtime = sys.modules["cuda.bindings.runtime"]  # type: ignore[attr-defined]
    for name in OURS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return MACHINE


def forget() -> None:
    """Leave no module of mlmkit behind that holds the stand-ins."""
    for name in OURS:
        sys.modules.pop(name, None)


def publish(module: types.ModuleType, names: list[Any]) -> None:
    for item in names:
        setattr(module, item.__name__, item)
    if module.__name__.startswith("tensorrt"):
        module.float32, module.int32, module.int64 = DataType.FLOAT, DataType.INT32, DataType.INT64  # type: ignore
    else:
        module.cudaStreamNonBlocking = 1  # type: ignore[attr-defined]


# ------------------------------------------------------------------ tensorrt: enums and small things


class DataType(IntEnum):
    FLOAT = 0
    INT32 = 3
    INT64 = 8


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1


class TensorLocation(IntEnum):
    DEVICE = 0
    HOST = 1


def nptype(trt_type):
    return {DataType.FLOAT: np.float32, DataType.INT32: np.int32, DataType.INT64: np.int64}[trt_type]


class ILogger:
    class Severity(IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    def __init__(self) -> None:
        self.started = True


def say(logger: Any, severity: str, text: str) -> None:
    assert logger.started, "the base class was not initialised"
    logger.log(ILogger.Severity[severity], text)


# ------------------------------------------------------------------ tensorrt: running


class Runtime:
    engine: Any

    def __init__(self, logger) -> None:
        if not MACHINE.starts:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine):
        header, _, graph = bytes(serialized_engine).partition(b"\n")
        if MACHINE.load_error:
            say(self._logger, "ERROR", MACHINE.load_error)
            return None
        return self.engine(json.loads(header), graph, self._logger)


class ICudaEngine:
    def __init__(self, values: dict[str, Any], graph: bytes, logger: Any) -> None:
        self._values, self._graph, self._logger = values, graph, logger
        self._inputs = list(values["profiles"][0])

    @property
    def num_io_tensors(self):
        return len(self._inputs) + len(self._values["outputs"])

    @property
    def num_optimization_profiles(self):
        return len(self._values["profiles"])

    def get_tensor_name(self, index):
        return [*self._inputs, *self._values["outputs"]][index]

    def get_tensor_dtype(self, name):
        return DataType.FLOAT if "log_prob" in name else DataType[MACHINE.indices]

    def get_tensor_location(self, name):
        return TensorLocation.HOST if name == MACHINE.host_tensor else TensorLocation.DEVICE

    def get_tensor_shape(self, name):
        return next(tuple(value.shape) for value in self._session().get_outputs() if value.name == name)

    def create_execution_context(self, strategy):
        assert strategy == ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        return None if MACHINE.refuses == "context" else IExecutionContext(self)

    def _session(self) -> ort.InferenceSession:
        if self._graph not in SESSIONS:
            SESSIONS[self._graph] = ort.InferenceSession(self._graph)
        return SESSIONS[self._graph]


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._profile = engine, 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._state, self._running = 0, threading.Lock()

    def set_optimization_profile_async(self, profile_index, stream_handle):
        stream_of(stream_handle)
        self._profile, self._shapes, self._state = profile_index, {}, self._state + 1
        return True

    def set_input_shape(self, name, shape):
        smallest, _, largest = self._engine._values["profiles"][self._profile][name]
        if MACHINE.refuses == "shape" or not all(
            a <= size <= c for a, size, c in zip(smallest, shape, largest, strict=True)
        ):
            say(self._engine._logger, "ERROR", f"{name} is out of\nthe profile")
            return False
        self._shapes[name], self._state = tuple(shape), self._state + 1
        return True

    def set_tensor_address(self, name, memory):
        self._addresses[name], self._state = memory, self._state + 1
        return MACHINE.refuses != "address"

    def get_tensor_shape(self, name):
        if MACHINE.refuses == "output shape":
            return (-1,)
        rows = self._shapes["positions"]
        return (*rows, *(self._engine.get_tensor_shape(name)[1:]))

    def execute_async_v3(self, stream_handle):
        stream = stream_of(stream_handle)
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        if MACHINE.refuses == "execution" or self._addresses.keys() != set(names):
            return False
        shapes, addresses, state = dict(self._shapes), dict(self._addresses), self._state
        MACHINE.calls.append(("execute", (self._profile, shapes)))

        def work() -> None:
            assert self._state == state, "the context was changed under running work"
            assert self._running.acquire(blocking=False), "two threads run one context"
            try:
                self._compute(shapes, addresses)
            finally:
                self._running.release()

        stream.waiting.append(work)
        return True

    def _compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        feed = {name: self._at(name, addresses[name], shape).astype(np.int64) for name, shape in shapes.items()}
        outputs = self._engine._values["outputs"]
        for name, value in zip(outputs, self._engine._session().run(outputs, feed), strict=True):
            self._at(name, addresses[name], np.asarray(value).shape)[...] = value

    def _at(self, name: str, address: int, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(nptype(self._engine.get_tensor_dtype(name)))
        size = int(np.prod(shape)) * dtype.itemsize
        check_alignment(address)
        check_memory("device", address, size)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(dtype).reshape(shape)


Runtime.engine = ICudaEngine


# ------------------------------------------------------------------ tensorrt_rtx: what it has beside that


class ComputeCapability(IntEnum):
    """By which the bindings are known."""


class IBuilderConfig:
    """Named in an annotation."""


class EngineValidity(IntEnum):
    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class EngineInvalidityDiagnostics(IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4


class IRuntimeCache:
    """Its content is one byte for each context that was made with it, behind the name of the GPU."""

    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, blob):
        if not blob.startswith(MACHINE.gpu.encode()):
            return False
        self.content = blob
        return True

    def serialize(self):
        return self.content


class IRuntimeConfig:
    def __init__(self) -> None:
        self._strategy: Any = ExecutionContextAllocationStrategy.STATIC
        self._cache: IRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy):
        self._strategy = strategy

    def create_runtime_cache(self):
        return IRuntimeCache()

    def set_runtime_cache(self, cache):
        self._cache = cache
        return True


class RtxEngine(ICudaEngine):
    def create_runtime_config(self):
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config):  # pyright: ignore[reportIncompatibleMethodOverride]
        cache = runtime_config._cache
        MACHINE.calls.append(("kernels", cache.content))
        cache.content = (cache.content or MACHINE.gpu.encode()) + b"."
        return super().create_execution_context(runtime_config._strategy)


class RtxRuntime(Runtime):
    engine = RtxEngine

    def get_engine_validity(self, buffer):
        assert bytes(buffer).startswith(b"{")
        return EngineValidity[MACHINE.validity[0]], MACHINE.validity[1]


RtxEngine.__name__, RtxRuntime.__name__ = "ICudaEngine", "Runtime"
RTX = [
    ComputeCapability,
    IBuilderConfig,
    EngineValidity,
    EngineInvalidityDiagnostics,
    IRuntimeCache,
    IRuntimeConfig,
    RtxEngine,
    RtxRuntime,
]
TENSORRT = [
    DataType,
    ExecutionContextAllocationStrategy,
    TensorLocation,
    nptype,
    ILogger,
    Runtime,
    ICudaEngine,
    IExecutionContext,
]
