"""Every name and argument of TensorRT and CUDA that mlmkit uses, checked by basedpyright against the real bindings.

TensorRT 11 and 10, TensorRT for RTX and both versions of CUDA are held to the same code, so a typo, or a name that one
of them lacks, fails here. `bindings.py` makes the stub files. One run checks everything, because basedpyright starts
slowly: each pair of bindings lies beside its own copy of mlmkit, and each wrong use is a file beside one of them.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import bindings
import pytest

PACKAGE = Path(__file__).parents[1] / "mlmkit"
PAIRS = {"tensorrt-11": "cuda-13", "tensorrt-10": "cuda-12", "tensorrt-rtx": "cuda-13"}
SOURCES = [
    *(path.relative_to(PACKAGE.parent) for path in sorted(PACKAGE.glob("backends/tensorrt/[!r_]*.py"))),
    Path("mlmkit/export/tensorrt.py"),
]
RTX = Path("mlmkit/backends/tensorrt/rtx.py")
SAME = "from tensorrt import *\nfrom tensorrt import __version__ as __version__\n"

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


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> list[str]:
    """Everything that basedpyright finds: `FOLDER/FILE: message`. Skips, with the reason, without the bindings."""
    folder, wheels = tmp_path_factory.mktemp("checked"), tmp_path_factory.mktemp("bindings")
    included = [Path("tensorrt-rtx") / RTX]
    for tensorrt, cuda in PAIRS.items():
        try:
            stubs = {
                "tensorrt/__init__.pyi": bindings.write_stub(tensorrt, wheels),
                "tensorrt_rtx/__init__.pyi": SAME,
                "cuda/__init__.pyi": "",
                "cuda/bindings/__init__.pyi": "",
                "cuda/bindings/runtime.pyi": bindings.write_stub(cuda, wheels),
            }
        except bindings.UnavailableError as error:
            pytest.skip(str(error))
        shutil.copytree(PACKAGE, folder / tensorrt / "mlmkit", ignore=shutil.ignore_patterns("__pycache__"))
        for name, content in stubs.items():
            (folder / tensorrt / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / tensorrt / name).write_text(content, encoding="utf-8")
        included += [Path(tensorrt) / source for source in SOURCES]
    for number, (right, changed, _) in enumerate(WRONG):
        texts = ((PACKAGE.parent / path).read_text(encoding="utf-8") for path in SOURCES)
        source = next(text for text in texts if right in text)
        included.append(Path(f"tensorrt-11/wrong_{number}.py"))
        (folder / included[-1]).write_text(source.replace(right, changed), encoding="utf-8")
    settings = {
        "include": [str(path) for path in included],
        "executionEnvironments": [{"root": tensorrt} for tensorrt in PAIRS],
        "typeCheckingMode": "standard",
        "enableTypeIgnoreComments": False,
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "-p", folder, "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] >= len(included), done.stderr
    return [
        f"{Path(item['file']).relative_to(folder)}: {item['message']}"
        for item in report["generalDiagnostics"]
        if item["severity"] == "error"
    ]


@pytest.mark.parametrize("tensorrt", PAIRS)
def test_every_name_and_argument_exists(tensorrt, problems):
    assert [problem for problem in problems if problem.startswith(f"{tensorrt}/mlmkit/")] == []


def test_a_wrong_name_is_found(problems):
    for number, (_, changed, word) in enumerate(WRONG):
        found = [problem for problem in problems if problem.startswith(f"tensorrt-11/wrong_{number}.py")]
        assert any(word in problem for problem in found), (changed, found)
