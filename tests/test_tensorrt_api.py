"""Every name and argument of TensorRT and CUDA that mlmkit uses, checked by basedpyright against the real bindings.

TensorRT 11 and 10, TensorRT for RTX and both versions of CUDA are held to the same code, so a typo, or a name that one
of them lacks, fails here. `bindings.py` makes the stub files.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bindings
import pytest

ROOT = Path(__file__).parents[1]
RUNTIME = ROOT / "mlmkit/backends/tensorrt"
SOURCES = [*sorted(RUNTIME.glob("[!r_]*.py")), ROOT / "export/tensorrt.py"]
RTX_SOURCES = [*SOURCES, RUNTIME / "rtx.py"]
PAIRS = [("tensorrt-11", "cuda-13"), ("tensorrt-10", "cuda-12"), ("tensorrt-rtx", "cuda-13")]


@pytest.fixture(scope="session")
def stub(request: pytest.FixtureRequest) -> Any:
    """The stub file of one of the bindings; skips, with the reason, where they are not available."""
    stubs: dict[str, str] = {}

    def get(name: str) -> str:
        if name not in stubs:
            try:
                stubs[name] = bindings.write_stub(name, Path(request.config.cache.mkdir("bindings")))
            except bindings.UnavailableError as error:
                pytest.skip(str(error))
        return stubs[name]

    return get


def check(folder: Path, sources: list[Path], tensorrt: str, cuda: str) -> list[str]:
    """What basedpyright finds in the sources: `file: message`. `tensorrt` and `cuda` are stub files."""
    same = "from tensorrt import *\nfrom tensorrt import __version__ as __version__\n"
    for package, content in {"tensorrt": tensorrt, "tensorrt_rtx": same, "cuda": "", "cuda/bindings": ""}.items():
        (folder / "typings" / package).mkdir(parents=True)
        (folder / "typings" / package / "__init__.pyi").write_text(content)
    (folder / "typings/cuda/bindings/runtime.pyi").write_text(cuda)
    settings = {
        "include": [str(source) for source in sources],
        "extraPaths": [str(ROOT)],
        "stubPath": "typings",
        "typeCheckingMode": "standard",
        "enableTypeIgnoreComments": False,
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "-p", folder, "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] >= len(sources), done.stderr
    return [
        f"{Path(item['file']).name}: {item['message']}"
        for item in report["generalDiagnostics"]
        if item["severity"] == "error"
    ]


@pytest.mark.parametrize("pair", PAIRS)
def test_every_name_and_argument_exists(stub, tmp_path, pair):
    sources = RTX_SOURCES if pair[0] == "tensorrt-rtx" else SOURCES
    assert check(tmp_path, sources, stub(pair[0]), stub(pair[1])) == []


WRONG = [
    ("trt.BuilderFlag.TF32", "trt.BuilderFlag.FP16", "FP16"),  # TensorRT 10 has it
    ("config.progress_monitor =", "config.progress =", "progress"),
    ("engine.num_io_tensors", "engine.device_memory_size", "device_memory_size"),
    ("tensor.name,", "tensor.named,", "named"),
    ("self._context.execute_async_v3(", "self._context.execute_async_v2(", "execute_async_v2"),
    ("get_engine_information(trt", "get_engine_information(form=trt", "form"),
    ("trt.OnnxParser(network, LOGGER)", "trt.OnnxParser(network, LOGGER, config)", "Expected 2 positional"),
    ("trt.OnnxParser(network, LOGGER)", "trt.OnnxParser(builder, LOGGER)", "INetworkDefinition"),
    ("clear_flag(trt.BuilderFlag.TF32)", "clear_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)", "BuilderFlag"),
    ("trt.Runtime(", "trt.IRuntime(", "IRuntime"),
    ("def step_complete(self, phase_name: str, step", "def step_complete(self, phase: str, step", "step_complete"),
    ("def phase_finish(", "def phase_finished(", "phase_finish"),
    ("cudart.cudaMallocHost(grown)", "cudart.cudaMallocHost(grown, 0)", "Expected 1 positional"),
    ("self._device, self._host, self._used, kind", "self._device, self._host, self._used", "stream"),
    ("cudaError_t.cudaErrorMemoryAllocation", "cudaError_t.cudaErrorOutOfMemory", "cudaErrorOutOfMemory"),
]


def test_a_wrong_name_is_found(stub, tmp_path):
    """All in one run: each wrong use is a file of its own."""
    wrong = []
    for number, (right, changed, _) in enumerate(WRONG):
        source = next(text for path in SOURCES if right in (text := path.read_text(encoding="utf-8")))
        wrong.append(tmp_path / f"wrong_{number}.py")
        wrong[-1].write_text(source.replace(right, changed), encoding="utf-8")
    problems = check(tmp_path, wrong, stub("tensorrt-11"), stub("cuda-13"))
    for number, (_, changed, word) in enumerate(WRONG):
        found = [problem for problem in problems if problem.startswith(f"wrong_{number}.py")]
        assert any(word in problem for problem in found), (changed, found)
