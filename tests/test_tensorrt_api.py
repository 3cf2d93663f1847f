"""Every name and argument of TensorRT and CUDA that mlmkit uses, checked by basedpyright against the real bindings.

TensorRT 11 and 10, TensorRT for RTX and both versions of CUDA are held to the same code, so a typo, or a name that one
of them lacks, fails here. `bindings.py` makes the stub files.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import bindings
import pytest

ROOT = Path(__file__).parents[1]
RUNTIME = ROOT / "mlmkit/backends/tensorrt"
SOURCES = [*sorted(RUNTIME.glob("[!r_]*.py")), ROOT / "export/tensorrt.py"]
PAIRS = {"tensorrt-11": "cuda-13", "tensorrt-10": "cuda-12", "tensorrt-rtx": "cuda-13"}
# What stands in the sources, what to put in its place, and a word of the error.
WRONG = [
    ("builder.create_network(", "builder.create_networks(", "create_networks"),
    ("trt.BuilderFlag.TF32", "trt.BuilderFlag.TF23", "TF23"),
    ("trt.BuilderFlag.TF32", "trt.BuilderFlag.FP16", "FP16"),  # TensorRT 10 has it
    ("CreationFlag.STRONGLY_TYPED", "CreationFlag.EXPLICIT_BATCH", "EXPLICIT_BATCH"),  # the same
    ("config.progress_monitor =", "config.progress =", "progress"),
    ("engine.num_io_tensors", "engine.device_memory_size", "device_memory_size"),
    ("error.node_operator()", "error.operator()", "operator"),
    ("tensor.name,", "tensor.named,", "named"),
    ("inspector.get_engine_information(", "inspector.get_engine_info(", "get_engine_info"),
    ("self._context.execute_async_v3(", "self._context.execute_async_v2(", "execute_async_v2"),
    ("get_engine_information(trt", "get_engine_information(form=trt", "form"),
    ("profile.set_shape(tensor.name, smallest, usual, largest)", "profile.set_shape(tensor.name, smallest)", "opt"),
    ("trt.OnnxParser(network, LOGGER)", "trt.OnnxParser(network, LOGGER, config)", "Expected 2 positional"),
    ("trt.OnnxParser(network, LOGGER)", "trt.OnnxParser(builder, LOGGER)", "INetworkDefinition"),
    ("clear_flag(trt.BuilderFlag.TF32)", "clear_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)", "BuilderFlag"),
    ("trt.Runtime(", "trt.IRuntime(", "IRuntime"),
    ("def step_complete(self, phase_name: str, step", "def step_complete(self, phase: str, step", "step_complete"),
    ("def phase_finish(", "def phase_finished(", "phase_finish"),
    ("cudart.cudaMallocHost(grown)", "cudart.cudaMallocHosts(grown)", "cudaMallocHosts"),
    ("cudart.cudaMallocHost(grown)", "cudart.cudaMallocHost(grown, 0)", "Expected 1 positional"),
    ("self._device, self._host, self._used, kind", "self._device, self._host, self._used", "stream"),
    ("cudaError_t.cudaErrorMemoryAllocation", "cudaError_t.cudaErrorOutOfMemory", "cudaErrorOutOfMemory"),
    ("properties.major", "properties.majors", "majors"),
]


@pytest.fixture(scope="session")
def problems(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What basedpyright finds, by pair of bindings and file; `wrong` holds a file for each entry of `WRONG`.

    One run checks a copy of the sources for each pair. A pair whose bindings cannot be installed is left out.
    """
    folder, cache = tmp_path_factory.mktemp("sources"), Path(request.config.cache.mkdir("bindings"))
    checked: dict[str, dict[str, str]] = {}
    for tensorrt, cuda in PAIRS.items():
        try:
            write_stubs(folder / f"{tensorrt}-stubs", tensorrt, cuda, cache)
        except bindings.UnavailableError:
            continue
        (folder / tensorrt).mkdir()
        for source in [*SOURCES, *([RUNTIME / "rtx.py"] if tensorrt == "tensorrt-rtx" else [])]:
            shutil.copy(source, folder / tensorrt / f"uses_{source.name}")  # tensorrt.py and cuda.py would be imported
        checked[tensorrt] = {}
    (folder / "wrong").mkdir()
    for number, (right, changed, _) in enumerate(WRONG):
        source = next(text for path in SOURCES if right in (text := path.read_text(encoding="utf-8")))
        (folder / "wrong" / f"{number}.py").write_text(source.replace(right, changed), encoding="utf-8")
    if "tensorrt-11" in checked:
        checked["wrong"] = {}
    environments = [
        {"root": name, "extraPaths": [f"{'tensorrt-11' if name == 'wrong' else name}-stubs", str(ROOT)]}
        for name in checked
    ]
    settings = {"include": list(checked), "executionEnvironments": environments, "typeCheckingMode": "standard"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "-p", folder, "--pythonpath", sys.executable, "--outputjson"]
    report = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
    assert report["summary"]["filesAnalyzed"] >= len(SOURCES) * bool(checked)
    for item in report["generalDiagnostics"]:
        if item["severity"] == "error":
            file = Path(item["file"])
            found = checked[file.parent.name]
            found[file.name] = found.get(file.name, "") + item["message"] + "\n"
    return checked


def write_stubs(folder: Path, tensorrt: str, cuda: str, cache: Path) -> None:
    """The stub files of a pair, for both names of TensorRT's module."""
    contents = {
        "tensorrt": bindings.write_stub(tensorrt, cache),
        "tensorrt_rtx": "from tensorrt import *\nfrom tensorrt import __version__ as __version__\n",
        "cuda": "",
        "cuda/bindings": "",
        "cuda/bindings/runtime": bindings.write_stub(cuda, cache),
    }
    for package, content in contents.items():
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.pyi").write_text(content)


@pytest.mark.parametrize("name", PAIRS)
def test_every_name_and_argument_exists(problems, name):
    if name not in problems:
        pytest.skip(f"the bindings of {name} or of {PAIRS[name]} cannot be installed here")
    assert problems[name] == {}


def test_a_wrong_name_is_found(problems):
    if "wrong" not in problems:
        pytest.skip("the bindings of TensorRT 11 or CUDA 13 cannot be installed here")
    for number, (_, changed, word) in enumerate(WRONG):
        assert word in problems["wrong"].get(f"{number}.py", ""), changed
