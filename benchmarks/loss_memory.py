"""Peak memory of one forward and backward at a large vocabulary: logits everywhere, at the masked tokens, in slices.

A BERT of one layer with random weights, one in seven tokens masked, each way in a process of its own. Shown: how far
the resident memory rises during the step, and the loss, which must be the same for all. A warm-up step on a row of 8
tokens allocates what stays: the gradients and the libraries' own buffers. The floor is one float32 copy of the logits
that a way computes.
"""

import argparse
from pathlib import Path

from harness import Report, main, table
from processes import isolated, memory_mib

WAYS = {
    "everywhere": "logits of every token, cross-entropy at the masked ones",
    "gathered": "logits of the masked tokens",
    "slices": "the same in slices, as mlmkit trains",
}
EVERY = 7  # one in seven tokens is masked


def measure(options: argparse.Namespace) -> Report:
    sizes = (options.vocabulary, options.tokens, options.hidden)
    steps = {way: isolated(step, way, *sizes) for way in WAYS}
    losses = [loss for _, loss in steps.values()]
    assert max(losses) - min(losses) < 1e-3, steps
    logits = options.tokens * options.vocabulary * 4 / 2**20
    floors = {"everywhere": logits, "gathered": logits / EVERY, "slices": 0.0}
    rows = [
        {"": WAYS[way], "peak above the start, MiB": peak, "logits once, MiB": floors[way], "loss": f"{loss:.4f}"}
        for way, (peak, loss) in steps.items()
    ]
    return Report(
        [table("", rows)],
        [f"Vocabulary of {options.vocabulary:,}, {options.tokens:,} tokens, hidden size {options.hidden}."],
        {"loss_memory_ratio": steps["everywhere"][0] / steps["slices"][0]},
        figures=steps,
    )


def step(way: str, vocabulary: int, tokens: int, hidden: int) -> tuple[float, float]:
    """The memory of a step in MiB and its loss, in a process of its own."""
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
        """The mean over one in seven tokens of `rows` rows."""
        input_ids = torch.arange(rows * length).view(rows, length) % vocabulary
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        positions = torch.arange(0, rows * length, EVERY)
        targets = (positions * 31) % vocabulary
        if way == "slices":
            return model.loss_sum(positions, targets, **inputs) / len(targets)
        if way == "gathered":
            return F.cross_entropy(model.logits(positions, **inputs), targets)
        labels = torch.full((rows * length,), -100)
        labels[positions] = targets
        return F.cross_entropy(model.network(**inputs).logits.flatten(0, 1), labels)

    loss(1, 8).backward()
    before = memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    value = loss(tokens // 128, 128)
    value.backward()
    return memory_mib() - before, value.item()


if __name__ == "__main__":
    main(__doc__, measure, vocabulary=(64_000, 2_000), tokens=(8192, 512), hidden=(256, 64))
