"""An artifact on a GPU: ONNX Runtime's CUDA provider and TensorRT against torch, in fp32, fp16 and bf16.

BERT-base's shape with random weights, text with 15 % of its positions masked. Contestants, each in a process of its
own, take turns, from numpy inputs to numpy log-probabilities:

- torch with mlmkit's gathered head: float32, bfloat16, and bfloat16 compiled, without and with CUDA graphs,
- `mlmkit export --precision ...` on ONNX Runtime: through mlmkit's backend, which binds inputs and outputs, and with a
  CUDA graph for each shape (`enable_cuda_graph`, buffers that stay where they are),
- the same artifact's TensorRT plans (`--trt`) where tensorrt or tensorrt_rtx is installed. TensorRT for RTX builds
  everywhere but does not run on every GPU (not on H100 and H200): there the plan is shown with the reason.

For each: parity with torch in float32 on the CPU in the terms of the export's report; the largest |Δ log P| on a batch
that a CUDA graph was not captured with; tokens a second, the ratio to torch's compiled bfloat16 with CUDA graphs, and
the share of the floor, which is the time for the matrix products alone at the best rate that torch reaches here in that
precision. What cannot run is shown with the reason.

Without a GPU `--quick` makes a dry run on the CPU, of a tiny model.
"""

import argparse
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from engines import (
    SHAPES,
    Engine,
    Shape,
    Turn,
    matrix_rate,
    rounds_of,
    run_backend,
    take_turn,
    worst_difference,
)
from gpu_shared import FAILED, Figures, Row, Setting, attempt, compiled, find_device, tables
from harness import Contestant, ContestantError, Report, SkippedError, isolated, main, ratios, say
from inputs import TINY, artifact, held_out, real_batch

from mlmkit.backends import Batch, Scored

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
REFERENCE, PEER = "torch, fp32", "torch, bf16, compiled, CUDA graphs"
GPU_SHAPES: tuple[Shape, ...] = (*SHAPES, (64, 256))
QUICK_SHAPES: tuple[Shape, ...] = ((1, 16), (4, 32))
PARITY_TEXTS = 16


# ---------------------------------------------------------------- engines


def run_checkpoint(path: Path, device: str, dtype: str, mode: str | None = None) -> Engine:
    """`MaskedLM` on torch, compiled if there is a `mode`; its backend stays as it is, for batches of any shape."""
    import torch

    from mlmkit.backends.torch import TorchBackend

    backend = TorchBackend(str(path), device)
    backend.model.to(getattr(torch, dtype))
    model = compiled(backend.model, device, mode) if mode else backend.model

    def forward(batch: Batch) -> Any:
        with torch.inference_mode():
            return model(*(torch.from_numpy(values).to(device) for values in batch)).log_prob.cpu()

    return Engine(forward, lambda log_prob, _: log_prob.numpy(), backend)


def run_recorded(folder: Path, device: str) -> Engine:
    """A CUDA graph for each shape. On the CPU the same buffers and bindings, and nothing recorded.

    ONNX Runtime asks for one `gpu_graph_id` a shape, buffers that keep their addresses, and no copy between devices
    inside the graph; it runs a shape as usual, then records it, then replays it.
    """
    import onnxruntime

    from mlmkit.artifact import read_manifest

    read_manifest(folder)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        onnxruntime.preload_dlls()
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0", "enable_cuda_graph": "1"}))
    session = onnxruntime.InferenceSession(folder / "model.onnx", settings, providers=providers)
    candidates = next(output.shape[1] for output in session.get_outputs() if output.name == "top_id")
    kept: dict[tuple[int, ...], tuple[Any, dict[str, Any], Any, Any]] = {}

    def forward(batch: Batch) -> Any:
        key = (*batch.input_ids.shape, len(batch.positions))
        if key not in kept:
            inputs = {
                name: onnxruntime.OrtValue.ortvalue_from_numpy(values, device, 0)
                for name, values in batch._asdict().items()
            }
            masked = len(batch.positions)
            outputs = {
                name: onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                    [masked, candidates] if name.startswith("top_") else [masked], kind, device, 0
                )
                for name, kind in zip(Scored._fields, (np.float32, np.int64) * 2, strict=True)
            }
            binding, run_options = session.io_binding(), onnxruntime.RunOptions()
            for name, value in inputs.items():
                binding.bind_ortvalue_input(name, value)
            for name, value in outputs.items():
                binding.bind_ortvalue_output(name, value)
            run_options.add_run_config_entry("gpu_graph_id", str(len(kept) + 1))
            kept[key] = (binding, inputs, outputs["log_prob"], run_options)
        binding, inputs, log_prob, run_options = kept[key]
        for name, values in batch._asdict().items():
            inputs[name].update_inplace(values)
        session.run_with_iobinding(binding, run_options)
        return log_prob.numpy()

    return Engine(forward, lambda log_prob, _: log_prob)


def parity_of(engine: Engine, path: Path, texts: list[str], precision: str) -> Figures:
    """The export's report, made here against torch in float32 on the CPU; nothing where there is no backend."""
    from mlmkit.backends.torch import TorchBackend
    from mlmkit.export.parity import BOUNDS, check_parity
    from mlmkit.export.proof_text import ProofText

    if engine.backend is None:
        return {}
    text = ProofText("the text", texts)
    found = check_parity(TorchBackend(str(path), "cpu"), engine.backend, text, BOUNDS[precision], 1)
    return {
        "max Δ log P": found.max_log_prob_difference,
        "mean": found.mean_log_prob_difference,
        "Δ cross-entropy": found.cross_entropy_difference,
        "same best token": found.top_1_agreement,
        "within bounds": "yes" if found.passed else "NO",
    }


# ---------------------------------------------------------------- the comparison


def runtimes(setting: Setting, *, whole: bool = False) -> Iterator[Row]:
    """A row a contestant with its parity, then a row a contestant and shape.

    In part: fp16 alone, beside torch's reference and `PEER`, at the smallest and largest of `SHAPES`. Raises
    `SkippedError` without a runtime.
    """
    if setting.device == "cuda" and not (has_tensorrt() or isolated(has_cuda_provider)):
        raise SkippedError("onnxruntime has no CUDA provider here, and TensorRT is not installed")
    path = setting.checkpoint("bert-base")
    lower = "fp16" if setting.device == "cuda" else "fp32"  # a CPU works fp16 out the long way
    artifacts, failed = export_all(setting, tuple(DTYPES) if whole and not setting.quick else (lower,))
    yield from failed.items()
    shapes = QUICK_SHAPES if setting.quick else GPU_SHAPES if whole else SHAPES[::2]
    batches = {shape: real_batch(*shape) for shape in shapes}
    others = {shape: real_batch(*shape, seed=1) for shape in shapes}
    texts = [text[:400] for text in held_out()[:PARITY_TEXTS]]

    contestants: dict[str, Contestant] = {}
    differences: dict[tuple[str, Shape], float] = {}
    expected: dict[Shape, Any] = {}
    try:
        for name, contestant in start(path, artifacts, failed, setting.device, whole=whole).items():
            say(name)
            contestants[name] = contestant
            row = attempt(name, contestant.call, parity_of, path, texts, dtype_of(name))
            try:
                for shape in shapes:
                    contestant.call(take_turn, batches[shape], 3)
                    found = contestant.call(take_turn, others[shape], 1).log_prob
                    expected.setdefault(shape, found)
                    differences[name, shape] = worst_difference(found, expected[shape])
            except ContestantError as error:
                row = name, {FAILED: str(error)}
            if row[1]:
                yield row
            if FAILED in row[1]:
                contestants.pop(name).stop()
        rates = {
            name: setting.rates.get(dtype) or isolated(matrix_rate, setting.device, dtype)
            for name, dtype in DTYPES.items()
            if name in map(dtype_of, contestants)
        }
        many = {"tokens": 1 << 20, "most": 200} if setting.device == "cuda" else {}
        for shape, batch in batches.items():
            for turns in rounds_of(contestants, {shape: batch}, setting.rounds, **many).values():
                for name, taken in turns.items():
                    floor = operations(path, batch) / rates[dtype_of(name)]
                    found = figures(batch, taken, turns.get(PEER), floor) | {"max Δ log P": differences[name, shape]}
                    yield f"{shape[0]} x {shape[1]}, {name}", found
    finally:
        for contestant in contestants.values():
            contestant.stop()


def has_cuda_provider() -> bool:
    """Whether ONNX Runtime was built with it."""
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def has_tensorrt() -> bool:
    """Whether one of its two kinds is installed."""
    return any(map(find_spec, ("tensorrt", "tensorrt_rtx")))


def export_all(setting: Setting, precisions: tuple[str, ...]) -> tuple[dict[str, Path], dict[str, Figures]]:
    """The artifacts by precision, with TensorRT plans where those can be built; and what failed."""
    artifacts: dict[str, Path] = {}
    failed: dict[str, Figures] = {}
    changes = TINY if setting.quick else {}
    for precision in precisions:
        flags = ["--precision", precision, *(["--allow-drift"] if precision != "fp32" else [])]
        for more in [["--trt"], []] if has_tensorrt() else [[]]:
            name, made = attempt(
                f"tensorrt, {precision}" if more else f"export, {precision}",
                lambda flags=[*flags, *more]: artifact("bert-base", *flags, **changes),
            )
            if isinstance(made, Path):
                artifacts[precision] = made
                break
            failed[name] = made
    return artifacts, failed


def start(
    path: Path, artifacts: dict[str, Path], failed: dict[str, Figures], device: str, *, whole: bool
) -> dict[str, Contestant]:
    """The contestants, the reference first."""
    contestants = {REFERENCE: Contestant(run_checkpoint, path, device, "float32")}
    if whole:
        contestants["torch, bf16"] = Contestant(run_checkpoint, path, device, "bfloat16")
        contestants["torch, bf16, compiled"] = Contestant(run_checkpoint, path, device, "bfloat16", "default")
    contestants[PEER] = Contestant(run_checkpoint, path, device, "bfloat16", "reduce-overhead")
    for precision, folder in artifacts.items():
        contestants[f"onnx, {precision}"] = Contestant(run_backend, str(folder), "onnx", device)
        contestants[f"onnx, {precision}, CUDA graphs"] = Contestant(run_recorded, folder, device)
        if has_tensorrt() and f"tensorrt, {precision}" not in failed:
            contestants[f"tensorrt, {precision}"] = Contestant(run_backend, str(folder), "tensorrt", device)
    return contestants


def figures(batch: Batch, taken: list[Turn], peer: list[Turn] | None, floor: float) -> Figures:
    """Medians over the rounds; the ratio is the median of those within a round."""
    seconds = [turn.seconds for turn in taken]
    faster = ratios(seconds, [turn.seconds for turn in peer]) if peer else None
    return {
        "tokens/s": batch.input_ids.size / median(seconds),
        "x compiled torch": median(faster) if faster else None,
        "of the floor": floor / median(seconds),
    }


def operations(path: Path, batch: Batch) -> float:
    """Of the matrix products: two for each multiply-add, the vocabulary head at the masked positions alone."""
    config = json.loads((path / "config.json").read_text())
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    tokens, length = batch.input_ids.size, batch.input_ids.shape[1]
    body = layers * tokens * (4 * hidden * hidden + 2 * hidden * inner + 2 * length * hidden)
    return 2.0 * (body + len(batch.positions) * hidden * (hidden + config["vocab_size"]))


def dtype_of(name: str) -> str:
    """The precision in a contestant's name."""
    return name.split(", ")[1]


def measure(options: argparse.Namespace) -> Report:
    """Parity, then speed."""
    device, name = isolated(find_device, options.device)
    if device == "cpu" and not options.quick:
        raise SkippedError("torch finds no GPU here: --quick makes a dry run on the CPU")
    rows = dict(runtimes(Setting(device, name, options.quick, options.rounds), whole=True))
    return Report(list(tables("", rows)), [f"On {name}."], figures={"device": name, "rows": rows})


if __name__ == "__main__":
    main(__doc__, measure, device=("auto", "auto"), rounds=(5, 1))
