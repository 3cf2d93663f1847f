"""Held-out masked cross-entropy of variants of the demo's training recipe: what docs/decisions.md quotes.

About two minutes a variant on two cores, or `--names` some of them.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from harness import Report, Table, main, say

from mlmkit.backends import load
from mlmkit.demo import demo_config, prepare_text, unigram_entropy
from mlmkit.documents import Source
from mlmkit.eval.api import evaluate
from mlmkit.masking import MaskRecipe
from mlmkit.train.config import Config
from mlmkit.train.loop import train

ARCHITECTURE = {
    "model_type": "bert",
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "hidden_dropout_prob": 0.0,
}


def variants(config: Config, folder: Path) -> dict[str, Config]:
    """The table's rows."""

    def architecture(name: str, **changes: object) -> Config:
        path = folder / f"{name}.json"
        path.write_text(json.dumps(ARCHITECTURE | changes))
        return replace(config, model=replace(config.model, architecture=str(path)))

    def masking(config: Config, mask_prob: float) -> Config:
        return replace(config, masking=MaskRecipe(mask_prob=mask_prob))

    dropout = architecture("dropout", hidden_dropout_prob=0.1)
    base, less = masking(dropout, 0.15), masking(config, 0.3)
    smaller = replace(config.train, steps=1800, global_batch_tokens=1024, micro_batch_tokens=1024)
    return {
        "dropout-0.15": base,
        "dropout-0.15-lr5e-3": replace(base, optim=replace(config.optim, lr=5e-3)),
        "dropout-0.15-batch1024": replace(base, train=smaller),
        "dropout-0.30": masking(dropout, 0.3),
        "0.30": less,
        "0.30-4heads": masking(architecture("heads", num_attention_heads=4), 0.3),
        "0.30-lr4e-3": replace(less, optim=replace(config.optim, lr=4e-3, warmup_steps=200)),
        "0.40": config,
    }


def measure(options: argparse.Namespace) -> Report:
    """A row a variant: one whole training, and an evaluation."""
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train_text, heldout_text = prepare_text(folder, None)
        for name, config in variants(demo_config(train_text), folder).items():
            if any(options.names) and name not in options.names:
                continue
            if options.steps:
                config = replace(config, train=replace(config.train, steps=options.steps))
            began = time.perf_counter()
            model = load(str(train(config, folder / name)))
            seconds = time.perf_counter() - began
            measured = evaluate(model, Source(str(heldout_text))).metrics["masked_cross_entropy"]
            entropy = unigram_entropy(train_text, heldout_text, model.tokenizer)
            figures[name] = {**measured, "unigram": entropy, "seconds": seconds}
            interval = f"{measured['value']:.3f} [{measured['low']:.3f}, {measured['high']:.3f}]"
            rows.append([name, interval, f"{entropy:.3f}", f"{seconds:.0f}"])
            say(" ".join(rows[-1]))
    header = ["variant", "held-out masked cross-entropy, nats", "unigram entropy", "seconds"]
    return Report([Table("", header, rows)], figures=figures)


if __name__ == "__main__":
    main(__doc__, measure, names=(("",), ("0.40",)), steps=(0, 20))
