"""Parity on a GPU: packed and padded, compiled and eager, GPU and CPU must give the same log-probabilities."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import inputs
import numpy as np
import torch
from gpu_models import load_model, on_device, pack_of
from gpu_timing import Figures, LogProbs, Row, Setting, attempt
from harness import SkippedError

from mlmkit.backends import Batch
from mlmkit.export.parity import BOUNDS
from mlmkit.packing import PACKED_ATTENTION, enable_packing
from mlmkit.train.step import compile_layers

AUTOCAST = "bfloat16 autocast"  # what training computes in
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", AUTOCAST: "bf16", "float16": "fp16"}
COMPILED_LAYOUTS = {"bfloat16": "padded", AUTOCAST: "packed"}  # as evaluation and training run
CPU = "cpu padded float32"


def parity(setting: Setting) -> Iterator[Row]:
    """Log-probabilities of masked tokens in ragged rows of up to 512, within the bounds of the export's report.

    Each precision, padded and packed, is compared with the CPU in float32; packed with padded and compiled with eager
    in the same precision. BERT-base and ModernBERT-base (sliding window, rotary positions), random weights.
    """
    for architecture in ("bert-base", "modernbert-base"):
        results: dict[str, LogProbs | Figures] = {}
        for name, dtype, others, run in _parity_runs(setting, architecture):
            if name in results:  # on a CPU, where a run may be the reference itself
                continue
            results[name] = attempt(run)
            for other in others:
                if other != name:
                    difference = log_prob_difference(results[name], results[other], PRECISIONS[dtype])
                    yield f"{architecture}, {name}, with {other}", difference


def _parity_runs(setting: Setting, architecture: str) -> Iterator[tuple[str, str, list[str], Callable[[], LogProbs]]]:
    """Name, dtype, names to compare with, and the run. They share models, so run each before taking the next."""
    path, device = setting.checkpoint(architecture), setting.device
    batch = inputs.real_batch(*((4, 160) if setting.quick else (16, 512)), ragged=True)
    model = load_model(path, "cpu", "float32")
    padded = model.network.config._attn_implementation
    yield CPU, "float32", [], partial(_log_probs, model, batch, padded)
    if not enable_packing(model):
        raise SkippedError(f"{architecture} cannot be packed")
    yield "cpu packed float32", "float32", [CPU], partial(_log_probs, model, batch, PACKED_ATTENTION)
    for dtype in PRECISIONS:
        cast = load_model(path, device, "float32" if dtype == AUTOCAST else dtype)
        run = partial(_log_probs, cast, batch, autocast=dtype == AUTOCAST)
        name = f"{device} {{}} {dtype}"
        yield name.format("padded"), dtype, [CPU], partial(run, padded)
        if dtype != "float32":  # `varlen_attn` on CUDA takes no float32
            others = [CPU, name.format("padded")]
            yield name.format("packed"), dtype, others, partial(run, PACKED_ATTENTION)
        if layout := COMPILED_LAYOUTS.get(dtype):
            compile_layers(cast, backend="inductor" if device == "cuda" else "aot_eager")
            attention = padded if layout == "padded" else PACKED_ATTENTION
            yield f"{name.format(layout)} compiled", dtype, [name.format(layout)], partial(run, attention)


def _log_probs(model: Any, batch: Batch, attention: str, autocast: bool = False) -> LogProbs:
    """The targets' log-probabilities, from a pack of fixed shape if `attention` is the packed one."""
    model.network.set_attn_implementation(attention)
    device = str(model.device.type)
    input_ids, attention_mask, positions, targets = on_device(batch, device)
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    if attention == PACKED_ATTENTION:
        inputs, positions = pack_of(batch, model, device)
    context = torch.autocast(device, torch.bfloat16) if autocast else nullcontext()
    with torch.no_grad(), context:
        logits = model.logits(positions, **inputs).float()
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1).cpu().numpy()


def log_prob_difference(ours: LogProbs | Figures, expected: LogProbs | Figures, precision: str) -> Figures:
    """The difference in nats, and whether it is within the export's bounds in that precision, or the failure of one."""
    if isinstance(ours, dict) or isinstance(expected, dict):
        return ours if isinstance(ours, dict) else dict(expected)
    bounds = BOUNDS[precision]
    apart = np.subtract(expected, ours, dtype=np.float64)
    largest, mean, shift = float(np.abs(apart).max()), float(np.abs(apart).mean()), float(apart.mean())
    within = largest <= bounds.max_log_prob and mean <= bounds.mean_log_prob and abs(shift) <= bounds.cross_entropy
    return {
        "max Δ log P": largest,
        "mean": mean,
        "Δ cross-entropy": shift,
        "bounds": ", ".join(f"{bound:g}" for bound in bounds),
        "within bounds": "yes" if within else "NO",
    }
