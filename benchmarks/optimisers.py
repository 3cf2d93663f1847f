"""Held-out masked cross-entropy of training settings, for the same tokens: what the defaults were chosen by.

A small BERT on the first documents of the text (English Wikipedia, for what docs/decisions.md quotes), one run after
another, several minutes each. What is finished in `--output FOLDER` is not done again.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import Report, Table, main, say
from material import documents, held_out, write_lines

from mlmkit.backends import load
from mlmkit.documents import Source, read_documents
from mlmkit.eval.api import evaluate
from mlmkit.model import MaskedLM
from mlmkit.train import loop
from mlmkit.train.config import (
    Config,
    DataConfig,
    MaskingConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TokenizerConfig,
)
from mlmkit.train.optim import Muon
from mlmkit.train.tokenizer import train_tokenizer

HELD_OUT_DOCUMENTS = 1000
AVERAGES = (0.95, 0.98, 0.99)  # of the weights: decay a step


def variants(config: Config) -> dict[str, Config]:
    """The table's rows, by what is not the default.

    -original has Muon's own scaling, lr 0.02, beside AdamW's `optim.lr`; -zero-bias begins with the head's bias at zero
    instead of the tokens' log frequencies.
    """

    def optim(config: Config, **changes: object) -> Config:
        return replace(config, optim=replace(config.optim, **changes))  # pyright: ignore[reportArgumentType]

    def masked(config: Config, rate: float, final: float | None = None) -> Config:
        return replace(config, masking=MaskingConfig(rate, final))

    adamw, muon = optim(config, name="adamw", lr=1e-3), optim(config, name="muon", lr=5e-3)
    return {
        "adamw-1e-3": adamw,
        "adamw-2e-3": optim(adamw, lr=2e-3),
        "adamw-4e-3": optim(adamw, lr=4e-3),
        "muon-2e-3": optim(muon, lr=2e-3),
        "muon-5e-3": muon,
        "muon-1e-2": optim(muon, lr=1e-2),
        "muon-2e-3-original": optim(muon, lr=2e-3),
        "muon-5e-3-original": muon,
        "muon-5e-3-0.30": masked(muon, 0.3),
        "muon-5e-3-0.40": masked(muon, 0.4),
        "muon-5e-3-0.30-to-0.15": masked(muon, 0.3, 0.15),
        "adamw-1e-3-0.30": masked(adamw, 0.3),
        "muon-5e-3-cosine": optim(muon, schedule="cosine"),
        "muon-5e-3-wsd": optim(muon, schedule="wsd"),
        "muon-5e-3-decay-0.1": optim(muon, weight_decay=0.1),
        "muon-5e-3-beta2-0.95": optim(muon, beta2=0.95),
        "muon-5e-3-zero-bias": muon,
        "adamw-2e-3-zero-bias": optim(adamw, lr=2e-3),
    }


class Averages:
    """Exponential averages of a model's weights, from the first step on, taken along by a hook of the optimiser."""

    def __init__(self) -> None:
        self.model: MaskedLM | None = None
        self.of: dict[float, list[torch.Tensor]] = {}
        self.steps = 0

    def follow(self, model: MaskedLM, optimizer: torch.optim.Optimizer) -> None:
        """Take a model's weights in after each step."""
        self.model = model
        optimizer.register_step_post_hook(lambda *_: self._take())

    @torch.no_grad()
    def _take(self) -> None:
        assert self.model is not None
        self.steps += 1
        now = [parameter.detach() for parameter in self.model.parameters()]
        for decay in AVERAGES:
            averages = self.of.setdefault(decay, [torch.zeros_like(each) for each in now])
            # With (1 + n) / (10 + n) at first, as Polyak averaging in TensorFlow has it: no bias to the random start.
            weight = 1 - min(decay, (1 + self.steps) / (10 + self.steps))
            for average, value in zip(averages, now, strict=True):
                average.lerp_(value, weight)

    @torch.no_grad()
    def save(self, decay: float, run: Path, folder: Path) -> None:
        """A checkpoint with averaged weights."""
        assert self.model is not None
        shutil.copytree(run / "model", folder, dirs_exist_ok=True)
        for parameter, average in zip(self.model.parameters(), self.of[decay], strict=True):
            parameter.copy_(average)
        self.model.network.save_pretrained(folder)


@contextmanager
def patched(averages: Averages, *, original: bool, zero_bias: bool) -> Iterator[None]:
    """`loop.train` with averages, and with Muon's own scaling and a zero bias at first if asked for."""
    build = loop.build_optimizers

    def build_optimizers(model: MaskedLM, config: OptimConfig) -> list[torch.optim.Optimizer]:
        optimizers = build(model, config)
        for optimizer in optimizers:
            for group in optimizer.param_groups if original and isinstance(optimizer, Muon) else []:
                group["adjust_lr_fn"], group["initial_lr"] = "original", 0.02
        if zero_bias:
            decoder: Any = model.network.get_output_embeddings()
            decoder.bias.data.zero_()
        averages.follow(model, optimizers[-1])
        return optimizers

    loop.build_optimizers = build_optimizers
    try:
        yield
    finally:
        loop.build_optimizers = build


def run_variant(name: str, config: Config, folder: Path, held_out: list[str], *, averaged: bool) -> dict:
    """Train and evaluate; the averages too if asked for. A run that was cut off begins again."""
    run, averages = folder / name, Averages()
    shutil.rmtree(run, ignore_errors=True)
    began = time.perf_counter()
    original, zero_bias = name.endswith("-original"), name.endswith("-zero-bias")
    with patched(averages, original=original, zero_bias=zero_bias):
        models = {"": loop.train(config, run)}
    seconds = time.perf_counter() - began
    if averaged:
        for decay in AVERAGES:
            averages.save(decay, run, run / f"average-{decay}")
            models[f" average {decay}"] = run / f"average-{decay}"
    losses = {
        which: evaluate(load(str(model), "torch", config.train.device), held_out).metrics["masked_cross_entropy"]
        for which, model in models.items()
    }
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {"held_out": losses, "tokens": sum(line["tokens"] for line in lines), "seconds": seconds}


def base_config(options: argparse.Namespace, folder: Path) -> Config:
    """Text and tokenizer made once, and the settings that all variants share."""
    tokenizer, text = folder / "tokenizer", folder / "train.txt"
    if not text.exists():
        write_lines(text, documents()[: options.documents])
    if not tokenizer.exists():
        wanted = TokenizerConfig(vocab_size=options.vocabulary)
        train_tokenizer(lambda: read_documents(Source(str(text))), wanted, options.length).save_pretrained(tokenizer)
    return Config(
        data=DataConfig(train=(str(text),)),
        tokenizer=TokenizerConfig(path=str(tokenizer)),
        model=ModelConfig(architecture=options.architecture, max_length=options.length),
        optim=OptimConfig(warmup_steps=max(options.steps // 10, 1)),
        train=RunConfig(
            steps=options.steps,
            global_batch_tokens=options.batch_tokens,
            micro_batch_tokens=min(options.batch_tokens, 8192),
            save_every=options.steps,
            device=options.device,
        ),
    )


def measure(options: argparse.Namespace) -> Report:
    """Run what is missing; a row a variant."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.output or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        held = held_out()[:HELD_OUT_DOCUMENTS]
        rows, figures = [], {}
        for name, variant in variants(base_config(options, folder)).items():
            if any(options.names) and name not in options.names:
                continue
            result = folder / f"{name}.json"
            if not result.exists():
                averaged = name in options.average
                result.write_text(json.dumps(run_variant(name, variant, folder, held, averaged=averaged)))
            found = figures[name] = json.loads(result.read_text())
            for which, loss in found["held_out"].items():
                interval = f"{loss['value']:.3f} [{loss['low']:.3f}, {loss['high']:.3f}]"
                rows.append([name + which, interval, f"{found['tokens'] / 1e6:.2f}", f"{found['seconds']:.0f}"])
                say(" ".join(rows[-1]))
    header = ["variant", "held-out masked cross-entropy, nats", "M tokens", "seconds"]
    return Report([Table("", header, rows)], figures=figures)


if __name__ == "__main__":
    main(
        __doc__,
        measure,
        names=(("",), ("adamw-1e-3", "muon-5e-3-original")),
        average=(("muon-5e-3-wsd",), ("adamw-1e-3",)),  # rows that are averaged too
        output=("", ""),
        architecture=("bert-tiny", "bert-tiny"),
        device=("cpu", "cpu"),
        documents=(30_000, 300),
        vocabulary=(8192, 1000),
        length=(128, 64),
        steps=(600, 4),
        batch_tokens=(2048, 512),
    )
