"""Stub files of the real Python bindings of TensorRT and CUDA, for a type checker.

`python bindings.py MODULE PATH...` prints such a file for a module. The bindings of TensorRT 10 and 11 and of both CUDA
versions come from the package index. TensorRT's import if three libraries with a few symbols exist, so these are
compiled here. TensorRT for RTX is installed for the tests and has its own libraries.
"""

import builtins
import importlib
import inspect
import keyword
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
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
SIGNATURE = r"^(?:\d+\. )?{name}\((.*)\)(?: -> (.*))?$"  # in the docstrings of compiled functions
CALLED_BACK = ("ILogger", "IProgressMonitor")  # their methods are abstract: TensorRT calls all of them
ANYTHING = "*args: Any, **kwargs: Any"


class UnavailableError(Exception):
    """The bindings cannot be installed here."""


def write_stub(name: str, wheels: Path) -> str:
    """The stub file for a key of `WHEELS` or for `tensorrt-rtx`, from wheels that are installed into folders of
    `wheels`. Raises `UnavailableError`.
    """
    command, environment = [sys.executable, __file__], dict(os.environ)
    if name == "tensorrt-rtx":
        command += ["tensorrt_rtx_bindings"]
    else:
        folder = install(WHEELS[name], wheels / name)
        environment.pop("PYTHONPATH", None)
        if name.startswith("tensorrt"):
            environment["LD_LIBRARY_PATH"] = str(compile_libraries(folder, name.removeprefix("tensorrt-")))
            command += ["tensorrt_bindings", str(folder)]
        else:
            pathfinder = install("cuda-pathfinder", wheels / "cuda-pathfinder")
            command += ["cuda.bindings.runtime", str(folder), str(pathfinder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UnavailableError(f"{name} cannot be imported: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def install(wheel: str, folder: Path) -> Path:
    """Install a wheel into a folder of its own, unless that exists. Returns the folder."""
    if not folder.exists():
        options = ["--quiet", "--no-deps", "--disable-pip-version-check", "--retries", "1", "--target", str(folder)]
        command = [sys.executable, "-m", "pip", "install", *options, wheel]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UnavailableError(f"pip cannot install {wheel}: {done.stderr.strip().splitlines()[-1]}")
    return folder


def compile_libraries(folder: Path, version: str) -> Path:
    """Compile libraries whose functions do nothing."""
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


# ------------------------------------------------------------------ the stub file


def stub_lines(module: Any) -> Iterator[str]:
    """The classes, functions and values of a module.

    A type that the bindings do not name is `Any`, and so is `Dims`, for which they take tuples as well.
    """
    yield from ("import builtins", "from abc import ABC, abstractmethod", "from typing import Any, overload", "")
    known = {name for name, item in vars(module).items() if isinstance(item, type)} - {"Any", "Dims"}
    yield "__version__: builtins.str"
    for name, item in vars(module).items():
        if name.startswith("_") or name in ("Any", "Dims") or inspect.ismodule(item):
            continue
        if isinstance(item, type):
            yield from class_lines(name, item, known)
        elif callable(item):
            yield f"def {name}({signatures(name, item, known)[0][0]}) -> Any: ..."
        else:
            yield f"{name}: {type_name(type(item).__name__, known)}"


def class_lines(name: str, item: type, known: set[str]) -> Iterator[str]:
    bases = ["ABC"] * (name in CALLED_BACK) + [
        base.__name__ for base in item.__bases__ if base.__name__ in known and base.__name__ != name
    ]
    yield f"class {name}({', '.join(bases)}):"
    yield "    def __int__(self) -> builtins.int: ..."
    yield "    def __buffer__(self, flags: builtins.int) -> builtins.memoryview: ..."
    if members := list(getattr(item, "__members__", ())):
        yield f"    __members__: builtins.dict[builtins.str, {item.__qualname__}]"
    for inner in dir(item):
        value = inspect.getattr_static(item, inner)
        if (inner.startswith("_") and inner != "__init__") or keyword.iskeyword(inner):
            continue
        if inner in members:
            yield f"    {inner}: {item.__qualname__}"
        elif isinstance(value, type):
            yield from (f"    {line}" for line in class_lines(inner, value, known))
        elif isinstance(value, property) or inspect.isgetsetdescriptor(value):
            found = re.search(r"-> (.*)", getattr(getattr(value, "fget", None), "__doc__", None) or "")
            kind = type_name(found[1] if found else "", known)
            if getattr(value, "fset", value) is None:
                yield "    @property"
                yield f"    def {inner}(self) -> {kind}: ..."
            else:
                yield f"    {inner}: {kind}"
        elif callable(getattr(item, inner)):
            found = signatures(inner, getattr(item, inner), known)
            for parameters, returns in found:
                if len(found) > 1:
                    yield "    @overload"
                if name in CALLED_BACK and inner != "__init__":
                    yield "    @abstractmethod"
                yield f"    def {inner}({parameters}) -> {returns}: ..."


def signatures(name: str, item: Any, known: set[str]) -> list[tuple[str, str]]:
    """Parameters and return type of each overload, from the docstring or else from the function itself."""
    found = re.findall(SIGNATURE.format(name=re.escape(name)), item.__doc__ or "", re.MULTILINE)
    found = [(arguments, returns) for arguments, returns in found if arguments != "*args, **kwargs"]
    if found:
        parameters = [", ".join(parameter(text, known) for text in split_arguments(each)) for each, _ in found]
        kinds = ["None" if name == "__init__" else type_name(returns, known) for _, returns in found]
        return list(zip(parameters, kinds, strict=True))
    try:
        names = [value for value in inspect.signature(item).parameters.values() if value.kind != value.VAR_KEYWORD]
    except ValueError:
        names = []
    if not names or any(value.kind == value.VAR_POSITIONAL for value in names):
        return [(f"self, {ANYTHING}" if name == "__init__" else ANYTHING, "None" if name == "__init__" else "Any")]
    return [(", ".join(value.name + (" = ..." if value.default is not value.empty else "") for value in names), "Any")]


def split_arguments(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth, current = [], 0, ""
    for letter in text:
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and not depth:
            parts.append(current.strip())
            current = ""
        else:
            current += letter
    return [*parts, current.strip()] if current.strip() else parts


def parameter(text: str, known: set[str]) -> str:
    """`name: type = ...` of a parameter as the docstring writes it, in Python's order or in Cython's (`type name`)."""
    declared, _, rest = text.partition(":")
    kind, has_default, _ = rest.partition("=")
    name = declared.split("=")[0].split()[-1]
    name += "_" * keyword.iskeyword(name)
    default = " = ..." if has_default or "=" in declared else ""
    return name if name == "self" else f"{name}: {type_name(kind, known)}{default}"


def type_name(text: str, known: set[str]) -> str:
    name = re.sub(r"\btensorrt(_rtx)?_bindings\.tensorrt(_rtx)?\.", "", text).strip()
    if name.split(".")[0] in known:
        return name
    return name if name == "None" else f"builtins.{name}" if isinstance(getattr(builtins, name, None), type) else "Any"


if __name__ == "__main__":
    sys.path[:0] = sys.argv[2:]
    print("\n".join(stub_lines(importlib.import_module(sys.argv[1]))))  # noqa: T201
