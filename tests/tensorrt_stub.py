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
import onnx
import onnxruntime as ort
from cuda_stub import CUDA, MACHINE, Machine, check_alignment, check_memory, stream_of

OURS = (
    "mlmkit.backends.cuda",
    "mlmkit.backends.contexts",
    "mlmkit.backends.tensorrt",
    "mlmkit.export.tensorrt",
    "mlmkit.export.plans",
)
SESSIONS: dict[bytes, ort.InferenceSession] = {}


def install(monkeypatch: Any) -> Machine:
    """A fresh machine, its modules importable, and mlmkit's that import them not imported yet."""
    MACHINE.__init__()
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime", "tensorrt"):
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    publish(sys.modules["tensorrt"], TENSORRT)
    publish(sys.modules["cuda.bindings.runtime"], CUDA)
    sys.modules["tensorrt"].__version__ = MACHINE.version  # type: ignore[attr-defined]
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
    if module.__name__ == "tensorrt":
        module.float32, module.int32, module.int64 = DataType.FLOAT, DataType.INT32, DataType.INT64  # type: ignore
    else:
        module.cudaStreamNonBlocking = 1  # type: ignore[attr-defined]


# ------------------------------------------------------------------ tensorrt: enums and small things


class DataType(IntEnum):
    FLOAT = 0
    INT32 = 3
    INT64 = 8


class BuilderFlag(IntEnum):
    TF32 = 5


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


class ProfilingVerbosity(IntEnum):
    LAYER_NAMES_ONLY = 0
    DETAILED = 2


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1


class TensorLocation(IntEnum):
    DEVICE = 0
    HOST = 1


class LayerInformationFormat(IntEnum):
    JSON = 1


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


class IProgressMonitor:
    def __init__(self) -> None:
        self.started = True


class IHostMemory(bytes):
    pass


class ITensor:
    def __init__(self, value: Any) -> None:
        self.name = value.name
        self.shape = tuple(axis.dim_value or -1 for axis in value.type.tensor_type.shape.dim)


class ParserError:
    def __init__(self, name: str, operator: str, text: str) -> None:
        self._values = name, operator, text

    def node_name(self):
        return self._values[0]

    def node_operator(self):
        return self._values[1]

    def desc(self):
        return self._values[2]


# ------------------------------------------------------------------ tensorrt: building


class INetworkDefinition:
    def __init__(self) -> None:
        self._graph, self._inputs, self._outputs = b"", [], []

    @property
    def num_inputs(self):
        return len(self._inputs)

    def get_input(self, index):
        return self._inputs[index]


class OnnxParser:
    def __init__(self, network, logger) -> None:
        self._network = network

    @property
    def num_errors(self):
        return len(MACHINE.parser_errors or [])

    def get_error(self, index):
        return ParserError(*(MACHINE.parser_errors or [])[index])

    def parse_from_file(self, model):
        if MACHINE.parser_errors is not None:
            return False
        loaded = onnx.load(model)
        self._network._graph = loaded.SerializeToString()
        self._network._inputs = [ITensor(value) for value in loaded.graph.input]
        self._network._outputs = [ITensor(value) for value in loaded.graph.output]
        return True


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, input, min, opt, max):
        assert all(0 <= a <= b <= c for a, b, c in zip(min, opt, max, strict=True))
        self._shapes[input] = [tuple(min), tuple(opt), tuple(max)]


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self):
        return IHostMemory(self._content)


class IBuilderConfig:
    def __init__(self) -> None:
        self._flags = {BuilderFlag.TF32}
        self._profiles: list[IOptimizationProfile] = []
        self._cache: ITimingCache | None = None
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self.progress_monitor: Any = None

    def clear_flag(self, flag):
        self._flags.discard(flag)

    def add_optimization_profile(self, profile):
        self._profiles.append(profile)
        return -1 if MACHINE.refuses == "profile" else len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache):
        return None if serialized_timing_cache == b"broken" else ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache, ignore_mismatch):
        assert cache is not None and not ignore_mismatch
        MACHINE.calls.append(("set_timing_cache", cache._content))
        if cache._content == b"of another GPU":
            return False
        self._cache = cache
        return True

    def get_timing_cache(self):
        assert self._cache is not None
        return ITimingCache(self._cache._content + b"timed;")


class Builder:
    def __init__(self, logger) -> None:
        if not MACHINE.starts:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    def create_network(self, flags):
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return INetworkDefinition()

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        say(self._logger, "WARNING", "a warning")
        say(self._logger, "INFO", "a note")
        self._progress(config.progress_monitor)
        if MACHINE.build_error or config.progress_monitor.interrupted:
            say(self._logger, "ERROR", MACHINE.build_error or "cancelled")
            return None
        for profile in config._profiles:
            assert profile._shapes.keys() == {tensor.name for tensor in network._inputs}
        MACHINE.calls.append(("build", set(config._flags)))
        header = {
            "outputs": [tensor.name for tensor in network._outputs],
            "profiles": [profile._shapes for profile in config._profiles],
            "detailed": config.profiling_verbosity == ProfilingVerbosity.DETAILED,
        }
        return IHostMemory(json.dumps(header).encode() + b"\n" + network._graph)

    def _progress(self, monitor: Any) -> None:
        assert monitor.started, "the base class was not initialised"

        def phases() -> None:
            monitor.phase_start("Building", None, 2)
            monitor.phase_start("Timing", "Building", 3)
            if all(monitor.step_complete("Timing", step) for step in range(3)):
                monitor.step_complete("Building", 0)
            monitor.phase_finish("Timing")
            monitor.step_complete("Timing", 3)  # late calls must do no harm: an exception would end the process
            monitor.phase_finish("Timing")
            monitor.phase_finish("Building")

        thread = threading.Thread(target=phases)
        thread.start()
        thread.join()


# ------------------------------------------------------------------ tensorrt: running


class Runtime:
    def __init__(self, logger) -> None:
        if not MACHINE.starts:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine):
        header, _, graph = bytes(serialized_engine).partition(b"\n")
        if MACHINE.load_error:
            say(self._logger, "ERROR", MACHINE.load_error)
            return None
        return ICudaEngine(json.loads(header), graph, self._logger)


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

    def create_engine_inspector(self):
        return EngineInspector(self)

    def _session(self) -> ort.InferenceSession:
        if self._graph not in SESSIONS:
            SESSIONS[self._graph] = ort.InferenceSession(self._graph)
        return SESSIONS[self._graph]


class EngineInspector:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine

    def get_engine_information(self, format):
        assert format == LayerInformationFormat.JSON
        if MACHINE.inspector or not self._engine._values["detailed"]:
            return MACHINE.inspector or '{"Layers": ["only", "names"]}'
        layers = [
            {"Name": "embeddings", "LayerType": "gather", "Outputs": [{"Format/Datatype": "Float"}]},
            {"Name": "attention", "Outputs": [{"Format/Datatype": "Row major linear FP16 format"}]},
            {"Name": "head", "Outputs": [{"Format/Datatype": "Float"}, {"Format/Datatype": "Int64"}]},
            {"Name": "odd", "Outputs": [{"Format/Datatype": "E8M0"}]},
            {"Name": "shape", "LayerType": "shape"},
        ]
        return json.dumps({"Layers": layers, "Bindings": ["input_ids"]})


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


TENSORRT = [
    DataType,
    BuilderFlag,
    NetworkDefinitionCreationFlag,
    ProfilingVerbosity,
    ExecutionContextAllocationStrategy,
    TensorLocation,
    LayerInformationFormat,
    nptype,
    ILogger,
    IProgressMonitor,
    IHostMemory,
    ITensor,
    ParserError,
    INetworkDefinition,
    OnnxParser,
    IOptimizationProfile,
    ITimingCache,
    IBuilderConfig,
    Builder,
    Runtime,
    ICudaEngine,
    EngineInspector,
    IExecutionContext,
]
