"""Peak memory of `mlmkit eval` over a growing corpus: it should stay where it is.

The text is Python's documentation, again and again with a number before each paragraph, so that no two are alike; the
model is a tiny one with random weights on ONNX Runtime, as it is the corpus whose memory is asked for. Each size is
measured twice in a process of its own: tokenising on the way, and from the token cache. Printed: peak resident memory.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ARCHITECTURE = '{"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, ' + (
    '"intermediate_size": 64}'
)


def main() -> None:
    """One line a size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(options.run)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder)
        print("| text | tokens | tokenising: peak MiB | from the cache: peak MiB |\n|---|---|---|---|")  # noqa: T201
        for size in options.megabytes:
            text = folder / f"{size}.txt"
            write_text(text, size << 20)
            peaks = [measure(folder, text) for _ in range(2)]
            tokens = f"{peaks[0][1]:,}"
            print(f"| {size} MB | {tokens} | {peaks[0][0]:.0f} | {peaks[1][0]:.0f} |", flush=True)  # noqa: T201


def write_model(folder: Path) -> None:
    """A tiny artifact at `folder/artifact`."""
    import torch
    from transformers import AutoModelForMaskedLM

    from mlmkit.export.export import export
    from mlmkit.pydocs import topics
    from mlmkit.tokenizer import Tokenizer
    from mlmkit.train.config import TokenizerConfig
    from mlmkit.train.presets import build_config
    from mlmkit.train.tokenizer import train_tokenizer

    checkpoint = folder / "checkpoint"
    train_tokenizer(topics, TokenizerConfig(kind="wordpiece", vocab_size=4000), max_length=128).save_pretrained(
        checkpoint
    )
    (folder / "architecture.json").write_text(ARCHITECTURE)
    config = build_config(str(folder / "architecture.json"), Tokenizer.from_folder(checkpoint), 128)
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(config).save_pretrained(checkpoint)
    export(str(checkpoint), folder / "artifact")


def write_text(path: Path, size: int) -> None:
    """At least `size` bytes, a paragraph a line."""
    from mlmkit.pydocs import topics

    paragraphs = [" ".join(part.split()) for topic in topics() for part in topic.split("\n\n")]
    with path.open("w", encoding="utf-8") as file:
        number = 0
        while file.tell() < size:
            file.writelines(f"{number} {paragraph}\n" for paragraph in paragraphs if paragraph)
            number += 1


def measure(folder: Path, text: Path) -> tuple[float, int]:
    """Peak resident MiB of one evaluation, and the tokens of its text."""
    command = [sys.executable, __file__, "--run", str(folder / "artifact"), str(text), str(folder / "result")]
    environment = os.environ | {"MLMKIT_CACHE": str(folder / "cache")}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    peak, tokens = done.stdout.split()[-2:]
    return int(peak) / 1024, int(tokens)


def run(arguments: list[str]) -> None:
    """In the child: evaluate, and print what it took."""
    from mlmkit.backends import load
    from mlmkit.documents import Source
    from mlmkit.eval.evaluate import evaluate
    from mlmkit.eval.material import TextMaterial
    from mlmkit.eval.passes import Settings

    artifact, text, output = arguments
    backend = load(artifact)
    material = TextMaterial(Source(text), backend.tokenizer)
    result = evaluate(backend, material, Settings(), Path(output), overwrite=True)
    # Not ru_maxrss, which a process inherits from the one that started it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(status["VmHWM"].split()[0], result["corpus"]["tokens"])  # noqa: T201


if __name__ == "__main__":
    main()
