"""What each precision costs: its parity report on real text, the size of its graph, and its speed on this CPU.

    python benchmarks/precision.py CHECKPOINT [CHECKPOINT ...] --text FILE

A row a precision, int8 with both calibrations, exported with the drift allowed. The bounds in `export/parity.py` come
from here. fp16 is run as it is by ONNX Runtime's CPU provider; bf16 in float32 that is rounded to it. Speeds are
medians of alternating rounds over the same batch of 8 x 128 at 15 % masked.
"""

import argparse
import os
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {},
    "bf16": {},
    "int8, percentile": {"precision": "int8", "calibration": "percentile"},
    "int8, entropy": {"precision": "int8", "calibration": "entropy"},
    "int8-dynamic": {},
}
TIMED = ("fp32", "int8, percentile", "int8-dynamic")


def measure(checkpoint: Path, texts: list[str], rounds: int, folder: Path) -> list[str]:
    """The rows of one checkpoint."""
    from mlmkit.backends import load
    from mlmkit.export.export import export

    reports, sizes = {}, {}
    for name, options in PRECISIONS.items():
        options = {"precision": name, **options}
        manifest = export(str(checkpoint), folder / name, texts=texts, allow_drift=True, **options)
        reports[name] = manifest.parity
        sizes[name] = sum(path.stat().st_size for path in (folder / name).glob("model.onnx*")) / 1e6
    engines = {name: load(str(folder / name), device="cpu") for name in TIMED}
    batch = sample(engines["fp32"].info.vocabulary_size, min(engines["fp32"].info.max_length, 128))
    seconds: dict[str, list[float]] = {name: [] for name in TIMED}
    for _ in range(rounds + 1):
        for name, engine in engines.items():
            began = time.perf_counter()
            engine.score(batch)
            seconds[name].append(time.perf_counter() - began)
    rows = []
    for name, report in reports.items():
        speed = f"{median(seconds['fp32'][1:]) / median(seconds[name][1:]):.2f}" if name in TIMED else ""
        rows.append(
            f"| {checkpoint} | {name} | {report['mean_log_prob_difference']:.1e} "
            f"| {report['max_log_prob_difference']:.1e} "
            f"| {report['cross_entropy']:.3f} {report['cross_entropy_difference']:+.1e} "
            f"| {report['top_1_agreement']:.2%} | {report['top_5_agreement']:.2%} | {sizes[name]:.1f} | {speed} |"
        )
    return rows


def sample(vocabulary: int, length: int) -> Any:
    """Eight rows of arbitrary ids, every seventh of them scored."""
    import numpy as np

    from mlmkit.backends import Batch

    input_ids = np.random.default_rng(0).integers(5, vocabulary, (8, length))
    positions = np.arange(0, input_ids.size, 7)
    return Batch(input_ids, np.ones_like(input_ids), positions, input_ids.flat[positions])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--text", required=True, help="a document a line")
    parser.add_argument("--documents", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    from mlmkit.documents import Source, read_documents

    texts = list(islice(read_documents(Source(options.text)), options.documents))
    print("| checkpoint | precision | mean Δ log P | max | cross-entropy | top 1 | top 5 | MB | x fp32's speed |")  # noqa: T201
    print("|---|---|---|---|---|---|---|---|---|")  # noqa: T201
    for checkpoint in options.checkpoints:
        with tempfile.TemporaryDirectory() as folder:
            print("\n".join(measure(checkpoint, texts, options.rounds, Path(folder))), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
