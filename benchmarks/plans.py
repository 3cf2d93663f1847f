"""What a TensorRT plan costs to build, and what it contains: BERT-base and ModernBERT-base shapes, without a GPU.

A row per model and precision, with random weights and the default profiles of `mlmkit export --trt`. The graph is
prepared as it is there; the ranges and scales of fp16 and int8 come from random tokens, which is enough to count layers
and says nothing about scores. Each build runs in a process of its own, so its memory is that of the build. How fast a
plan runs is not measured: that takes a GPU. `--page docs/tensorrt.md` replaces the table on that page.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from harness import Report, SkippedError, Table, main, processor, say, split_page, write_block
from inputs import TINY
from processes import isolated, memory_mib

from mlmkit.backends import Batch
from mlmkit.export.profiles import PlanOptions

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
MODELS = {"bert": ("BERT-base", PRECISIONS), "modernbert": ("ModernBERT-base", ("fp16", "bf16"))}
HEADER = (
    *("model", "precision", "build, processor s", "peak MiB", "plan MiB"),
    *("layers", "fused attentions", "scratch MiB"),
)
BY_PROFILE = ("fused_attention", "scratch_mib")
BY_PROFILE_NOTE = (
    "*Layers* are those of all profiles. The last two columns have a figure for each profile: latency, throughput and, "
    "for ModernBERT, long. *Peak* is the resident memory of the process that builds; *scratch* is what an execution "
    "context takes beside the weights. Int8 plans compute the rest in float16. Ranges and scales come from random "
    "tokens: enough to count layers."
)
SCRIPT = Path(__file__).name


def random_batches(vocabulary_size: int, rows: int, length: int) -> list[Batch]:
    """Two full batches with every third position scored; ids are of the upper half, which has no special ones."""
    generator = np.random.default_rng(0)
    batches = []
    for _ in range(2):
        input_ids = generator.integers(vocabulary_size // 2, vocabulary_size, (rows, length))
        positions = np.arange(0, rows * length, 3)
        targets = input_ids.reshape(-1)[positions]
        batches.append(Batch(input_ids, np.ones_like(input_ids), positions, targets))
    return batches


def write_plan_graph(graph: Path, precision: str, batches: Sequence[Batch]) -> None:
    """Rewrite a float32 graph file as `mlmkit export --trt` does for TensorRT in that precision."""
    from mlmkit.export.graphs import replace_graph
    from mlmkit.export.plans import plan_model
    from mlmkit.export.precision import convert

    facts = convert(graph, precision, batches) or {}
    replace_graph(plan_model(graph, precision, facts.get("overflowing", ())), graph)


def builder_name() -> str:
    """TensorRT for RTX with its version, or nothing if it is not installed. No other builds without a GPU."""
    try:
        from mlmkit.backends.tensorrt.bindings import NAME, RTX, trt
    except (ImportError, OSError):  # OSError: a library that the bindings need is missing
        return ""
    return f"{NAME} {trt.__version__}" if RTX else ""


def write_graph(folder: Path, architecture: str, quick: bool) -> tuple[int, int]:
    """Write the graph of transformers' default configuration; return its vocabulary size and its longest row."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForMaskedLM

    from mlmkit.export.onnx import write_onnx
    from mlmkit.model import MaskedLM

    torch.manual_seed(0)
    changes: dict[str, Any] = TINY if quick else {}
    config = CONFIG_MAPPING[architecture](**changes)
    model = MaskedLM(AutoModelForMaskedLM.from_config(config).eval())
    write_onnx(model, folder / "model.onnx")
    return model.vocabulary_size, model.max_length()


def measured_build(folder: Path, architecture: str, precision: str, max_length: int) -> dict[str, Any]:
    """The figures of a build, made in this process, which does nothing else."""
    facts: dict[str, Any] = {"architecture": architecture, "precision": precision, "max_length": max_length}
    began = time.process_time()
    from mlmkit.export.tensorrt import build_plan  # loading the builder counts, as in all figures so far

    built = build_plan(folder / "model.onnx", folder, **facts, options=PlanOptions())
    seconds = time.process_time() - began
    names = [profile.name for profile in built.profiles]
    described = json.loads((folder / "layers.json").read_text(encoding="utf-8"))
    return {
        "profiles": names,
        "seconds": seconds,
        "peak_mib": memory_mib(),
        "plan_mib": (folder / "model.plan").stat().st_size / 2**20,
        "layers": len(described["Layers"]),
        "fused_attention": {name: built.fused_attention.get(name, 0) for name in names},
        "scratch_mib": built.scratch_mib,
        "types": built.layers,
    }


def row(figures: dict[str, Any]) -> list[str]:
    by_profile = [", ".join(f"{value:,.0f}" for value in figures[name].values()) for name in BY_PROFILE]
    sizes = f"{figures['seconds']:.1f}", f"{figures['peak_mib']:,.0f}", f"{figures['plan_mib']:,.0f}"
    return [*sizes, str(figures["layers"]), *by_profile]


def measure(options: argparse.Namespace) -> Report:
    if not (builder := builder_name()):
        raise SkippedError("TensorRT for RTX is not installed: pip install tensorrt_rtx")
    if options.page:
        split_page(Path(options.page), SCRIPT)
    rows: list[list[str]] = []
    figures: dict[str, Any] = {}
    for architecture in options.models:
        title, precisions = MODELS[architecture]
        with tempfile.TemporaryDirectory() as temporary:
            source = Path(temporary) / "fp32"
            source.mkdir()
            vocabulary_size, max_length = isolated(write_graph, source, architecture, options.quick)
            batches = random_batches(vocabulary_size, 2, 32)
            for precision in [name for name in precisions if name in options.precisions]:
                folder = Path(temporary) / "typed"
                shutil.copytree(source, folder)
                isolated(write_plan_graph, folder / "model.onnx", precision, batches)
                built = isolated(measured_build, folder, architecture, precision, max_length)
                shutil.rmtree(folder)
                figures[f"{architecture}, {precision}"] = built
                rows.append([title, precision, *row(built)])
                say(" ".join(rows[-1]))
    report = Report([Table("", HEADER, rows)], [f"Built by {builder}. {BY_PROFILE_NOTE}"], figures=figures)
    if options.page:
        written = f"*Written by `python benchmarks/{SCRIPT} --page docs/tensorrt.md` on {date.today()}: {builder}; "
        paragraphs = [f"{written}{processor()}.*", report.tables[0].markdown(), BY_PROFILE_NOTE]
        write_block(Path(options.page), SCRIPT, paragraphs)
    return report


if __name__ == "__main__":
    main(__doc__, measure, models=(tuple(MODELS), ("bert",)), precisions=(PRECISIONS, ("int8",)), page=("", ""))
