"""Checks an artifact: is it still what was exported, and which backends can run it on this machine?"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlmkit.artifact import (
    GRAPH,
    MANIFEST,
    NEEDED,
    REEXPORT_HINT,
    STATES,
    CheckedFile,
    Manifest,
    check_files,
    is_artifact,
    parse_manifest,
    read_tokenizer,
    refuse_other_graphs,
)
from mlmkit.backends import tensorrt_obstacle, unproven
from mlmkit.errors import UserError

if TYPE_CHECKING:
    from mlmkit.backends.onnx import Graph


@dataclass(frozen=True)
class Engine:
    """A backend on a device. `reason` says why it cannot run the artifact here, and is empty if it can."""

    backend: str
    device: str
    reason: str


@dataclass(frozen=True)
class Inspection:
    """The state of an artifact.

    `files` maps every file of the folder to `ok`, `not listed` (never loaded) or a key of `artifact.STATES`. `graph`
    is None unless all files are `ok` and ONNX Runtime can load the graph on the CPU, which it cannot for bf16.
    `tokens` is the size of the tokenizer's vocabulary, None if the tokenizer cannot be read. `problems` lists
    everything that is wrong; a sound artifact has none.
    """

    manifest: Manifest
    files: dict[str, str]
    graph: "Graph | None"
    tokens: int | None
    problems: list[str]
    engines: list[Engine]


def inspect(folder: Path) -> Inspection:
    """Run every check that loading runs, without stopping at the first failure.

    Raises `UserError` for a folder without a manifest, or with one that cannot be read.
    """
    if not is_artifact(folder):
        refuse_other_graphs(folder)
        raise UserError(
            f"{folder} is not an artifact: it has no {MANIFEST} (mlmkit export CHECKPOINT --output ARTIFACT)"
        )
    manifest = parse_manifest(folder)
    checked = check_files(folder, manifest)
    files = {name: file.state for name, file in checked.items()}
    problems = [f"{name} {STATES[state]}" for name, state in files.items() if state != "ok"]
    files |= dict.fromkeys(sorted({path.name for path in folder.iterdir()} - {MANIFEST, *files}), "not listed")
    graph, tokens = None, None
    if not problems and manifest.precision != "bf16":
        graph, problems = _inspect_graph(folder, manifest, checked[GRAPH])
    if all(files[name] in ("ok", "changed") for name in NEEDED):
        try:
            tokens = read_tokenizer(folder, manifest, checked).vocabulary_size
        except UserError as error:
            problems.append(str(error).removeprefix(f"{folder}: ").removesuffix(f": {REEXPORT_HINT}"))
    return Inspection(manifest, files, graph, tokens, problems, _engines(folder, manifest, damaged=bool(problems)))


def _inspect_graph(folder: Path, manifest: Manifest, file: CheckedFile) -> "tuple[Graph | None, list[str]]":
    from mlmkit.backends.onnx import describe_graph, graph_problems, open_session

    try:
        graph = describe_graph(open_session(folder, manifest, file.content, "cpu"))
    except UserError as error:
        return None, [str(error).removeprefix(f"{folder}/")]
    return graph, [f"{GRAPH} {problem}" for problem in graph_problems(graph, manifest)]


def _engines(folder: Path, manifest: Manifest, *, damaged: bool) -> list[Engine]:
    from mlmkit.backends.onnx import NO_BF16, why_no_cuda

    reasons = {
        ("onnx", "cpu"): NO_BF16 if manifest.precision == "bf16" else "",
        ("onnx", "cuda"): why_no_cuda(),
        ("tensorrt", "cuda"): tensorrt_obstacle(manifest) or unproven(folder, manifest) or "",
    }
    return [Engine(*where, "the artifact is damaged" if damaged else reason) for where, reason in reasons.items()]
