"""Sections of gpu.py: what the device can do, and how much of that torch evaluation reaches.

A BERT-base shape with random weights, in bfloat16 and float16, eager, compiled, and recorded as a CUDA graph
(`Captured`), with the inputs on the device. Two kinds of work: masked cross-entropy of full rows of 512 tokens, and
pseudo-log-likelihood, copies of a sentence with one mask each.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from engines import matrix_rate
from gpu_export import operations
from gpu_shared import NEEDS_GPU, Captured, Figures, Made, Row, Setting, attempt, compared, compiled, seconds_a_call
from harness import SkippedError
from inputs import bert_tokenizer, real_batch, sentences

from mlmkit.backends import Batch

RATES = {"bfloat16": "bfloat16", "float16": "float16", "tf32": "float32", "float32": "float32"}
DEFAULT = "bfloat16, eager"


# ---------------------------------------------------------------- the device


def device_rates(setting: Setting) -> Iterator[Row]:
    """Matrix products in each precision, beside the data sheet's where known; copies."""
    for name in RATES:
        yield attempt(name, _rate, setting, name)
    for name, places in {
        "device to device": ("device", "device"),
        "host to device, pinned": ("pinned", "device"),
        "device to host, pinned": ("device", "pinned"),
    }.items():
        yield attempt(name, _bandwidth, setting, *places)


def _rate(setting: Setting, name: str) -> Figures:
    import torch

    from mlmkit.train.estimate import peak_flops

    if name in ("tf32", "float16") and setting.device == "cpu":  # which has none, or works it out the long way
        raise SkippedError(NEEDS_GPU)
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    rate = matrix_rate(setting.device, RATES[name])
    nominal = peak_flops(setting.name) if name == "bfloat16" else 0.0
    return {
        "TFLOP/s": rate / 1e12,
        "nominal TFLOP/s": nominal / 1e12 if nominal else None,
        "of the nominal": rate / nominal if nominal else None,
    }


def _bandwidth(setting: Setting, source: str, target: str) -> Figures:
    """Bytes read and written where both are on the device, else bytes that cross."""
    import torch

    if setting.device == "cpu" and source != target:
        raise SkippedError(NEEDS_GPU)
    size = 1 << 20 if setting.quick else 1 << 30

    def memory(place: str) -> Any:
        pinned = place == "pinned"
        return torch.ones(size, dtype=torch.uint8, device="cpu" if pinned else setting.device, pin_memory=pinned)

    kept, given = memory(target), memory(source)
    seconds = seconds_a_call(lambda: kept.copy_(given, non_blocking=True), setting.device)
    return {"GB/s": (1 + (source == target)) * size / seconds / 1e9}


# ---------------------------------------------------------------- evaluation


def evaluation(setting: Setting) -> Iterator[Row]:
    """Both kinds of work, every precision and way; first whether operations are counted right."""
    path = setting.checkpoint("bert-base")
    batches = {
        "masked": real_batch(*((2, 64) if setting.quick else (64, 512))),
        "pseudo": pseudo_batch(4 if setting.quick else 100, 20),
    }
    counted = attempt("operations", _counted, path, real_batch(2, 64))
    yield counted
    models = {dtype: load_model(path, setting.device, dtype) for dtype in ("float32", "bfloat16", "float16")}
    for work, batch in batches.items():
        shape = f"{work} {batch.input_ids.shape[0]} x {batch.input_ids.shape[1]}"
        inputs = on_device(batch, setting.device)
        expected = scorer(models["float32"])(*inputs)
        made = partial(_made, setting, batch, inputs, expected, operations(path, batch))
        makers: dict[str, Callable[[], Made]] = {}
        for dtype, model in models.items():
            score = scorer(model)
            makers[f"{dtype}, eager"] = partial(made, dtype, lambda score=score: score)
            if dtype != "float32":
                faster = scorer(compiled(model, setting.device))
                makers[f"{dtype}, compiled"] = partial(made, dtype, lambda faster=faster: faster)
                makers[f"{dtype}, captured"] = partial(made, dtype, partial(Captured, score, inputs))
                makers[f"{dtype}, compiled, captured"] = partial(made, dtype, partial(Captured, faster, inputs))
        for name, figures in compared(setting, makers, DEFAULT):
            yield f"{shape}, {name}", figures


def _made(
    setting: Setting,
    batch: Batch,
    inputs: list[Any],
    expected: Any,
    operations: float,
    dtype: str,
    make: Callable[[], Callable[..., Any]],
) -> Made:
    score = make()
    apart = float((score(*inputs) - expected).abs().max())
    return Made(
        lambda: score(*inputs),
        batch.input_ids.size,
        len(batch.input_ids),
        operations,
        setting.rates.get(dtype, 0.0),
        {"max Δ log P from float32": apart},
    )


def _counted(path: Path, batch: Batch) -> Figures:
    """The formula's operations against those that torch counts, which needs an attention of plain products for that."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = load_model(path, "cpu", "float32")
    model.network.set_attn_implementation("eager")
    input_ids, attention_mask, positions, _ = on_device(batch, "cpu")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(positions, input_ids=input_ids, attention_mask=attention_mask)
    ratio = operations(path, batch) / counter.get_total_flops()
    assert abs(ratio - 1) < 0.01, f"the formula gives {ratio:.3f} x the operations that torch counts"
    return {"by formula, G": operations(path, batch) / 1e9, "of those that torch counts": ratio}


def load_model(path: Path, device: str, dtype: str) -> Any:
    """`MaskedLM`, in evaluation mode."""
    import torch

    from mlmkit.pretrained import load_pretrained

    model, _ = load_pretrained(str(path))
    torch.set_float32_matmul_precision("highest")
    return model.to(device, getattr(torch, dtype))


def scorer(model: Any) -> Callable[..., Any]:
    """The targets' log-probabilities, from the tensors of a `Batch`."""
    import torch

    def score(*inputs: Any) -> Any:
        with torch.inference_mode():
            return model(*inputs).log_prob

    return score


def on_device(batch: Batch, device: str) -> list[Any]:
    """As tensors."""
    import torch

    return [torch.from_numpy(values).to(device) for values in batch]


def pseudo_batch(count: int, tokens: int) -> Batch:
    """Sentences cut at so many wordpieces, each as often as it has some, every time with another one hidden."""
    tokenizer: Any = bert_tokenizer()
    lines = tokenizer(sentences(4 * count, tokens + 2, tokenizer), add_special_tokens=False)["input_ids"]
    rows = np.array(
        [[tokenizer.cls_token_id, *ids[:tokens], tokenizer.sep_token_id] for ids in lines if len(ids) >= tokens]
    )
    input_ids = np.repeat(rows[:count].astype(np.int64), tokens, axis=0)
    row = np.arange(len(input_ids))
    column = 1 + row % tokens
    targets = input_ids[row, column]
    input_ids[row, column] = tokenizer.mask_token_id
    return Batch(input_ids, np.ones_like(input_ids), row * input_ids.shape[1] + column, targets)
