"""What modules and commands import. A test cannot measure seconds reliably, so it compares sets of packages."""

import ast
import gc
import shutil
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from mlmkit.collector import collector_paused

ROOT = Path(__file__).parent.parent
PATTERNS = ("mlmkit/**/*.py", "eval/*.py", "export/*.py")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "mlmkit" else ("mlmkit", *parts)).removesuffix(".__init__")


MODULES = {module_name(path): path for pattern in PATTERNS for path in ROOT.glob(pattern)}
LAYERS = [
    {"collector", "errors", "files", "bounds", "masking", "console", "progress", "pydocs", "distributed"},
    {"loss", "last_layer"},
    {"chunks", "hub", "long_texts", "slow_tokenizer"},
    {"tokenizer", "locations", "toml"},
    {"lines"},
    {"tables"},
    {"documents"},
    {"corpus", "batching", "artifact"},
    {"stored"},
    {"shards", "overlap"},
    {"token_cache", "cluster"},
    {"windows", "model"},
    {"packing", "pretrained"},
    {"backends"},
    {"questions"},
    {"average", "fill", "eval", "export", "inspection"},
    {"train", "serve"},
    {"card", "demo"},
    {"cli"},
    {"__main__"},
]
WITHIN_LAYER = {(name, "errors") for name in ("files", "bounds", "masking", "distributed")}
SHOW = "print(*sys.modules, file=sys.stderr)"
COMMAND = f"""
import sys
from mlmkit.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    {SHOW}
    sys.exit(stop.code)
"""
REPORT = {"jinja2", "matplotlib"}
ENGINE = {"click", "numpy", "onnxruntime", "tokenizers"}


@cache
def imported(name: str) -> set[str]:
    """The other modules of mlmkit that a module imports with `from`, anywhere in it."""
    nodes = ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    found = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    named = {f"{node.module}.{alias.name}" for node in found for alias in node.names}
    return ({str(node.module) for node in found} | named) & MODULES.keys() - {name, "mlmkit"}


def test_imports_run_one_way():
    """cli, demo → serve, train → eval, export → backends → model → the rest: docs/architecture.md."""
    level = {name: height for height, names in enumerate(LAYERS) for name in names}
    for name in MODULES.keys() - {"mlmkit"}:
        own = name.split(".")[1]
        for module in imported(name):
            other = module.split(".")[1]
            if other != own and (own, other) not in WITHIN_LAYER:
                assert level[other] < level[own], f"{name} imports {module}"


def test_no_two_modules_import_each_other():
    """Not through others, not inside functions, and not for types alone."""
    TopologicalSorter({name: imported(name) for name in MODULES}).prepare()  # raises CycleError, which names them


def packages(code: str, *arguments: object) -> set[str]:
    """The third-party packages that a new process has imported when it ends."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    names = {name.partition(".")[0] for name in done.stderr.splitlines()[-1].split()}
    return names - sys.stdlib_module_names - {"mlmkit"}


@pytest.fixture(scope="module")
def always() -> set[str]:
    """What every process here imports, through the `.pth` file of an editable install."""
    return packages(f"import sys; {SHOW}")


def test_importing_mlmkit_imports_nothing_else(always):
    assert packages(f"import sys, mlmkit; {SHOW}") == always


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["fill", "--help"], ["train", "--help"]])
def test_help_imports_click_alone(always, arguments):
    assert packages(COMMAND, *arguments) - always == {"click"}


def test_completion_imports_click_alone(always, monkeypatch):
    monkeypatch.setenv("_MLMKIT_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "mlmkit\neval\nmodel\n--set\n")
    monkeypatch.setenv("COMP_CWORD", "4")
    assert packages(COMMAND) - always == {"click"}


def test_an_artifact_runs_without_the_extras(always, artifact, tmp_path):
    (tmp_path / "text.txt").write_text("The statement\n")
    assert packages(COMMAND, "fill", artifact("bert"), "The [MASK] statement", "--device", "cpu") - always == ENGINE
    assert packages(COMMAND, "inspect", artifact("bert")) - always == {*ENGINE, "rich"}
    folder = shutil.copytree(artifact("bert"), tmp_path / "artifact")
    card = packages(COMMAND, "card", folder, "--text", tmp_path / "text.txt")
    score = packages(COMMAND, "score", artifact("bert"), tmp_path / "text.txt")
    evaluate = packages(COMMAND, "eval", artifact("bert"), "--set", tmp_path / "text.txt", "--mask-prob", "0.9")
    assert not (score | evaluate) & {"pandas", *REPORT}
    assert not (card | score | evaluate) & {"torch", "transformers", "onnx", "onnxscript", "safetensors", "datasets"}


def test_a_checkpoint_is_evaluated_without_what_only_other_commands_need(checkpoint, tmp_path):
    """transformers itself imports sympy, and scipy and accelerate if they are installed: docs/decisions.md."""
    (tmp_path / "text.txt").write_text("The statement is executed before the loop\n")
    arguments = ("--set", tmp_path / "text.txt", "--mask-prob", "0.9", "--device", "cpu")
    evaluate = packages(COMMAND, "eval", checkpoint("bert"), *arguments)
    others = {"datasets", "fsspec", "matplotlib", "onnx", "onnxruntime", "onnxscript", "pandas", "sklearn"}
    assert "torch" in evaluate
    assert not evaluate & others


def test_loading_is_not_searched_for_garbage(monkeypatch):
    gc.unfreeze()  # as the test session has frozen objects, which must stay so
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 0)  # conftest.py says 1 without counting
    searched = []
    watch = lambda phase, information: searched.append(information["generation"])  # noqa: E731
    gc.callbacks.append(watch)
    try:
        with collector_paused():
            kept = [[] for _ in range(200_000)]
        assert not searched
        assert gc.isenabled() and len(kept) > gc.get_count()[0]
    finally:
        gc.callbacks.remove(watch)


def test_the_end_of_a_command_is_not_searched_for_garbage():
    code = (
        "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 1000)); from mlmkit.cli import main; "
    )
    done = subprocess.run([sys.executable, "-c", f"{code}main(['--help'])"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.endswith("\nTrue\n")
