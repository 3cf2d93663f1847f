"""The built wheel in a new environment: the base install runs artifacts."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import running

ROOT = Path(__file__).parent.parent
EXTRAS = ("torch", "transformers", "onnx", "onnxscript", "safetensors", "datasets", "jinja2", "matplotlib")
# Reports every attempt to import an extra, even one whose failure is swallowed.
WATCHED = f"""
import sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS[:6]}: print("looked for", name, file=sys.stderr)
sys.meta_path.insert(0, Watch())
from mlmkit.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy: building leaves a folder whose stale files would get into the next wheel."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("mlmkit", "export", "eval"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "out", "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return next((source / "out").glob("*.whl"))


@pytest.fixture(scope="module")
def base(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The Python of an environment with the wheel and its dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    install(str(wheel), python := folder / "bin" / "python")
    yield python
    shutil.rmtree(folder)  # several hundred megabytes


def install(package: str, python: Path) -> None:
    """Install into the environment of this Python. Skips if pip cannot reach a registry."""
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--retries", "1"]
    command += ["--no-compile", "--constraint", ROOT / "constraints.txt", package]
    done = subprocess.run(command, capture_output=True, text=True, env=without_path())
    if done.returncode and any(word in done.stderr for word in ("Retrying (", "Connection", "timed out")):
        pytest.skip("pip reaches no registry to install the base dependencies from")
    assert done.returncode == 0, done.stderr


def without_path() -> dict[str, str]:
    """Return the environment variables without the one that would expose the source tree."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(python: Path | str, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = without_path() | {"MLMKIT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    if python == sys.executable:
        environment["PYTHONPATH"] = str(ROOT)
    command = [python, "-c", WATCHED, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)


def test_the_wheel_holds_every_file_of_the_source(wheel):
    expected = set()
    for folder, package in (("mlmkit", "mlmkit"), ("eval", "mlmkit/eval"), ("export", "mlmkit/export")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected.add(f"{package}/{path.relative_to(ROOT / folder)}")
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == expected
    assert any(name.endswith(".toml") for name in found)
    assert any(name.endswith(".jinja") for name in found)


def test_the_base_install_holds_no_extra(base):
    code = f"from importlib.util import find_spec; print([n for n in {EXTRAS} if find_spec(n)])"
    done = subprocess.run([base, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_base_install_runs_artifacts_as_the_whole_one_does(base, artifact, tmp_path):
    (tmp_path / "text.txt").write_text("O rato roeu a roupa do rei de Roma.\nThe statement\n", encoding="utf-8")
    commands = [
        ["fill", artifact("bert"), "The [MASK] statement is [MASK]", "--json"],
        ["score", artifact("bert"), "text.txt", "--per-token", "--json"],
        ["inspect", artifact("bert"), "--json"],
        ["eval", artifact("bert"), "--set", "text.txt", "--metric", "masked", "--metric", "pseudo",
         "--mask-prob", "0.5", "--output", "result", "--json"],
    ]  # fmt: skip
    for command in commands:
        outputs = []
        for python in (base, sys.executable):
            done = run(python, *command, folder=tmp_path)
            shutil.rmtree(tmp_path / "result", ignore_errors=True)
            assert done.returncode == 0, done.stderr
            assert "looked for" not in done.stderr
            assert "Traceback" not in done.stderr
            outputs.append(json.loads(done.stdout))
        alone, whole = outputs
        assert numbers(alone) == pytest.approx(numbers(whole), abs=1e-6)
        assert len(numbers(alone)) > 3


def numbers(value: object) -> list[float]:
    """Return the numbers of a result in order, without timings."""
    if isinstance(value, dict):
        return [n for key in value if key not in ("seconds", "tokens_per_second") for n in numbers(value[key])]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [float(value)] if isinstance(value, int | float) else []


def test_the_base_install_refuses_in_one_line_what_needs_more(base, artifact, checkpoint, tmp_path):
    damaged = Path(shutil.copytree(artifact("bert"), tmp_path / "damaged"))
    (damaged / "config.json").unlink()
    for command, code, message in (
        (["fill", checkpoint("bert"), "a [MASK]"], 2, "pip install '.[train]'"),
        (["export", checkpoint("bert"), "--output", "out"], 2, "pip install '.[train]'"),
        (["fill", damaged, "a [MASK]"], 2, "config.json is missing"),
        (["serve", artifact("bert")], 2, "pip install '.[serve]'"),
        (["inspect", damaged], 1, "is damaged"),
        (["inspect", tmp_path], 2, "is not an artifact"),
    ):
        done = run(base, *command, folder=tmp_path)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("looked for")]
        assert done.returncode == code, done.stderr
        assert len(lines) == 1, done.stderr
        assert message in lines[0]


def test_the_serve_extra_serves_artifacts_without_the_others(wheel, base, artifact, tmp_path):
    """The last test of this file: it adds the extra to the base install."""
    install(f"{wheel}[serve]", base)
    installed: dict[str, Any] = {"environment": {"PYTHONPATH": ""}, "python": str(base), "cwd": tmp_path}
    with running(artifact("bert"), program=["-c", WATCHED], **installed) as server:
        assert len(server.ask("/fill-mask", {"inputs": "The [MASK]"}).json) == 5
        assert server.ask("/score", {"inputs": "The statement"}).json["tokens"] > 1
        assert "</html>" in server.ask("/").body.decode()
        assert server.ask("/static/swagger-ui-bundle.js").status == 200
        assert server.stop() == 0
        assert "looked for" not in server.log
