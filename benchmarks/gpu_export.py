"""An artifact on a GPU: ONNX Runtime's CUDA provider and TensorRT against torch, in fp32, fp16 and bf16.

BERT-base's shape with random weights, real text with 15 % of its positions masked. Contestants, each in a process of
its own, take turns, from numpy inputs to numpy log-probabilities:

- torch with mlmkit's gathered head: float32, bfloat16, and bfloat16 compiled, without and with CUDA graphs,
- `mlmkit export --precision ...` on ONNX Runtime: through mlmkit's backend, which binds inputs and outputs, and with a
  CUDA graph for each shape (`enable_cuda_graph`, buffers that stay where they are),
- the same artifact's TensorRT plans (`--trt`) where tensorrt is installed.

For each: parity with torch in float32 on the CPU in the terms of the export's report; the largest |Δ log P| on a batch
that a CUDA graph was not captured with; tokens a second, the ratio to torch's compiled bfloat16, and the share of the
floor, which is the time for the matrix products alone at the best rate that torch reaches here in that precision. What
cannot run is shown with the reason. Prints a table and writes all of it to OUTPUT/<gpu>-<date>.json.

Without a GPU: exit code 2, or a dry run with --device cpu. MLMKIT_DATA: see engines.py.
"""

import argparse
import json
import os
import platform
import re
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from engines import (
    SHAPES,
    Contestant,
    ContestantError,
    Engine,
    Shape,
    Turn,
    export_artifact,
    isolated,
    markdown,
    matrix_rate,
    real_batch,
    rounds_of,
    run_backend,
    take_turn,
    worst_difference,
    write_checkpoint,
)

from mlmkit.backends import Batch

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
REFERENCE, PEER = "torch, fp32", "torch, bf16, compiled, CUDA graphs"
GPU_SHAPES: tuple[Shape, ...] = (*SHAPES, (64, 256))
QUICK_SHAPES: tuple[Shape, ...] = ((1, 16), (4, 32))
PARITY_TEXTS = 16
PACKAGES = ("torch", "transformers", "onnxruntime-gpu", "onnxruntime", "tensorrt")


# ---------------------------------------------------------------- engines


def run_checkpoint(checkpoint: str, device: str, dtype: str, mode: str | None = None) -> Engine:
    """`MaskedLM` on torch, compiled if there is a `mode`; its backend stays as it is, for batches of any shape."""
    import torch

    from mlmkit.backends.torch import TorchBackend

    backend = TorchBackend(checkpoint, device)
    backend.model.to(getattr(torch, dtype))
    backend.model.top_k = 0
    model = torch.compile(backend.model, mode=mode, dynamic=False) if mode else backend.model

    def forward(batch: Batch) -> Any:
        with torch.inference_mode():
            return model(*(torch.from_numpy(values).to(device) for values in batch)).log_prob.cpu()

    return Engine(forward, lambda log_prob, _: log_prob.numpy(), backend)


def run_recorded(artifact: Path, device: str) -> Engine:
    """A CUDA graph for each shape. On the CPU the same buffers and bindings, and nothing recorded.

    ONNX Runtime asks for one `gpu_graph_id` a shape, buffers that keep their addresses, and no copy between devices
    inside the graph; it runs a shape as usual, then records it, then replays it.
    """
    import onnxruntime

    from mlmkit.artifact import read_manifest
    from mlmkit.backends.graph import drop_outputs

    read_manifest(artifact)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(artifact))
    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        onnxruntime.preload_dlls()
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0", "enable_cuda_graph": "1"}))
    graph = drop_outputs((artifact / "model.onnx").read_bytes(), {"top_log_prob", "top_id"})
    session = onnxruntime.InferenceSession(graph, settings, providers=providers)
    kept: dict[tuple[int, ...], tuple[Any, dict[str, Any], Any, Any]] = {}

    def forward(batch: Batch) -> Any:
        key = (*batch.input_ids.shape, len(batch.positions))
        if key not in kept:
            inputs = {
                name: onnxruntime.OrtValue.ortvalue_from_numpy(values, device, 0)
                for name, values in batch._asdict().items()
            }
            log_prob, rank = (
                onnxruntime.OrtValue.ortvalue_from_shape_and_type(batch.positions.shape, kind, device, 0)
                for kind in (np.float32, np.int64)
            )
            binding, run_options = session.io_binding(), onnxruntime.RunOptions()
            for name, value in inputs.items():
                binding.bind_ortvalue_input(name, value)
            for name, value in {"log_prob": log_prob, "rank": rank}.items():
                binding.bind_ortvalue_output(name, value)
            run_options.add_run_config_entry("gpu_graph_id", str(len(kept) + 1))
            kept[key] = (binding, inputs, log_prob, run_options)
        binding, inputs, log_prob, run_options = kept[key]
        for name, values in batch._asdict().items():
            inputs[name].update_inplace(values)
        session.run_with_iobinding(binding, run_options)
        return log_prob.numpy()

    return Engine(forward, lambda log_prob, _: log_prob)


def parity_of(engine: Engine, checkpoint: str, texts: list[str], precision: str) -> dict[str, Any] | None:
    """The export's report, made here against torch in float32 on the CPU."""
    from mlmkit.backends.torch import TorchBackend
    from mlmkit.export.parity import BOUNDS, check_parity

    if engine.backend is None:
        return None
    return check_parity(TorchBackend(checkpoint, "cpu"), engine.backend, texts, BOUNDS[precision]).as_dict()


# ---------------------------------------------------------------- the comparison


def export_all(checkpoint: Path, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The artifacts by precision, with TensorRT plans where those can be built; and what failed."""
    artifacts: dict[str, Path] = {}
    failed: dict[str, str] = {}
    for precision in DTYPES:
        flags = ["--precision", precision, *(["--allow-drift"] if precision != "fp32" else [])]
        plans = [["--trt"], []] if find_spec("tensorrt") else [[]]
        for more in plans:
            artifact = folder / "-".join([precision, *more])
            print(f"exporting {artifact.name}", file=sys.stderr)  # noqa: T201
            try:
                export_artifact(checkpoint, artifact, *flags, *more)
            except ContestantError as error:
                failed[f"tensorrt, {precision}" if more else f"export, {precision}"] = str(error)
            else:
                artifacts[precision] = artifact
                break
    return artifacts, failed


def start(checkpoint: Path, artifacts: dict[str, Path], failed: dict[str, str], device: str) -> dict[str, Contestant]:
    """All contestants, the reference first."""
    contestants = {
        REFERENCE: Contestant(run_checkpoint, str(checkpoint), device, "float32"),
        "torch, bf16": Contestant(run_checkpoint, str(checkpoint), device, "bfloat16"),
        "torch, bf16, compiled": Contestant(run_checkpoint, str(checkpoint), device, "bfloat16", "default"),
        PEER: Contestant(run_checkpoint, str(checkpoint), device, "bfloat16", "reduce-overhead"),
    }
    for precision, artifact in artifacts.items():
        contestants[f"onnx, {precision}"] = Contestant(run_backend, str(artifact), "onnx", device)
        contestants[f"onnx, {precision}, CUDA graphs"] = Contestant(run_recorded, artifact, device)
        if find_spec("tensorrt") and f"tensorrt, {precision}" not in failed:
            contestants[f"tensorrt, {precision}"] = Contestant(run_backend, str(artifact), "tensorrt", device)
    return contestants


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything that is written down."""
    checkpoint, shapes = folder / "checkpoint", QUICK_SHAPES if options.quick else GPU_SHAPES
    isolated(write_checkpoint, checkpoint, "bert-base", options.layers)
    artifacts, failed = export_all(checkpoint, folder)
    contestants = start(checkpoint, artifacts, failed, options.device)
    batches = {shape: real_batch(shape) for shape in shapes}
    others = {shape: real_batch(shape, seed=1) for shape in shapes}

    results: dict[str, dict[str, Any]] = {}
    expected: dict[Shape, Any] = {}
    for name, contestant in list(contestants.items()):
        print(name, file=sys.stderr)  # noqa: T201
        try:
            results[name] = {
                "shapes": {},
                "parity": contestant.call(parity_of, str(checkpoint), texts(), dtype_of(name)),
            }
            for shape in shapes:
                contestant.call(take_turn, batches[shape], 3)
                found = contestant.call(take_turn, others[shape], 1).log_prob
                expected.setdefault(shape, found)
                apart = worst_difference(found, expected[shape])
                results[name]["shapes"][shape_name(shape)] = {"max_log_prob_difference": apart}
        except ContestantError as error:
            failed[name] = str(error)
            results.pop(name, None)
            contestants.pop(name).stop()
    rates = {name: isolated(matrix_rate, options.device, dtype) for name, dtype in DTYPES.items()}
    many = {"tokens": 1 << 20, "most": 200} if options.device == "cuda" else {}
    for shape, turns in rounds_of(contestants, batches, options.rounds, **many).items():
        for name, taken in turns.items():
            floor = operations(checkpoint, batches[shape]) / rates[dtype_of(name)]
            results[name]["shapes"][shape_name(shape)] |= figures(shape, taken, turns.get(PEER), floor)
    for contestant in contestants.values():
        contestant.stop()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": isolated(device_name, options.device),
        "versions": versions(),
        "layers": options.layers or 12,
        "rounds": options.rounds,
        "operations_per_second": rates,
        "contestants": results,
        "failed": failed,
    }


def figures(shape: Shape, taken: list[Turn], peer: list[Turn] | None, floor: float) -> dict[str, Any]:
    """Medians over the rounds; the ratio is the median of those within a round."""
    seconds = median(turn.seconds for turn in taken)
    ratios = [theirs.seconds / ours.seconds for theirs, ours in zip(peer or [], taken, strict=bool(peer))]
    return {
        "tokens_per_second": shape[0] * shape[1] / seconds,
        "seconds": [turn.seconds for turn in taken],
        "times_as_fast_as_compiled_torch": median(ratios) if ratios else None,
        "share_of_floor": floor / seconds,
    }


def operations(checkpoint: Path, batch: Batch) -> float:
    """Of the matrix products: two for each multiply-add, the vocabulary head at the masked positions alone."""
    config = json.loads((checkpoint / "config.json").read_text())
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    tokens, length = batch.input_ids.size, batch.input_ids.shape[1]
    body = layers * tokens * (4 * hidden * hidden + 2 * hidden * inner + 2 * length * hidden)
    return 2.0 * (body + len(batch.positions) * hidden * (hidden + config["vocab_size"]))


def dtype_of(name: str) -> str:
    """The precision in a contestant's name."""
    return name.split(", ")[1]


def shape_name(shape: Shape) -> str:
    """As tables have it."""
    return f"{shape[0]} x {shape[1]}"


def texts() -> list[str]:
    """What parity is checked on."""
    from pll_sharing import lines_of

    return lines_of("wiki_en/heldout.txt")[:PARITY_TEXTS]


def device_name(device: str) -> str | None:
    """The GPU's name, or the processor's; None where torch finds no GPU."""
    import torch

    if device == "cpu":
        return f"cpu {platform.machine()}"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def versions() -> dict[str, str]:
    """Of what was compared."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def table(results: dict[str, Any]) -> str:
    """A row a contestant; those that could not run below."""
    shapes = list(results["contestants"][REFERENCE]["shapes"])
    rows: list[list[object]] = []
    for name, result in results["contestants"].items():
        cells = []
        for figure in result["shapes"].values():
            ratio = figure["times_as_fast_as_compiled_torch"]
            cells.append(
                f"{figure['tokens_per_second']:.0f}; {f'{ratio:.2f} x' if ratio else '-'}; "
                f"{figure['share_of_floor']:.0%}; {figure['max_log_prob_difference']:.1e}"
            )
        rows.append([name, parity_cell(result["parity"]), *cells])
    said = [f"\n{name} did not run: {reason}" for name, reason in results["failed"].items()]
    header = ["", "Δ log P max, mean; Δ cross-entropy; top-1"]
    header += [f"{shape}: tokens/s; x compiled torch; of floor; Δ log P" for shape in shapes]
    return markdown(header, rows) + "\n" + "".join(said)


def parity_cell(report: dict[str, Any] | None) -> str:
    """In short."""
    if report is None:
        return ""
    return (
        f"{report['max_log_prob_difference']:.1e}, {report['mean_log_prob_difference']:.1e}; "
        f"{report['cross_entropy_difference']:+.1e}; {report['top_1_agreement']:.1%}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, default=0, help="0: as many as BERT-base has")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--quick", action="store_true", help="a dry run: one layer, one round")
    options = parser.parse_args()
    if options.quick:
        options.layers, options.rounds = 1, 1
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if (name := isolated(device_name, options.device)) is None:
        print("torch finds no GPU here: --device cpu makes a dry run", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    with tempfile.TemporaryDirectory() as temporary:
        results = compare(options, Path(temporary))
    options.output.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path = options.output / f"{slug}-{results['date'][:10]}.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"{table(results)}\n\nwritten to {path}")  # noqa: T201
