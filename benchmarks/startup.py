"""What it takes to begin: time and peak memory of loading and running a BERT-base artifact in a fresh process.

Random weights of BERT-base's shape in float32 (about 440 MB beside the graph). Printed, medians of fresh processes: the
import of `mlmkit`, the whole of `mlmkit fill`, what its steps take, and the peak resident memory with the weights' size
taken off. Aims: less than 1.5 s, less than 400 MB.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

TEXT = "The [MASK] of the statement is an expression that is evaluated first."
ARCHITECTURE, VOCABULARY = "bert-base", 30522


def main() -> None:
    """A table of medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifact", type=Path, help="where to find or leave the artifact, to measure it again")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(options.run, options.artifact)
        return
    with tempfile.TemporaryDirectory() as temporary:
        artifact = options.artifact or Path(temporary) / "artifact"
        if not artifact.exists():
            build_artifact(artifact, Path(temporary))
        weights = sum(path.stat().st_size for path in artifact.iterdir()) / 1e6
        print(f"artifact of {weights:.0f} MB, medians of {options.repeats} fresh processes")  # noqa: T201
        imports = [timed("-c", "import mlmkit") - timed("-c", "pass") for _ in range(options.repeats)]
        print(f"import mlmkit                      {median(imports):7.3f} s")  # noqa: T201
        fills = [timed("-m", "mlmkit", "fill", str(artifact), TEXT) for _ in range(options.repeats)]
        print(f"mlmkit fill, the whole process     {median(fills):7.3f} s")  # noqa: T201
        for work in ("fill", "score", "both"):
            runs = [steps(work, artifact) for _ in range(options.repeats)]
            for name in runs[0]:
                value = median(values[name] for values in runs)
                if name.endswith("MB"):
                    value -= weights if name.startswith("peak") else 0
                    print(f"{work:6} {name:27} {value:7.0f}")  # noqa: T201
                else:
                    print(f"{work:6} {name:27} {value:7.3f} s")  # noqa: T201


def build_artifact(output: Path, folder: Path) -> None:
    """Random weights, a tokenizer from Python's documentation."""
    import torch
    from transformers import AutoModelForMaskedLM

    from mlmkit.export.export import export
    from mlmkit.pydocs import topics
    from mlmkit.tokenizer import Tokenizer
    from mlmkit.train.config import TokenizerConfig
    from mlmkit.train.presets import build_config
    from mlmkit.train.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(topics, TokenizerConfig(vocab_size=8000), max_length=512)
    config = build_config(ARCHITECTURE, Tokenizer.from_transformers(tokenizer), 512)
    config.vocab_size = VOCABULARY
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    export(str(folder / "checkpoint"), output, texts=topics()[:2])


def timed(*arguments: str) -> float:
    """Seconds of a Python process."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=os.environ | {"PYTHONPATH": "."})
    return time.perf_counter() - began


def steps(work: str, artifact: Path) -> dict[str, float]:
    """What a child process says of its steps."""
    command = [sys.executable, __file__, "--artifact", str(artifact), "--run", work]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."})
    rows = (line.rsplit(maxsplit=1) for line in done.stdout.splitlines())
    return {name: float(value) for name, value in rows}


def run(work: str, artifact: Path) -> None:
    """In the child: each step's seconds, then the memory."""
    marks = [("", time.perf_counter())]

    def mark(name: str) -> None:
        marks.append((name, time.perf_counter()))

    from mlmkit.backends import load
    from mlmkit.fill import fill

    mark("import mlmkit.fill, numpy")
    import onnxruntime  # noqa: F401

    mark("import onnxruntime")
    from mlmkit.artifact import read_manifest

    read_manifest(artifact)
    mark("hashing the files, once")
    model = load(str(artifact), device="cpu")
    mark("load, which hashes too")
    if work in ("fill", "both"):
        fill(model, TEXT)
        mark("first fill")
        fill(model, TEXT)
        mark("second fill")
    if work in ("score", "both"):
        fill(model, TEXT, targets=["the", "name"])
        mark("first score")
        fill(model, TEXT, targets=["the", "name"])
        mark("second score")
    for (_, before), (name, after) in pairwise(marks):
        print(name, after - before)  # noqa: T201
    # Not ru_maxrss, which a process inherits from the one that started it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    for name, key in (("peak less the artifact, MB", "VmHWM"), ("anonymous, MB", "RssAnon"), ("files, MB", "RssFile")):
        print(name, int(status[key].split()[0]) * 1024 / 1e6)  # noqa: T201


if __name__ == "__main__":
    main()
