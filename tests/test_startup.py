"""What a command imports. A test cannot measure seconds reliably, so it compares sets of packages."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IMPORT = "import sys, mlmkit\nprint(*sys.modules, file=sys.stderr)"
COMMAND = """
import sys
from mlmkit.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    print(*sys.modules, file=sys.stderr)
    sys.exit(stop.code)
"""
ENGINE = {"click", "numpy", "onnxruntime", "tokenizers"}


def packages(code: str, *arguments: object) -> set[str]:
    """Return the third-party packages that a new process has imported when it ends."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    names = {name.partition(".")[0] for name in done.stderr.splitlines()[-1].split()}
    return names - sys.stdlib_module_names - {"mlmkit"}


@pytest.fixture(scope="module")
def always() -> set[str]:
    """What every process here imports, through the `.pth` file of an editable install."""
    return packages("import sys\nprint(*sys.modules, file=sys.stderr)")


def test_importing_mlmkit_imports_nothing_else(always):
    assert packages(IMPORT) - always == set()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["fill", "--help"], ["train", "--help"]])
def test_help_imports_click_alone(always, arguments):
    assert packages(COMMAND, *arguments) - always == {"click"}


def test_an_artifact_runs_without_the_extras(always, artifact, tmp_path):
    (tmp_path / "text.txt").write_text("The statement\n")
    assert packages(COMMAND, "fill", artifact("bert"), "The [MASK] statement", "--device", "cpu") - always == ENGINE
    assert packages(COMMAND, "inspect", artifact("bert")) - always == {*ENGINE, "rich"}
    score = packages(COMMAND, "score", artifact("bert"), tmp_path / "text.txt")
    evaluate = packages(COMMAND, "eval", artifact("bert"), "--set", tmp_path / "text.txt", "--mask-prob", "0.9")
    assert not (score | evaluate) & {"torch", "transformers", "onnx", "onnxscript", "safetensors", "datasets"}
