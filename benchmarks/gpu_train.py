"""A section of gpu.py: training, mlmkit against transformers.Trainer, in real tokens a second and in model operations.

The GPU's cases of train_vs_transformers.py, with steps half as large and one size of micro-batch, as there is no time
for trials; Trainer as run_mlm.py feeds it, full rows, and on padded paragraphs. The vocabulary is that of inputs.py.

MFU is the operations that the model needs for a token, by `mlmkit.train.estimate.flops_per_token` (six for each weight
of the encoder's matrices, those of the head for masked tokens only, and attention), at the tokens a second found, over
the rate of bfloat16 matrix products: the measured one, and the data sheet's. What a contestant computes beyond them,
logits of every token for example, is its loss.
"""

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from gpu_shared import FAILED, Row, Setting, attempt, failure
from harness import Contestant, memory_mib, ratios
from inputs import TINY, documents, kept_folder, tokenizer_folder, write_lines

from mlmkit.train.config import Config

STEP_TOKENS, STEPS, ROUNDS = 1 << 17, 8, 2
MLMKIT, NEEDS_ACCELERATE = "mlmkit", "needs accelerate: pip install accelerate"
PADDED = "Trainer, paragraphs"
MICRO_BATCHES = {MLMKIT: 4, "Trainer, run_mlm.py": 4, PADDED: 16}  # the longest row pads a batch


def training(setting: Setting) -> Iterator[Row]:
    """Both architectures, rows anew with each turn."""
    from train_vs_transformers import CASES

    text = write_lines(kept_folder() / "train.txt", documents()[: 100 if setting.quick else None])
    for case in CASES["cuda"]:
        case = replace(case, **({"length": 64, "step_tokens": 1024} if setting.quick else {"step_tokens": STEP_TOKENS}))
        title = f"{case.architecture} at {case.length}"
        try:
            for name, figures in _case(setting, case, text):
                yield f"{title}, {name}", figures
        except Exception as error:
            yield title, failure(error)


def _case(setting: Setting, case: Any, text: Path) -> Iterator[Row]:
    from train_vs_transformers import mlmkit_config, rows_for_trainer

    architecture, tokenizer = case.architecture, tokenizer_folder()
    if setting.quick:
        path = kept_folder() / f"{architecture}.json"
        path.write_text(json.dumps(TINY | {"model_type": architecture.split("-")[0]}))
        architecture = str(path)
    config = mlmkit_config(case, text, tokenizer, setting.device, architecture)
    operations = operations_a_token(config)
    steps = 2 if setting.quick else STEPS
    processes = {MLMKIT: Contestant(_nothing)}
    turns: dict[str, Callable[[], tuple[Any, float]]] = {
        MLMKIT: partial(processes[MLMKIT].call, mlmkit_turn, config, MICRO_BATCHES[MLMKIT], steps)
    }
    for way, division in list(MICRO_BATCHES.items())[1:]:
        if setting.quick and way == PADDED:
            continue
        if not find_spec("accelerate"):
            yield way, {FAILED: NEEDS_ACCELERATE}
            continue
        processes[way] = Contestant(rows_for_trainer, case, text, tokenizer, architecture, way)
        turns[way] = partial(processes[way].call, trainer_turn, case, way, setting.device, division, steps)
    try:
        yield from _rounds(setting, turns, operations)
    finally:
        for process in processes.values():
            process.stop()


def _rounds(setting: Setting, turns: dict[str, Callable[[], tuple[Any, float]]], operations: float) -> Iterator[Row]:
    """A contestant that fails is out; the others go on."""
    from mlmkit.train.estimate import peak_flops

    rates = {"measured": setting.rates.get("bfloat16", 0.0), "nominal": peak_flops(setting.name)}
    speeds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(1 if setting.quick else ROUNDS):
        for name in list(turns):
            row = attempt(name, turns[name])
            if isinstance(row[1], dict):
                yield row
                del turns[name]
                continue
            turn, gib = row[1]
            speeds[name].append(turn.rate)
            speed, ours = median(speeds[name]), speeds[MLMKIT]
            faster = median(ratios(speeds[name], ours)) if len(ours) == len(speeds[name]) else None
            yield (
                name,
                {
                    "real tokens/s": speed,
                    "mlmkit is x times as fast": faster,
                    **{f"MFU, {kind}": speed * operations / rate if rate else None for kind, rate in rates.items()},
                    "model operations a token, G": operations / 1e9,
                    "loss a step": turn.loss,
                    "peak GiB": gib,
                },
            )


def operations_a_token(config: Config) -> float:
    """Forward and backward, in documents as long as those of the text."""
    from mlmkit.train.dry_run import dry_run

    return dry_run(config).flops_per_token


# ---------------------------------------------------------------- turns, each in its contestant's process


def mlmkit_turn(_: None, config: Config, division: int, steps: int) -> tuple[Any, float]:
    """As `mlmkit train` runs; and the peak of the device's memory."""
    from train_vs_transformers import train_with_mlmkit

    return _with_peak(partial(train_with_mlmkit, config, division, steps))


def trainer_turn(rows: Any, case: Any, way: str, device: str, division: int, steps: int) -> tuple[Any, float]:
    """The same by Trainer."""
    from train_vs_transformers import train_with_trainer

    return _with_peak(partial(train_with_trainer, rows, case, way, device, division, steps))


def _with_peak(train: Callable[[], Any]) -> tuple[Any, float]:
    import torch

    turn = train()
    if not torch.cuda.is_available():
        return turn, memory_mib() / 1024
    gib = torch.cuda.max_memory_allocated() / 2**30
    gc.collect()
    torch.cuda.empty_cache()  # the contestants share the GPU
    return turn, gib


def _nothing() -> None:
    """What mlmkit's process keeps between turns."""
