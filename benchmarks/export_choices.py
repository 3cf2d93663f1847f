"""Which graph to export, by measurement on ONNX Runtime's CPU provider: attention, opset, transformer optimiser.

The attention of `mlmkit.export.attention` and transformers' eager and sdpa, opsets 20 and 23, as exported and (at opset
20) after onnxruntime.transformers.optimizer, in the shapes of BERT-base and ModernBERT-base with random weights in
float32. For each: does it load, how far is log P from torch's at most (a full and a ragged batch), how many nodes are
left once ONNX Runtime has optimised the graph too and which of them are fused ones, and tokens a second at three shapes
with 15 % masked. The contestants take turns, each in a process of its own. One that fails is shown with the reason.
By default two layers of BERT-base, since the choice is the same; `--layers 0` for all of them.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from engines import SHAPES, Engine, cpu_session, rounds_of, run_backend, take_turn, worst_difference
from harness import Contestant, ContestantError, Report, Table, isolated, main, ratios, spread
from inputs import checkpoint, real_batch

from mlmkit.backends import Batch

ATTENTIONS, OPSETS = ("exported", "eager", "sdpa"), (20, 23)
FIRST = "exported, 20"  # what the ratios are against
RAGGED = (5, 150)  # longer than ModernBERT's sliding window
# What ONNX Runtime or its optimiser puts in the place of several nodes, or a newer opset has as one.
FUSED = {"Attention", "MultiHeadAttention", "RotaryEmbedding", "LayerNormalization", "SkipLayerNormalization"}
FUSED |= {"FusedMatMul", "FusedGemm", "Gemm", "BiasGelu", "FastGelu", "QuickGelu", "Gelu", "EmbedLayerNormalization"}


def write_graph(source: Path, path: Path, attention: str, opset: int) -> None:
    """The scoring graph, without the top-k outputs."""
    from mlmkit.export.onnx import write_onnx
    from mlmkit.model import load_pretrained

    model, _tokenizer = load_pretrained(str(source))
    path.parent.mkdir()
    if attention == "exported":
        write_onnx(model, path, opset=opset)
        return
    model.network.set_attn_implementation(attention)
    with mock.patch("mlmkit.export.onnx.exported_attention", lambda _: nullcontext()):
        write_onnx(model, path, opset=opset)


def optimise(source: Path, target: Path) -> None:
    """With onnxruntime's transformer optimiser, which finds the number of heads itself."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("bert")
    # Fails on a LayerNormalization without bias, as ModernBERT's are; ONNX Runtime does it when it loads the graph.
    options.enable_skip_layer_norm = False
    target.parent.mkdir()
    optimised = optimize_model(str(source), model_type="bert", optimization_options=options)
    optimised.save_model_to_file(str(target), use_external_data_format=True)


def run_graph(graph: Path, threads: int) -> Engine:
    """A session of its own, which only gives what is asked for."""
    session = cpu_session(graph, threads)

    def forward(batch: Batch) -> Any:
        return session.run(["log_prob"], batch._asdict())[0]

    return Engine(forward, lambda log_prob, _: log_prob)


def count_nodes(graph: Path) -> Counter[str]:
    """By operator, of what ONNX Runtime makes of the graph when it loads it."""
    import onnx

    saved = graph.parent / "loaded.onnx"
    cpu_session(graph, 1, save=str(saved))
    counts = Counter(node.op_type for node in onnx.load(saved, load_external_data=False).graph.node)
    saved.unlink()
    return counts


def candidates(source: Path, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The graphs by name, and why those that could not be written could not."""
    graphs: dict[str, Path] = {}
    failed: dict[str, str] = {}

    def attempt(name: str, graph: Path, function: Callable[..., None], *arguments: object) -> None:
        try:
            isolated(function, *arguments)
            graphs[name] = graph
        except ContestantError as error:
            failed[name] = str(error)

    for attention, opset in product(ATTENTIONS, OPSETS):
        name = f"{attention}, {opset}"
        plain, optimised = (folder / f"{attention}-{opset}{kind}" / "model.onnx" for kind in ("", "-optimised"))
        attempt(name, plain, write_graph, source, plain, attention, opset)
        if opset == OPSETS[0]:
            attempt(f"{name}, optimiser", optimised, optimise, plain, optimised)
    return graphs, failed


def compare(architecture: str, options: argparse.Namespace, folder: Path) -> tuple[Table, Any]:
    """The table of one architecture, and its figures."""
    source = checkpoint(architecture, num_hidden_layers=options.layers)
    graphs, failed = candidates(source, folder)
    probes = [real_batch(2, 64), real_batch(*RAGGED, ragged=True)]
    reference = Contestant(run_backend, str(source), "torch", "cpu")
    expected = [reference.call(take_turn, batch, 1).log_prob for batch in probes]
    reference.stop()

    contestants: dict[str, Contestant] = {}
    apart: dict[str, list[float]] = {}
    nodes: dict[str, Counter[str]] = {}
    for name, graph in graphs.items():
        contestant = Contestant(run_graph, graph, options.threads)
        try:
            found = [contestant.call(take_turn, batch, 1).log_prob for batch in probes]
            nodes[name] = isolated(count_nodes, graph)
        except ContestantError as error:
            contestant.stop()
            failed[name] = str(error)
        else:
            apart[name] = [worst_difference(*both) for both in zip(found, expected, strict=True)]
            contestants[name] = contestant
    turns = rounds_of(contestants, {shape: real_batch(*shape) for shape in SHAPES}, options.rounds)
    for contestant in contestants.values():
        contestant.stop()

    seconds = {
        shape: {name: [turn.seconds for turn in taken] for name, taken in of_shape.items()}
        for shape, of_shape in turns.items()
    }
    rows: list[Sequence[object]] = []
    for name in contestants:
        fused = ", ".join(f"{count} {kind}" for kind, count in sorted(nodes[name].items()) if kind in FUSED)
        rates = [
            f"{rows_of * length / median(times[name]):,.0f}: {spread(ratios(times[name], times[FIRST]))}"
            for (rows_of, length), times in seconds.items()
        ]
        rows.append([name, *(f"{value:.1e}" for value in apart[name]), nodes[name].total(), fused, *rates])
    rows += [[name, reason, *[""] * (3 + len(SHAPES))] for name, reason in failed.items()]
    shapes = [f"{size} x {length}: tokens/s, x the first" for size, length in SHAPES]
    figures = {f"{size} x {length}": times for (size, length), times in seconds.items()}
    return Table(architecture, ["", "Δ log P, full", "ragged", "nodes", "fused", *shapes], rows), figures


def measure(options: argparse.Namespace) -> Report:
    """A table an architecture."""
    tables, figures = [], {}
    for architecture in options.architectures:
        with tempfile.TemporaryDirectory() as temporary:
            table, figures[architecture] = compare(architecture, options, Path(temporary))
        tables.append(table)
    return Report(tables, figures=figures)


if __name__ == "__main__":
    main(__doc__, measure, architectures=(("bert-base",), ("bert-base",)), layers=(2, 1), rounds=(2, 1))
