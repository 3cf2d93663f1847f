"""What the installed ONNX Runtime costs and brings on a BERT-small shape: import, memory, rows a second, dropped top-k.

Run it in one environment with onnxruntime and in one with onnxruntime-gpu to compare the packages.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

ROWS, LENGTH, MASKED_SHARE, REPEATS = 16, 128, 0.15, 7
IMPORT = "import time; t = time.perf_counter(); import onnxruntime; print(time.perf_counter() - t)"


def build_artifact(folder: Path) -> None:
    """Random weights, BERT's vocabulary size, a tokenizer from Python's documentation."""
    from transformers import AutoModelForMaskedLM

    from mlmkit.export.export import export
    from mlmkit.pydocs import topics
    from mlmkit.tokenizer import Tokenizer
    from mlmkit.train.config import TokenizerConfig
    from mlmkit.train.presets import build_config
    from mlmkit.train.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(topics, TokenizerConfig(vocab_size=8000), max_length=512)
    config = build_config("bert-small", Tokenizer.from_transformers(tokenizer), 512)
    config.vocab_size = 30522
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    export(str(folder / "checkpoint"), folder / "artifact")


def measure(artifact: Path) -> dict[str, object]:
    """Alternate scoring and prediction; medians."""
    import onnxruntime

    from mlmkit.backends import Batch, load

    model = load(str(artifact), device="cpu")
    generator = np.random.default_rng(0)
    input_ids = generator.integers(5, 8000, (ROWS, LENGTH))
    masked = int(ROWS * LENGTH * MASKED_SHARE)
    positions = np.sort(generator.choice(ROWS * LENGTH, masked, replace=False))
    batch = Batch(input_ids, np.ones_like(input_ids), positions, generator.integers(5, 8000, masked))
    taken: dict[str, list[float]] = {"score": [], "predict": []}
    for _ in range(REPEATS + 1):
        for name in taken:
            began = time.perf_counter()
            getattr(model, name)(batch)
            taken[name].append(time.perf_counter() - began)
    score, predict = (median(times[1:]) for times in taken.values())
    # An earlier run of another package leaves its files in the page cache; the median of fresh imports is fair.
    imports = [
        subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True) for _ in range(5)
    ]
    return {
        "onnxruntime": onnxruntime.__version__,
        "providers": onnxruntime.get_available_providers(),
        "import_seconds": median(float(result.stdout) for result in imports),
        "import_noise": sorted({result.stderr for result in imports}),
        "rows_per_second": ROWS / score,
        "rows_per_second_with_top_k": ROWS / predict,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifact", type=Path, help="where to find or leave the artifact, to measure it twice")
    folder = parser.parse_args().artifact or Path(tempfile.mkdtemp())
    if not (folder / "artifact").exists():
        build_artifact(folder)
    print(json.dumps(measure(folder / "artifact"), indent=2))  # noqa: T201
