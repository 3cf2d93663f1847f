"""Training on a GPU: mlmkit beside transformers.Trainer, and two experiments with a step on a pack."""

import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import inputs
import torch
import train_vs_transformers as trainings
from gpu_models import load_model, pack_of
from gpu_timing import FAILED, NEEDS_GPU, Alternative, Figures, Row, Setting, attempt, compared, failure
from harness import SkippedError, ratios
from processes import contestants
from torch.nn import attention

from mlmkit.model import encoder_layers
from mlmkit.packing import enable_packing
from mlmkit.train.cost import dry_run, peak_flops

STEPS, TRAINING_ROUNDS = 8, 2
# Per step. 16: the longest paragraph pads its whole batch.
MICRO_BATCHES = {trainings.MLMKIT: 4, trainings.RUN_MLM: 4, trainings.PARAGRAPHS: 16}


def training(setting: Setting) -> Iterator[Row]:
    """The contestants of train_vs_transformers.py except "by length", with fixed micro-batches, as trials take long.

    MFU is the model's operations per token (`mlmkit.train.cost.flops_per_token`) at the measured tokens per second,
    over the rate of bfloat16 matrix products, measured and nominal. What a contestant computes beyond that, such as
    logits of every token, lowers its MFU.
    """
    text = inputs.write_lines(inputs.kept_folder() / "train.txt", inputs.documents()[: 100 if setting.quick else None])
    for case in trainings.GPU_CASES:
        case = replace(case, length=64, step_tokens=1024) if setting.quick else case
        title = f"{case.architecture} at {case.length}"
        try:
            for name, figures in _training_case(setting, case, text):
                yield f"{title}, {name}", figures
        except Exception as error:
            yield title, failure(error)


def _training_case(setting: Setting, case: trainings.Case, text: Path) -> Iterator[Row]:
    tokenizer, architecture = inputs.tokenizer_folder(), case.architecture
    if setting.quick:
        architecture = trainings.tiny_architecture(case, inputs.kept_folder())
    operations = dry_run(trainings.mlmkit_config(case, text, tokenizer, architecture, setting.device))[
        ""
    ].flops_per_token
    steps, ways = (2, [trainings.MLMKIT, trainings.RUN_MLM]) if setting.quick else (STEPS, list(MICRO_BATCHES))
    if not find_spec("accelerate"):
        yield "Trainer", {FAILED: "needs accelerate: pip install accelerate"}
        ways = [trainings.MLMKIT]
    makers = {
        way: (trainings.open_contestant, case, text, tokenizer, architecture, way, setting.device) for way in ways
    }
    with contestants(makers) as started:
        turns = {way: partial(started[way].call, operator.call, MICRO_BATCHES[way], steps) for way in started}
        yield from _training_rounds(setting, turns, operations)


def _training_rounds(setting: Setting, turns: dict[str, Any], operations: float) -> Iterator[Row]:
    """Rows are yielded again after each turn. A contestant that fails takes no further turn; the others do."""
    rates = {"measured": setting.rates.get("bfloat16", 0.0), "nominal": peak_flops(setting.name)}
    speeds: dict[str, list[float]] = {way: [] for way in turns}
    for _ in range(1 if setting.quick else TRAINING_ROUNDS):
        for way in list(turns):
            turn = attempt(turns[way])
            if isinstance(turn, dict):
                yield way, turn
                del turns[way]
                continue
            speeds[way].append(turn.rate)
            speed, ours = median(speeds[way]), speeds[trainings.MLMKIT]
            is_even = len(ours) == len(speeds[way])
            yield (
                way,
                {
                    "real tokens/s": speed,
                    "mlmkit is x times as fast": median(ratios(speeds[way], ours)) if is_even else None,
                    **{f"MFU, {kind}": speed * operations / rate if rate else None for kind, rate in rates.items()},
                    "model operations per token, G": operations / 1e9,
                    "loss per step": turn.loss,
                    "peak GiB": turn.peak_gib,
                },
            )


def step_on_pack(setting: Setting, prepare: Callable[[Any], None] = lambda _: None) -> Alternative:
    """Forward and backward of BERT-base on a pack of fixed shape, under bfloat16 autocast."""
    model = load_model(setting.checkpoint("bert-base"), "cpu", "float32")
    if not enable_packing(model):
        raise SkippedError("bert-base cannot be packed")
    model.to(setting.device).train()
    prepare(model)
    batch = inputs.real_batch(*((4, 64) if setting.quick else (64, 512)), ragged=True)
    packed, positions = pack_of(batch, model, setting.device)
    targets = torch.from_numpy(batch.targets).to(setting.device)

    def step() -> Any:
        with torch.autocast(setting.device, torch.bfloat16):
            loss = model.loss_sum(positions, targets, **packed) / len(targets)
        loss.backward()
        model.zero_grad()
        return loss.detach()

    return Alternative(step, int(batch.attention_mask.sum()), figures={"loss": float(step())})


def autotune(setting: Setting) -> Iterator[Row]:
    """Eager, compiled as mlmkit does, and with every kernel chosen by trial."""

    def compile_layers(mode: str, model: Any) -> None:
        for layer in encoder_layers(model):
            layer.compile(**({"mode": mode} if setting.device == "cuda" else {"backend": "aot_eager"}))

    makers = {"eager": partial(step_on_pack, setting)}
    for name, mode in {"compiled": "default", "compiled, autotuned": "max-autotune-no-cudagraphs"}.items():
        makers[name] = partial(step_on_pack, setting, partial(compile_layers, mode))
    yield from compared(setting, makers, "compiled")


def flash(setting: Setting) -> Iterator[Row]:
    """torch's own kernel behind `varlen_attn`, then each FlashAttention that torch knows (3 and 4)."""
    if not hasattr(attention, "activate_flash_attention_impl"):
        raise SkippedError(f"torch {torch.__version__} has no activate_flash_attention_impl")
    made = step_on_pack(setting)
    default = setting.seconds_per_call(made.call)

    def activated(name: str) -> Figures:
        if setting.device == "cpu":
            raise SkippedError(NEEDS_GPU)
        attention.activate_flash_attention_impl(name)  # deactivates the previous one
        return made.speed([setting.seconds_per_call(made.call)], [default]) | {"loss": float(made.call())}

    yield "torch's own", made.speed([default], [default])
    for name in attention.list_flash_attention_impls():
        yield name, attempt(activated, name)
    if attention.current_flash_attention_impl() and hasattr(attention, "restore_flash_attention_impl"):
        attention.restore_flash_attention_impl()
