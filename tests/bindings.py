"""The real Python bindings of TensorRT and CUDA, installed from the registry and described, without their libraries.

TensorRT's import if three libraries with a few symbols exist, so those are compiled here. Nothing of NVIDIA's is kept
in the project: the wheels go to pytest's cache.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

WHEELS = {
    "tensorrt-11": "tensorrt_cu13_bindings==11.*",
    "tensorrt-10": "tensorrt_cu12_bindings==10.13.*",
    "cuda-13": "cuda-bindings==13.*",
    "cuda-12": "cuda-bindings==12.9.*",
}
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getPluginRegistry",
    "getBuilderPluginRegistry",
    "getInferLibVersion",
    "getNvOnnxParserVersion",
    "initLibNvInferPlugins",
)


class UnavailableError(Exception):
    """The bindings cannot be had here."""


def describe(name: str, cache: Path) -> dict[str, Any]:
    """What the bindings of `WHEELS[name]` hold, as describe_bindings.py prints it. Raises `UnavailableError`.

    TensorRT for RTX ("tensorrt-rtx") has its libraries, and is the one that is installed for the tests.
    """
    script = Path(__file__).with_name("describe_bindings.py")
    if name == "tensorrt-rtx":
        done = subprocess.run([sys.executable, str(script), "tensorrt_rtx_bindings"], capture_output=True, text=True)
        if done.returncode:
            raise UnavailableError(f"TensorRT for RTX does not import: {done.stderr.strip().splitlines()[-1]}")
        return json.loads(done.stdout)
    folder = cache / name
    install(WHEELS[name], folder)
    paths, module = [folder], "cuda.bindings.runtime"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if name.startswith("tensorrt"):
        libraries = compile_libraries(folder, name.removeprefix("tensorrt-"))
        module = "tensorrt_bindings"
        environment["LD_LIBRARY_PATH"] = str(libraries)
    else:
        install("cuda-pathfinder", cache / "cuda-pathfinder")
        paths.append(cache / "cuda-pathfinder")
    command = [sys.executable, str(script), module, *map(str, paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{name} does not import: {done.stderr}"
    return json.loads(done.stdout)


def install(wheel: str, folder: Path) -> None:
    """Into a folder of its own, once."""
    if (folder / "installed").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    options = ["--quiet", "--no-deps", "--disable-pip-version-check", "--retries", "1", "--target", str(folder)]
    command = [sys.executable, "-m", "pip", "install", *options, wheel]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UnavailableError(f"pip cannot install {wheel}: {done.stderr.strip().splitlines()[-1]}")
    (folder / "installed").touch()


def compile_libraries(folder: Path, version: str) -> Path:
    """Libraries that have the symbols and do nothing."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise UnavailableError("no C compiler to make the libraries that the bindings want")
    libraries = folder / "libraries"
    libraries.mkdir(exist_ok=True)
    source = libraries / "empty.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for name in LIBRARIES:
        file = f"lib{name}.so.{version}"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", str(libraries / file), str(source)]
        subprocess.run(command, check=True, capture_output=True)
    return libraries
