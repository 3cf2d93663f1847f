"""Every class, member, method and argument of TensorRT and CUDA that mlmkit names, against the real bindings.

The bindings come from the registry (once; pytest's cache keeps them) and import on empty libraries; TensorRT for RTX is
installed. Both majors of each are held to the same code, so a typo, or a name that TensorRT 11 has lost, fails here.
"""

import ast
import inspect
from enum import Enum
from itertools import product
from pathlib import Path
from typing import Any

import bindings
import cuda_stub
import pytest
import tensorrt_stub
from bindings_check import Checker, attributes, check_sources

ROOT = Path(__file__).parents[1]
SOURCES = [
    ROOT / "mlmkit" / "backends" / "cuda.py",
    ROOT / "mlmkit" / "backends" / "contexts.py",
    ROOT / "mlmkit" / "backends" / "tensorrt.py",
    ROOT / "mlmkit" / "backends" / "trt.py",
    ROOT / "export" / "tensorrt.py",
]
RTX_SOURCES = [*SOURCES, ROOT / "mlmkit" / "backends" / "rtx.py"]
OTHERS = [
    *ROOT.glob("mlmkit/*.py"),
    ROOT / "mlmkit/backends/__init__.py",
    ROOT / "mlmkit/backends/fitting.py",
    ROOT / "export/profiles.py",
]
PAIRS = list(product(("tensorrt-11", "tensorrt-10", "tensorrt-rtx"), ("cuda-13", "cuda-12")))


@pytest.fixture(scope="session")
def api(request: pytest.FixtureRequest) -> Any:
    described: dict[str, dict[str, Any] | str] = {}

    def get(name: str) -> dict[str, Any]:
        if name not in described:
            try:
                described[name] = bindings.describe(name, Path(request.config.cache.mkdir("bindings")))
            except bindings.UnavailableError as error:
                described[name] = str(error)
        found = described[name]
        if isinstance(found, str):
            pytest.skip(found)
        return found

    return get


def check(api: Any, pair: tuple[str, str], change: tuple[str, str] | None = None) -> Checker:
    """Check the sources, with `change` made to them: what stands there and what to put instead."""
    paths = RTX_SOURCES if pair[0] == "tensorrt-rtx" else SOURCES
    sources = [path.read_text(encoding="utf-8") for path in paths]
    if change:
        assert any(change[0] in source for source in sources), f"{change[0]!r} is not in the sources"
        sources = [source.replace(*change) for source in sources]
    trees = [ast.parse(source) for source in sources]
    return check_sources(trees, {"trt": api(pair[0]), "cudart": api(pair[1])}, attributes([*RTX_SOURCES, *OTHERS]))


@pytest.mark.parametrize("pair", PAIRS)
def test_every_name_and_argument_exists(api, pair):
    checker = check(api, pair)
    assert not checker.problems
    assert len(checker.uses) > 120


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("builder.create_network(", "builder.create_networks("), "trt.Builder has no create_networks"),
        (("trt.BuilderFlag.TF32", "trt.BuilderFlag.TF23"), "trt.BuilderFlag has no TF23"),
        (("trt.BuilderFlag.TF32", "trt.BuilderFlag.FP16"), "trt.BuilderFlag has no FP16"),
        (("CreationFlag.STRONGLY_TYPED", "CreationFlag.EXPLICIT_BATCH"), "has no EXPLICIT_BATCH"),
        (("config.progress_monitor =", "config.progress ="), "trt.IBuilderConfig has no progress"),
        (("engine.num_io_tensors", "engine.device_memory_size"), "trt.ICudaEngine has no device_memory_size"),
        (("network.num_inputs", "network.inputs"), "trt.INetworkDefinition has no inputs"),
        (("error.node_operator()", "error.operator()"), "trt.ParserError has no operator"),
        (("tensor.name,", "tensor.named,"), "trt.ITensor has no named"),
        (("len(tensor.shape)", "len(tensor.dims)"), "trt.ITensor has no dims"),
        (("inspector.get_engine_information(", "inspector.get_engine_info("), "has no get_engine_info"),
        (("self._context.execute_async_v3(", "self._context.execute_async_v2("), "has no execute_async_v2"),
        (("get_engine_information(trt", "get_engine_information(form=trt"), "has no argument form"),
        (
            ("profile.set_shape(tensor.name, smallest, usual, largest)", "profile.set_shape(tensor.name, smallest)"),
            "lacks the argument",
        ),
        (("trt.OnnxParser(network, LOGGER)", "trt.OnnxParser(network, LOGGER, config)"), "takes 2 arguments, not 3"),
        (
            ("trt.OnnxParser(network, LOGGER)", "trt.OnnxParser(builder, LOGGER)"),
            "wants a INetworkDefinition as network",
        ),
        (
            ("config.clear_flag(trt.BuilderFlag.TF32)", "config.clear_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)"),
            "wants a BuilderFlag as flag, not a OnnxParserFlag",
        ),
        (("trt.Runtime(", "trt.IRuntime("), "trt.IRuntime does not exist"),
        (
            ("def step_complete(self, phase_name: str, step", "def step_complete(self, phase: str, step"),
            "other parameters",
        ),
        (("def phase_finish(", "def phase_finished("), "_Monitor does not define IProgressMonitor.phase_finish"),
        (("cudart.cudaMallocHost(grown)", "cudart.cudaMallocHosts(grown)"), "cudart.cudaMallocHosts does not exist"),
        (("cudart.cudaMallocHost(grown)", "cudart.cudaMallocHost(grown, 0)"), "takes 1 arguments, not 2"),
        (("self.device, self.host, size, kind", "self.device, self.host, size"), "lacks the argument"),
        (("cudaError_t.cudaErrorMemoryAllocation", "cudaError_t.cudaErrorOutOfMemory"), "has no cudaErrorOutOfMemory"),
        (("properties.major", "properties.majors"), "cudart.cudaDeviceProp has no majors"),
        (
            ("inspector = engine", "inspector = unknown(engine)"),
            ".create_engine_inspector of a value whose type is not",
        ),
    ],
)
def test_a_wrong_name_is_found(api, change, problem):
    problems = check(api, PAIRS[0], change).problems
    assert any(problem in found for found in problems), problems


def test_any_renamed_use_is_found(api):
    """Not some but each use of the bindings in turn."""
    apis = {"trt": api("tensorrt-rtx"), "cudart": api("cuda-13")}
    own = attributes([*RTX_SOURCES, *OTHERS])
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in RTX_SOURCES]
    checker, missed = check_sources(trees, apis, own), []
    assert not checker.problems
    for node in checker.uses:
        name, node.attr = node.attr, f"{node.attr}_"
        if not check_sources(trees, apis, own).problems:
            missed.append(f"line {node.lineno}: {name}")
        node.attr = name
    assert not missed


def test_names_of_tensorrt_10_alone_are_found(api):
    for change in [
        ("trt.BuilderFlag.TF32", "trt.BuilderFlag.FP16"),
        ("CreationFlag.STRONGLY_TYPED", "CreationFlag.EXPLICIT_BATCH"),
        ("engine.num_io_tensors", "engine.device_memory_size"),
    ]:
        assert not check(api, ("tensorrt-10", "cuda-12"), change).problems
        assert check(api, ("tensorrt-11", "cuda-12"), change).problems


# ------------------------------------------------------------------ the stand-ins of the flow tests


@pytest.mark.parametrize("name", bindings.WHEELS)
def test_stand_ins_have_no_name_that_the_bindings_lack(api, name):
    real = api(name)
    of_tensorrt = [*tensorrt_stub.TENSORRT, *(tensorrt_stub.RTX if name == "tensorrt-rtx" else ())]
    for item in of_tensorrt if name.startswith("tensorrt") else cuda_stub.CUDA:
        if not inspect.isclass(item):
            assert_fits(item.__name__, item, real["functions"][item.__name__], bound=False)
            continue
        described = real["classes"][item.__name__]
        if issubclass(item, Enum):
            assert set(item.__members__) <= set(described["members"]), item.__name__
            continue
        for member, value in vars(item).items():
            if member == "Severity":
                assert list(value.__members__) == real["classes"]["ILogger.Severity"]["members"]
            elif isinstance(value, property):
                assert member in described["properties"], f"{item.__name__}.{member}"
            elif inspect.isfunction(value) and not member.startswith("_"):
                assert_fits(f"{item.__name__}.{member}", value, described["methods"].get(member), bound=True)


def assert_fits(name: str, function: Any, signatures: Any, *, bound: bool) -> None:
    assert signatures, f"the bindings have no {name}"
    own = list(inspect.signature(function).parameters)
    names = [[name for name, _, _ in signature["parameters"]] for signature in signatures]
    assert any(own == real[: len(own)] for real in names), f"{name}{own} is not of {names}"
    assert not bound or own[0] == "self"
