"""Peak memory of one forward and backward at a large vocabulary: logits everywhere, at the masked tokens, in slices.

Usage: python benchmarks/loss_memory.py [--vocabulary 64000] [--tokens 8192] [--hidden 256]

The model is a BERT of one layer with random weights, 15 % of the tokens are masked, and each way has a process of its
own. Printed: how far the resident memory rose above what it was before the step, and the loss, which must agree. One
step before that, on a row of 8 tokens, brings in what is there to stay: the gradients and the libraries' own buffers.
"""

import argparse
import subprocess
import sys
from pathlib import Path

WAYS = {
    "everywhere": "logits of every token, cross-entropy at the masked ones",
    "gathered": "logits of the masked tokens",
    "slices": "the same in slices, as mlmkit trains",
}


def main() -> None:
    """One line a way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=64_000)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        step(options.way, options.vocabulary, options.tokens, options.hidden)
        return
    print("| | peak above the start, MiB | loss |\n|---|---|---|")  # noqa: T201
    for way, description in WAYS.items():
        done = subprocess.run([sys.executable, *sys.argv, "--way", way], check=True, capture_output=True, text=True)
        peak, value = done.stdout.split()
        print(f"| {description} | {peak} | {value} |", flush=True)  # noqa: T201


def step(way: str, vocabulary: int, tokens: int, hidden: int) -> None:
    """In the child: a step, and what it took."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForMaskedLM, BertConfig

    from mlmkit.model import MaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = MaskedLM(AutoModelForMaskedLM.from_config(config))

    def loss(rows: int, length: int) -> torch.Tensor:
        """The mean over every seventh token of `rows` rows."""
        input_ids = torch.arange(rows * length).view(rows, length) % vocabulary
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        positions = torch.arange(0, rows * length, 7)
        targets = (positions * 31) % vocabulary
        if way == "slices":
            return model.loss_sum(positions, targets, **inputs) / len(targets)
        if way == "gathered":
            return F.cross_entropy(model.logits(positions, **inputs), targets)
        labels = torch.full((rows * length,), -100)
        labels[positions] = targets
        return F.cross_entropy(model.network(**inputs).logits.flatten(0, 1), labels)

    loss(1, 8).backward()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    value = loss(tokens // 128, 128)
    value.backward()
    print(f"{(status('VmHWM') - before) / 1024:.0f} {value.item():.5f}")  # noqa: T201


def status(name: str) -> int:
    """A field of this process in KiB. Not ru_maxrss, which a process inherits from the one that started it."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0])


if __name__ == "__main__":
    main()
