"""Fixtures: tiny random models, and small real text from Python's documentation and two Portuguese sentences."""

import contextlib
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from serving import Server, forked

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as the command line sets it
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["OMP_NUM_THREADS"] = "1"  # for models this small a second thread costs more than it gains
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from mlmkit.artifact import GRAPH
from mlmkit.export.parity import ProofText
from mlmkit.files import CHECKSUM, locked, sealed
from mlmkit.pydocs import topics
from mlmkit.tokenizer import Tokenizer

PORTUGUESE = ("A Águia voa alto no céu azul.", "O rato roeu a roupa do rei de Roma.")
KINDS = ("bert", "roberta", "modernbert")


def paragraphs() -> list[str]:
    """Real text of all lengths: paragraphs of the language reference, then the Portuguese sentences."""
    parts = [" ".join(part.split()) for topic in topics()[:12] for part in topic.split("\n\n")]
    return [part for part in dict.fromkeys(parts) if part] + list(PORTUGUESE)


PROOF = ProofText("paragraphs", paragraphs())


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` or `-m tensorrt`, import only the files with such tests: a GPU machine may lack other packages."""
    mark = config.getoption("markexpr")
    is_other = collection_path.match("test_*.py") and f"pytest.mark.{mark}" not in collection_path.read_text("utf-8")
    return True if mark in ("gpu", "tensorrt") and is_other else None


# The files that take longest, the longest first. Each process of the suite takes the next file when it is done, so one
# that began last would leave the other process waiting.
LONGEST = [
    "docs", "tensorrt_build", "train_resume", "phases", "layout", "architectures", "serve_failures", "precision",
    "train_setup", "locks", "pairs", "held_out", "artifact", "long_texts", "wheel", "cli", "train_precision",
    "bounds", "transformers4", "eval_resume", "train", "every", "damage", "eval", "serve_page", "cli_train",
    "checkpoint_activations", "cluster", "backends", "use", "tensorrt_api",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish() -> None:
    """Let no garbage collection search what the tests have imported: it is millions of objects, and they stay."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def frozen_objects() -> Iterator[None]:
    """Nor what a file's tests have imported or made for later ones. Training collects garbage after each phase."""
    yield
    gc.collect()
    gc.freeze()


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run a command in this process: its exit code, standard output and standard error."""
    from mlmkit.cli import main

    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(exit.value.code or 0), out, err


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """The object that a command prints with `--json`."""
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command refuses its arguments."""
    code, out, err = run(capsys, *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1), (arguments, err)
    return err


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "mlmkit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def edit_record(path: Path, **changes: Any) -> None:
    """Change values in a record, with a valid checksum."""
    values = json.loads(path.read_text())
    values.pop(CHECKSUM, None)
    path.write_text(json.dumps(sealed(values | changes)))


@pytest.fixture(scope="session")
def transformers4() -> Callable[..., Any]:
    """Runs a script with arguments under transformers 4: the JSON that it prints last. Its imports take seconds."""
    folder = Path(__file__).parent.parent / "build" / "transformers4"
    if not folder.exists():
        pytest.skip(f"transformers 4 is not installed: make {folder.relative_to(folder.parent.parent)}/installed")

    def run_script(script: str, *arguments: object) -> Any:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run_script


@pytest.fixture(scope="session", autouse=True)
def shared_cores() -> Iterator[None]:
    """Take no more of the processor than the tests need."""
    from mlmkit.backends import onnx

    with pytest.MonkeyPatch.context() as patch:
        # A second thread of ONNX Runtime waits actively, on a core that other tests need.
        patch.setattr(onnx, "cores", lambda: 1)
        # Loading a model asks whether objects are frozen. Counting millions takes a good part of a tenth of a second.
        patch.setattr(gc, "get_freeze_count", lambda: 1)
        yield


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Use a token cache for the tests instead of the user's."""
    os.environ["MLMKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, one document per line."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{line}\n" for line in paragraphs()), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a trained tokenizer of a kind, `wordpiece` or `bpe`."""
    folders: dict[str, Path] = {}

    def make(kind: str) -> Path:
        from mlmkit.pretrained import save_tokenizer
        from mlmkit.train.config import TokenizerConfig
        from mlmkit.train.tokenizer import train_tokenizer

        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            config = TokenizerConfig(kind=kind, vocab_size=600)
            save_tokenizer(train_tokenizer(paragraphs, config, max_length=64), folders[kind])
        return folders[kind]

    return make


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Fills a folder of this name once, for all workers of pytest-xdist together."""
    base = tmp_path_factory.getbasetemp()
    parent = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder, unfinished = parent / name, parent / f"{name}-unfinished"
        if not folder.exists():
            with locked(folder, wait=True):
                if not folder.exists():
                    unfinished.mkdir(exist_ok=True)
                    fill(unfinished)
                    unfinished.rename(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def graph_cache(shared: Callable[[str, Callable[[Path], object]], Path]) -> Iterator[None]:
    """Exports of the same weights share one graph: torch's exporter takes ten seconds for each."""
    import onnx_ir as ir

    from mlmkit.export import export, logits
    from mlmkit.export.graphs import save_graph
    from mlmkit.export.onnx import write_graph, write_onnx

    def cached(write: Callable[..., None], model: Any, path: Path, *arguments: Any, **options: Any) -> None:
        digest = hashlib.sha256(repr((write.__name__, model.network.config, arguments[1:], options)).encode())
        for name, weight in model.state_dict().items():
            digest.update(name.encode() + weight.numpy().tobytes())
        folder = shared(
            f"graph-{digest.hexdigest()}", lambda folder: write(model, folder / GRAPH, *arguments, **options)
        )
        save_graph(ir.load(folder / GRAPH), path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "write_onnx", partial(cached, write_onnx))
        patch.setattr(logits, "write_graph", partial(cached, write_graph))
        yield


@pytest.fixture(scope="session")
def architecture(shared: Callable[[str, Callable[[Path], object]], Path]) -> Callable[[str], tuple[Any, Path]]:
    """A tiny model of an architecture with heads of 64: its row for docs/architectures.md, and its graph's folder."""

    @cache
    def make(name: str) -> tuple[Any, Path]:
        from benchmarks.architectures import Row, check

        def fill(folder: Path) -> None:
            row = check(name, folder)
            (folder / "row.json").write_text(json.dumps(asdict(row)))

        folder = shared(f"architecture-{name}", fill)
        return Row(**json.loads((folder / "row.json").read_text())), folder

    return make


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Callable[[str], Path], graph_cache: None
) -> Callable[[str], Path]:
    """Makes a checkpoint for up to 64 tokens, with random weights large enough for sharp predictions."""
    folders: dict[str, Path] = {}

    def make(kind: str) -> Path:
        import torch
        from transformers import AutoModelForMaskedLM

        from mlmkit.pretrained import save_config
        from mlmkit.train.presets import build_config

        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            tokenizer_path = tokenizer_folder("bpe" if kind == "roberta" else "wordpiece")
            architecture = folders[kind] / "architecture.json"
            architecture.write_text(ARCHITECTURES[kind])
            config = build_config(str(architecture), Tokenizer.from_folder(tokenizer_path), 64)
            architecture.unlink()
            torch.manual_seed(0)
            network = AutoModelForMaskedLM.from_config(config)
            with torch.no_grad():
                for parameter in network.parameters():
                    if parameter.ndim > 1:
                        parameter.mul_(6)
            network.save_pretrained(folders[kind])
            save_config(network.config, folders[kind])
            for file in tokenizer_path.iterdir():
                (folders[kind] / file.name).write_bytes(file.read_bytes())
        return folders[kind]

    return make


@pytest.fixture(scope="session")
def lowered(
    shared: Callable[[str, Callable[[Path], object]], Path], checkpoint: Callable[[str], Path]
) -> Callable[[str, str], Path]:
    """The checkpoint's artifact in a precision."""

    @cache
    def make(kind: str, precision: str) -> Path:
        from mlmkit.export.export import export

        name = kind if precision == "fp32" else f"{kind}-{precision}"

        def fill(folder: Path) -> None:
            export(str(checkpoint(kind)), folder / name, precision=precision, text=PROOF)

        return shared(f"artifact-{name}", fill) / name

    return make


@pytest.fixture(scope="session")
def artifact(lowered: Callable[[str, str], Path]) -> Callable[[str], Path]:
    """The checkpoint's artifact in float32."""
    return lambda kind: lowered(kind, "fp32")


@pytest.fixture
def copy(artifact: Callable[[str], Path], tmp_path: Path) -> Path:
    """BERT's artifact, to damage."""
    return Path(shutil.copytree(artifact("bert"), tmp_path / "copy"))


@pytest.fixture(scope="module")
def served(
    artifact: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Server]]:
    """A running server of a kind of model, one for each set of options. Each takes some time even when nobody asks."""
    with contextlib.ExitStack() as stack:

        @cache
        def serve(kind: str, *options: str) -> Server:
            return stack.enter_context(forked(artifact(kind), tmp_path_factory.mktemp("served"), *options))

        yield serve


SIZES = '"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48'
ARCHITECTURES = {
    "bert": f'{{"model_type": "bert", {SIZES}}}',
    "convbert": f'{{"model_type": "convbert", {SIZES}, "embedding_size": 32, "head_ratio": 1}}',
    "distilbert": '{"model_type": "distilbert", "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}',
    "roberta": f'{{"model_type": "roberta", {SIZES}}}',
    "modernbert": f'{{"model_type": "modernbert", "local_attention": 8, "global_attn_every_n_layers": 2, {SIZES}}}',
}
