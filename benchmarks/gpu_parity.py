"""A section of gpu.py: whether all ways to run a model say the same.

BERT-base and ModernBERT-base (sliding window, rotary positions) with random weights, rows of text of any length up to
512. Compared are the masked tokens' log-probabilities, in the terms and within the bounds of the export's report:

- each precision, padded and packed, with the CPU in float32, whose rows are padded,
- packed with padded, and compiled with eager, in the same precision.

Packed attention is `varlen_attn` on CUDA, which takes no float32. `bfloat16 autocast` is what training computes in.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
from engines import worst_difference
from gpu_eval import load_model, on_device
from gpu_shared import Figures, Row, Setting, attempt
from harness import SkippedError
from inputs import real_batch
from numpy.typing import NDArray

from mlmkit.backends import Batch

PACKED, AUTOCAST = "mlmkit_packed", "bfloat16 autocast"
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", AUTOCAST: "bf16", "float16": "fp16"}
COMPILED = (("padded", "bfloat16"), ("packed", AUTOCAST))  # as evaluation and training run
REFERENCE = ("cpu", "padded", "float32", "eager")

LogProbs = NDArray[np.float32]
Key = tuple[str, str, str, str]  # device, layout, dtype, way


def parity(setting: Setting) -> Iterator[Row]:
    """A row a comparison."""
    for architecture in ("bert-base", "modernbert-base"):
        found: dict[Key, LogProbs | Figures] = {}
        for key, run in _runs(setting, architecture):
            if key in found:
                continue
            _, found[key] = attempt("", run)
            for other in _compared_with(key):
                if other in found and other != key:
                    name = f"{architecture}, {_words(key)}, with {_words(other)}"
                    yield name, _difference(found[key], found[other], PRECISIONS[key[2]])


# ---------------------------------------------------------------- runs


def _runs(setting: Setting, architecture: str) -> Iterator[tuple[Key, Callable[[], LogProbs]]]:
    """Each to be run before the next is asked for: they share models."""
    from mlmkit.packing import enable_packing
    from mlmkit.train.layers import compile_layers

    path, device = setting.checkpoint(architecture), setting.device
    batch = real_batch(*((4, 160) if setting.quick else (16, 512)), ragged=True)
    model = load_model(path, "cpu", "float32")
    padded = model.network.config._attn_implementation
    yield REFERENCE, lambda: _log_probs(model, batch, padded)
    if not enable_packing(model):
        raise SkippedError(f"{architecture} cannot be packed")
    yield ("cpu", "packed", "float32", "eager"), lambda: _log_probs(model, batch, PACKED)
    for dtype in PRECISIONS:
        cast = load_model(path, device, "float32" if dtype == AUTOCAST else dtype)
        layouts = {"padded": padded} | ({"packed": PACKED} if dtype != "float32" or device == "cpu" else {})

        def run(attention: str, cast: Any = cast, autocast: bool = dtype == AUTOCAST) -> LogProbs:
            return _log_probs(cast, batch, attention, autocast)

        for layout, attention in layouts.items():
            yield (device, layout, dtype, "eager"), partial(run, attention)
        for layout, of in COMPILED:
            if of == dtype:
                compile_layers(cast, backend="inductor" if device == "cuda" else "aot_eager")
                yield (device, layout, dtype, "compiled"), partial(run, layouts[layout])


def _log_probs(model: Any, batch: Batch, attention: str, autocast: bool = False) -> LogProbs:
    """Of the targets, float32; where the attention packs, in a pack of fixed shape, as training has it."""
    import torch

    from mlmkit.packing import packed_inputs

    model.network.set_attn_implementation(attention)
    device = str(model.device.type)
    input_ids, attention_mask, positions, targets = on_device(batch, device)
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    if attention == PACKED:
        pack, positions = fixed_pack(batch, model.position_offset)
        inputs = to_device(packed_inputs(pack), device)
    context = torch.autocast(device, torch.bfloat16) if autocast else nullcontext()
    with torch.no_grad(), context:
        logits = model.logits(positions.to(device), **inputs).float()
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1).cpu().numpy()


def fixed_pack(batch: Batch, position_offset: int) -> tuple[Any, Any]:
    """The batch's rows as a pack of fixed shape, with documents of padding behind; and where the positions are then."""
    import torch

    from mlmkit.packing import Pack, pad_pack

    rows, longest = batch.input_ids.shape
    lengths = batch.attention_mask.sum(1)
    is_token = batch.attention_mask.reshape(-1) == 1
    column = np.tile(np.arange(longest), rows)[is_token]
    pack = Pack(
        torch.from_numpy(batch.input_ids.reshape(-1)[is_token])[None],
        torch.from_numpy(column + position_offset)[None],
        torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
        int(lengths.max()),
    )
    pack = pad_pack(pack, total=batch.input_ids.size, most=2 * rows, longest=longest, pad_id=0)
    return pack, torch.from_numpy((np.cumsum(is_token) - 1)[batch.positions])


def to_device(inputs: dict[str, Any], device: str) -> dict[str, Any]:
    """Its tensors."""
    import torch

    return {name: each.to(device) if isinstance(each, torch.Tensor) else each for name, each in inputs.items()}


# ---------------------------------------------------------------- comparisons


def _words(key: Key) -> str:
    return "the CPU" if key == REFERENCE else " ".join(word for word in key if word != "eager")


def _compared_with(key: Key) -> list[Key]:
    device, layout, dtype, way = key
    if way == "compiled":
        return [(device, layout, dtype, "eager")]
    if layout == "packed" and dtype != "float32":
        return [REFERENCE, (device, "padded", dtype, way)]
    return [REFERENCE]


def _difference(found: LogProbs | Figures, expected: LogProbs | Figures, precision: str) -> Figures:
    from mlmkit.export.parity import BOUNDS

    if isinstance(found, dict):
        return found
    if isinstance(expected, dict):
        return expected
    bounds, apart = BOUNDS[precision], np.abs(np.subtract(found, expected, dtype=np.float64))
    shift = float(np.mean(expected, dtype=np.float64) - np.mean(found, dtype=np.float64))
    largest, mean = worst_difference(found, expected), float(apart.mean())
    within = largest <= bounds.max_log_prob and mean <= bounds.mean_log_prob and abs(shift) <= bounds.cross_entropy
    return {
        "max Δ log P": largest,
        "mean": mean,
        "Δ cross-entropy": shift,
        "bounds": ", ".join(f"{bound:g}" for bound in bounds),
        "within them": "yes" if within else "NO",
    }
