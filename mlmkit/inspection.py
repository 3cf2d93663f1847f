"""What an artifact is, whether it is still what was exported, and what this machine can run of it."""

from dataclasses import dataclass
from pathlib import Path

from mlmkit.artifact import (
    AGAIN,
    GRAPH,
    MANIFEST,
    NEEDED,
    STATES,
    Manifest,
    check_files,
    is_artifact,
    parse_manifest,
    read_tokenizer,
)
from mlmkit.backends import tensorrt_obstacle, unproven
from mlmkit.backends.graph import Graph, graph_problems, read_graph
from mlmkit.errors import UserError


@dataclass(frozen=True)
class Engine:
    """What could run the artifact here; `reason` says why it cannot, and is empty if it can."""

    backend: str
    device: str
    reason: str


@dataclass(frozen=True)
class Inspection:
    """`files` gives each file its state: `ok`, `not listed` (and never loaded), or a key of `artifact.STATES`.

    `graph` and `tokens`, the tokenizer's vocabulary size, are None if they cannot be read. `problems` says all that is
    wrong, and is empty for a sound artifact.
    """

    manifest: Manifest
    files: dict[str, str]
    graph: Graph | None
    tokens: int | None
    problems: list[str]
    engines: list[Engine]


def inspect(folder: Path) -> Inspection:
    """Check everything that loading checks, and go on where loading stops.

    Raises `UserError` for a folder without a manifest, or with one that cannot be read.
    """
    if not is_artifact(folder):
        raise UserError(f"{folder} is no artifact: it holds no {MANIFEST} (mlmkit export CHECKPOINT --output ARTIFACT)")
    manifest = parse_manifest(folder)
    checked = check_files(folder, manifest)
    files = {name: file.state for name, file in checked.items()}
    problems = [f"{name} {STATES[state]}" for name, state in files.items() if state != "ok"]
    files |= dict.fromkeys(sorted({path.name for path in folder.iterdir()} - {MANIFEST, *files}), "not listed")
    graph, tokens = None, None
    if files[GRAPH] in ("ok", "changed"):
        try:
            graph = read_graph(checked[GRAPH].content)
            problems += [f"{GRAPH} {problem}" for problem in graph_problems(graph, manifest)]
        except ValueError as error:
            problems.append(f"{GRAPH}: {error}")
    if all(files[name] in ("ok", "changed") for name in NEEDED):
        try:
            tokens = read_tokenizer(folder, manifest, checked).vocabulary_size
        except UserError as error:
            problems.append(str(error).removeprefix(f"{folder}: ").removesuffix(f": {AGAIN}"))
    return Inspection(manifest, files, graph, tokens, problems, _engines(folder, manifest, damaged=bool(problems)))


def _engines(folder: Path, manifest: Manifest, *, damaged: bool) -> list[Engine]:
    from mlmkit.backends.onnx import NO_BF16, why_no_cuda

    reasons = {
        ("onnx", "cpu"): NO_BF16 if manifest.precision == "bf16" else "",
        ("onnx", "cuda"): why_no_cuda(),
        ("tensorrt", "cuda"): tensorrt_obstacle(manifest) or unproven(folder, manifest) or "",
    }
    return [Engine(*where, "the artifact is damaged" if damaged else reason) for where, reason in reasons.items()]
