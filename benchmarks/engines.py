"""What the export benchmarks share: a checkpoint, batches of real text, engines that take turns, each in a process.

The checkpoint is a published shape with random weights, three times the usual size, as those give nearly flat
distributions that hide what goes wrong. MLMKIT_DATA names a folder with tokenizers/bert-base-uncased/vocab.txt,
wiki_en/heldout.txt and ud_en_ewt/test.txt.
"""

import contextlib
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlmkit.backends import Backend, Batch

Shape = tuple[int, int]  # rows, tokens a row
SHAPES: tuple[Shape, ...] = ((1, 16), (8, 128), (32, 128))
MASKED_SHARE, WEIGHT_SCALE = 0.15, 3.0
MATRICES = [(440, 768, 768), (440, 768, 3072), (440, 3072, 768), (2048, 768, 3072), (2048, 2048, 2048)]
LARGE_MATRICES = [(65536, 768, 3072), (8192, 8192, 8192)]  # what a GPU needs to be busy


# ---------------------------------------------------------------- model and text


def write_checkpoint(folder: Path, architecture: str, layers: int = 0) -> None:
    """One of `mlmkit train`'s architectures with BERT's tokenizer; 0 layers are as many as it has."""
    import torch
    from pll_sharing import bert_tokenizer
    from transformers import AutoModelForMaskedLM

    from mlmkit.tokenizer import Tokenizer
    from mlmkit.train.presets import PRESETS, build_config

    folder.mkdir(parents=True)
    tokenizer = bert_tokenizer()
    tokenizer.save_pretrained(folder)
    values = PRESETS[architecture] | ({"num_hidden_layers": layers} if layers else {})
    (folder / "config.json").write_text(json.dumps(values))
    config = build_config(str(folder / "config.json"), Tokenizer.from_transformers(tokenizer), 512)
    torch.manual_seed(0)
    network = AutoModelForMaskedLM.from_config(config)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(WEIGHT_SCALE)
    network.save_pretrained(folder)


def export_artifact(checkpoint: Path, artifact: Path, *flags: str) -> None:
    """`mlmkit export`, proven on a few sentences. Raises `ContestantError` with what it says when it fails."""
    from pll_sharing import SENTENCES, lines_of

    text = artifact.with_suffix(".txt")
    text.write_text("\n".join(lines_of(SENTENCES)[:64]), encoding="utf-8")
    command = [sys.executable, "-m", "mlmkit", "export", str(checkpoint), "--output", str(artifact)]
    command += ["--text", str(text), *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise ContestantError(last_line(result.stderr))


def real_batch(shape: Shape, *, ragged: bool = False, seed: int = 0) -> Batch:
    """Rows of English Wikipedia, `MASKED_SHARE` of their positions hidden; the rows are full unless `ragged`."""
    from pll_sharing import bert_tokenizer, lines_of

    tokenizer: Any = bert_tokenizer()
    rows, length = shape
    generator = np.random.default_rng(seed)
    lines = lines_of("wiki_en/heldout.txt")[seed * 100 :][: rows * length // 8 + 100]
    ids = np.fromiter(chain(*tokenizer(lines, add_special_tokens=False)["input_ids"]), np.int64)
    input_ids = np.full(shape, tokenizer.pad_token_id, dtype=np.int64)
    ends = generator.integers(3, length + 1, rows) if ragged else np.full(rows, length)
    ends[0] = length
    for row, end in enumerate(ends):
        text = ids[row * length : row * length + end - 2]
        input_ids[row, :end] = [tokenizer.cls_token_id, *text, tokenizer.sep_token_id]
    column = np.arange(length)
    scored = np.flatnonzero((column > 0) & (column < ends[:, None] - 1))
    count = max(1, round(MASKED_SHARE * int(ends.sum())))
    positions = np.sort(generator.choice(scored, min(count, len(scored)), replace=False))
    targets = input_ids.reshape(-1)[positions]
    input_ids.reshape(-1)[positions] = tokenizer.mask_token_id
    return Batch(input_ids, (column < ends[:, None]).astype(np.int64), positions, targets)


# ---------------------------------------------------------------- engines, each in a process of its own


class Engine(NamedTuple):
    """`forward` runs a batch; `finish` makes of its outputs the targets' log-probabilities, float32 `[masked]`."""

    forward: Callable[[Batch], Any]
    finish: Callable[[Any, Batch], NDArray[np.float32]]
    backend: Backend | None = None


class Turn(NamedTuple):
    """Seconds a batch, those of `forward` alone, and the log-probabilities of the last."""

    seconds: float
    forward_seconds: float
    log_prob: NDArray[np.float32]


class ContestantError(Exception):
    """Why a contestant cannot take part, in one line."""


class Contestant:
    """A process that holds what `make(*arguments)` returns, and calls functions on it."""

    def __init__(self, make: Callable[..., Any], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, function: Callable[..., Any], *arguments: object) -> Any:
        """`function(made, *arguments)`, there. Raises `ContestantError` when it, or `make`, fails."""
        try:
            self._pipe.send((function, arguments))
            worked, result = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise ContestantError(f"its process ended with {self._process.exitcode}") from None
        if not worked:
            raise ContestantError(result)
        return result

    def stop(self) -> None:
        """Let the process end, and free its memory."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Any, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sys.stdout = sys.stderr  # libraries print, and the table is to stand alone
    made, failure = None, ""
    try:
        made = make(*arguments)
    except Exception as error:
        failure = f"{type(error).__name__}: {last_line(str(error))}"
    with contextlib.suppress(EOFError):  # the other end is gone: the work is done
        while True:
            function, more = pipe.recv()
            try:
                pipe.send((False, failure) if failure else (True, function(made, *more)))
            except Exception as error:
                pipe.send((False, f"{type(error).__name__}: {last_line(str(error))}"))


def isolated(function: Callable[..., Any], *arguments: object) -> Any:
    """`function(*arguments)`, in a process that goes away with its memory. Raises `ContestantError` when it fails."""
    contestant = Contestant(function, *arguments)
    try:
        return contestant.call(_itself)
    finally:
        contestant.stop()


def _itself(made: Any) -> Any:
    return made


def last_line(text: str) -> str:
    """The last line that says something, which is where errors put what happened."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")[:300]


def take_turn(engine: Engine, batch: Batch, repeats: int) -> Turn:
    """Run a batch `repeats` times."""
    forward_seconds, began, log_prob = 0.0, time.perf_counter(), np.zeros(0, np.float32)
    for _ in range(repeats):
        start = time.perf_counter()
        outputs = engine.forward(batch)
        forward_seconds += time.perf_counter() - start
        log_prob = engine.finish(outputs, batch)
    return Turn((time.perf_counter() - began) / repeats, forward_seconds / repeats, log_prob)


def peak_gib(_: object) -> float:
    """This process's peak resident memory so far. getrusage would count the parent's, from before the exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / (1 << 20)


def run_backend(path: str, name: str, device: str) -> Engine:
    """mlmkit as its users run it."""
    from mlmkit.backends import load

    backend = load(path, name, device)
    return Engine(backend.score, lambda scored, _: scored.log_prob, backend)


def cpu_session(graph: Path, threads: int, drop: Sequence[str] = (), save: str = "") -> Any:
    """On ONNX Runtime, without the outputs in `drop`; the graph as ONNX Runtime optimises it is left at `save`."""
    import onnxruntime

    from mlmkit.backends.graph import drop_outputs

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = threads
    settings.optimized_model_filepath = save
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent))
    source = drop_outputs(graph.read_bytes(), set(drop)) if drop else str(graph)
    return onnxruntime.InferenceSession(source, settings, providers=["CPUExecutionProvider"])


def rounds_of(
    contestants: Mapping[str, Contestant],
    batches: Mapping[Shape, Batch],
    rounds: int,
    *,
    tokens: int = 2048,
    most: int = 20,
) -> dict[Shape, dict[str, list[Turn]]]:
    """After a turn of each to warm up, `rounds` in which they take turns, so that other work meets them alike.

    A turn repeats a batch until it has about as many `tokens`, at `most` so often.
    """
    turns: dict[Shape, dict[str, list[Turn]]] = {}
    for shape, batch in batches.items():
        turns[shape] = {name: [] for name in contestants}
        repeats = min(max(1, tokens // batch.input_ids.size), most)
        for contestant in contestants.values():
            contestant.call(take_turn, batch, min(repeats, 5))
        for _ in range(rounds):
            for name, contestant in contestants.items():
                turns[shape][name].append(contestant.call(take_turn, batch, repeats))
    return turns


# ---------------------------------------------------------------- figures


def matrix_rate(device: str, dtype: str = "float32") -> float:
    """Operations a second at which torch multiplies matrices here: the best over shapes like a model's, and large."""
    import torch

    best, kind = 0.0, getattr(torch, dtype)
    for rows, inner, columns in MATRICES + LARGE_MATRICES * (device == "cuda"):
        left = torch.randn(rows, inner, device=device).to(kind)
        right = torch.randn(inner, columns, device=device).to(kind)
        end = time.perf_counter() + 0.5
        while (began := time.perf_counter()) < end:
            torch.mm(left, right)[-1, -1].item()  # waits for the device
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - began))
    return best


def worst_difference(log_prob: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The largest |Δ log P| in nats; infinite where one is no number."""
    apart = np.abs(log_prob.astype(np.float64) - expected)
    return float(apart.max()) if np.isfinite(apart).all() else float("inf")


def spread(values: Sequence[float]) -> str:
    """The median and the range."""
    return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
