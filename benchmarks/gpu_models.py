"""Models and batches of gpu.py's sections: loaded, compiled, recorded as CUDA graphs, and packed."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_timing import NEEDS_GPU, Function
from harness import SkippedError

from mlmkit.backends import Batch
from mlmkit.packing import Pack, packed_inputs, pad_pack
from mlmkit.pretrained import load_pretrained
from mlmkit.train.cost import flops_per_token


def load_model(path: Path, device: str, dtype: str) -> Any:
    model, _ = load_pretrained(str(path))
    torch.set_float32_matmul_precision("highest")
    return model.to(device, getattr(torch, dtype))


shared_model = cache(load_model)  # for callers that do not change it


def compiled(function: Function, device: str) -> Function:
    """Compiled for each shape. On a CPU the graph is traced and run as it is, which is enough for a dry run."""
    return torch.compile(function, dynamic=False, backend="inductor" if device == "cuda" else "aot_eager")


def scorer(model: Any) -> Function:
    """The targets' log-probabilities, from the tensors of a `Batch`."""

    def score(*tensors: Any) -> Any:
        with torch.inference_mode():
            return model(*tensors).log_prob

    return score


class Captured:
    """A function of tensors, recorded as a CUDA graph for their shapes.

    A call copies its inputs in and replays the graph; the next call overwrites its result. Raises `SkippedError`
    without a GPU.
    """

    def __init__(self, function: Function, inputs: Iterable[Any]) -> None:
        if not torch.cuda.is_available():
            raise SkippedError(NEEDS_GPU)
        self._inputs = [values.clone() for values in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the first runs do set-up work that must not be recorded
            for _ in range(3):
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = function(*self._inputs)

    def __call__(self, *inputs: Any) -> Any:
        for kept, values in zip(self._inputs, inputs, strict=True):
            kept.copy_(values)
        self._graph.replay()
        return self._output


def on_device(batch: Batch, device: str) -> list[Any]:
    return [torch.from_numpy(values).to(device) for values in batch]


def operations(path: Path, batch: Batch) -> float:
    """Floating-point operations of one forward pass over a batch of full rows."""
    rows, length = batch.input_ids.shape
    model, tokens = shared_model(path, "cpu", "float32"), rows * length
    return flops_per_token(model, np.full(rows, length), len(batch.positions) / tokens) / 3 * tokens  # 3: with backward


def pack_of(batch: Batch, model: Any, device: str) -> tuple[dict[str, Any], Any]:
    """The batch as a pack of fixed shape, as in training: the model's inputs, and the positions within the pack."""
    rows, longest = batch.input_ids.shape
    lengths = batch.attention_mask.sum(1)
    is_token = batch.attention_mask.reshape(-1) == 1
    pack = Pack(
        torch.from_numpy(batch.input_ids.reshape(-1)[is_token])[None],
        torch.from_numpy(np.tile(np.arange(longest), rows)[is_token] + model.position_offset)[None],
        torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
        int(lengths.max()),
    )
    pack = pad_pack(pack, total=batch.input_ids.size, most=2 * rows, longest=longest, pad_id=0)
    inputs = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in packed_inputs(pack).items()
    }
    return inputs, torch.from_numpy((np.cumsum(is_token) - 1)[batch.positions]).to(device)


def copies_by_length(texts: list[list[int]], budget: int, tokenizer: Any, *, padded: bool) -> list[tuple[Batch, int]]:
    """Copies of the texts with one token masked each, in batches of equal length and at most `budget` tokens.

    With `padded`, lengths are rounded up and all batches of a length have the same number of rows. Each batch comes
    with its number of copies: further rows only fill its shape. They repeat the last copy, as a row of padding alone
    gives NaN in some models.
    """
    by_width: dict[int, list[tuple[list[int], int]]] = {}
    for ids in texts:
        width = _rounded_up(len(ids)) if padded else len(ids)
        by_width.setdefault(width, []).extend((ids, position) for position in range(1, len(ids) - 1))
    batches = []
    for width, copies in by_width.items():
        size = budget // width
        for begin in range(0, len(copies), size):
            part = copies[begin : begin + size]
            rows = part + part[-1:] * (size - len(part) if padded else 0)
            lengths, column = np.array([len(ids) for ids, _ in rows]), np.array([position for _, position in rows])
            input_ids = np.array([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows])
            row = np.arange(len(rows))
            targets = input_ids[row, column]
            input_ids[row, column] = tokenizer.mask_token_id
            is_token = (np.arange(width) < lengths[:, None]).astype(np.int64)
            batches.append((Batch(input_ids, is_token, row * width + column, targets), len(part)))
    return batches


def _rounded_up(size: int) -> int:
    """The next multiple of a quarter of the power of two at or below `size`: at most a fifth of it is padding."""
    step = max((1 << size.bit_length() - 1) // 4, 1)
    return -(-size // step) * step
