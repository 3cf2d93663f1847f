"""Everything that is measured on a GPU, in one run of less than nine minutes.

Sections, in this order:

- rates: matrix products per precision, and copies,
- parity: whether packed and padded, compiled and eager, GPU and CPU give the same log-probabilities,
- evaluation: torch in float32, bfloat16 and float16, eager, compiled and as a CUDA graph, against the matrix rate,
- training: mlmkit beside transformers.Trainer in real tokens per second, with MFU,
- runtimes: ONNX Runtime and TensorRT beside torch, in fp16, at two shapes,
- graphs, flash, autotune: three experiments, each beside the default.

Each section has a deadline; time that one leaves over goes to the next. A section that fails or runs out of time keeps
its rows and does not stop the others. The report is written again after every row, to results/<gpu>-<date>.json or to
`--json`, so a machine that disappears leaves what was measured. `--only SECTION ...` runs these without deadlines, and
the runtimes then in every precision and shape.

Without a GPU, `--quick` is a dry run on the CPU with tiny models. It writes a file only with `--json`.
"""

import argparse
import gc
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import inputs
import numpy as np
import train_vs_transformers as trainings
from engines import SHAPES, matrix_rate, worst_difference
from harness import (
    ROOT,
    Contestant,
    ContestantError,
    Report,
    SkippedError,
    contestants,
    isolated,
    main,
    processor,
    ratios,
    say,
    table,
    write,
)
from numpy.typing import NDArray

from mlmkit.backends import Batch, Scored

Figures = dict[str, Any]
Row = tuple[str, Figures]
Function = Callable[..., Any]
LogProbs = NDArray[np.float32]
FAILED, NEEDS_GPU = "failed", "needs a GPU"
SKIPPED, STOPPED = "the section", "the rest"  # rows that give the reason
RESULTS = ROOT / "benchmarks" / "results"
NO_DEADLINE = 86_400  # seconds


@dataclass(frozen=True)
class Setting:
    """`device` is cuda or cpu, `name` its name. `rates` are measured operations per second by dtype."""

    device: str
    name: str
    quick: bool
    rounds: int
    whole: bool = False  # the runtimes in every precision and shape
    rates: Mapping[str, float] = field(default_factory=dict)

    def checkpoint(self, architecture: str) -> Path:
        """A checkpoint with random weights; a tiny one for a dry run."""
        return inputs.checkpoint(architecture, **(inputs.TINY if self.quick else {}))

    def seconds_per_call(self, call: Function) -> float:
        """Of calls queued one behind another, so at the device's own pace; one more call goes before."""
        once = self._seconds_of(call, 1)
        return self._seconds_of(call, min(max(round((0.2 if self.device == "cuda" else 0.05) / once), 1), 1000))

    def _seconds_of(self, call: Function, count: int) -> float:
        import torch

        wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        wait()
        began = time.perf_counter()
        for _ in range(count):
            call()
        wait()
        return (time.perf_counter() - began) / count


def find_device(device: str) -> tuple[str, str]:
    """The device that `device` (auto, cuda, cpu) means here, and its name."""
    import torch

    from mlmkit.backends.torch import pick_device

    device = pick_device(device)
    return device, torch.cuda.get_device_name() if device == "cuda" else processor()


# ---------------------------------------------------------------- rows and alternatives
# A section is a generator of rows, each a name with its figures. A row replaces an earlier one of the same name, so a
# section can yield a first value early and refine it later.


def attempt(function: Function, *arguments: object) -> Any:
    """The result of a call, or the figures that say why it failed: a failure costs no other row."""
    try:
        return function(*arguments)
    except Exception as error:
        return failure(error)


def failure(error: Exception) -> Figures:
    """The reason in one line."""
    reason = " ".join(str(error).split())[:300]
    return {FAILED: reason if isinstance(error, SkippedError) else f"{type(error).__name__}: {reason}"}


class Alternative(NamedTuple):
    """An alternative that is ready to run: `tokens` and `rows` per call, and further `figures` of its row.

    If it has `operations` per call, their share of `rate` is shown.
    """

    call: Function
    tokens: int
    rows: int = 0
    operations: float = 0.0
    rate: float = 0.0
    figures: Figures = {}  # noqa: RUF012


def compared(setting: Setting, makers: Mapping[str, Callable[[], Alternative]], default: str) -> Iterator[Row]:
    """Each alternative once beside the default as soon as it is made, as the next may take too long; then in turns."""
    made: dict[str, Alternative] = {}

    def rounds(names: Iterable[str], count: int) -> Iterator[Row]:
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(count):
            for name, taken in seconds.items():
                taken.append(setting.seconds_per_call(made[name].call))
        for name, taken in seconds.items():
            yield name, _speed(made[name], taken, seconds.get(default))

    for name, make in makers.items():
        result = attempt(make)
        if isinstance(result, Alternative):
            made[name] = result
            yield from rounds(made.keys() & {name, default}, 1)
        else:
            yield name, result
    yield from rounds(made, setting.rounds)


def _speed(made: Alternative, taken: list[float], default: list[float] | None) -> Figures:
    seconds = median(taken)
    figures: Figures = {"ms per call": 1e3 * seconds, "tokens/s": made.tokens / seconds}
    if made.rows:
        figures["rows/s"] = made.rows / seconds
    if made.operations:
        figures["of the matrix rate"] = made.operations / seconds / made.rate if made.rate else None
    figures["x the default"] = median(ratios(taken, default)) if default else None
    return figures | made.figures


class Captured:
    """A function of tensors, recorded as a CUDA graph for their shapes.

    A call copies its inputs in and replays the graph; the next call overwrites its result. Raises `SkippedError`
    without a GPU.
    """

    def __init__(self, function: Function, inputs: Iterable[Any]) -> None:
        import torch

        if not torch.cuda.is_available():
            raise SkippedError(NEEDS_GPU)
        self._inputs = [values.clone() for values in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what the first runs set up must not be recorded
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


# ---------------------------------------------------------------- models and batches


def load_model(path: Path, device: str, dtype: str) -> Any:
    """`MaskedLM` in evaluation mode."""
    import torch

    from mlmkit.pretrained import load_pretrained

    model, _ = load_pretrained(str(path))
    torch.set_float32_matmul_precision("highest")
    return model.to(device, getattr(torch, dtype))


shared_model = cache(load_model)  # for those that do not change it


def compiled(function: Function, device: str) -> Function:
    """Compiled for each shape. On a CPU the graph is traced and run as it is, which is enough for a dry run."""
    import torch

    return torch.compile(function, dynamic=False, backend="inductor" if device == "cuda" else "aot_eager")


def scorer(model: Any) -> Function:
    """The targets' log-probabilities, from the tensors of a `Batch`."""
    import torch

    def score(*inputs: Any) -> Any:
        with torch.inference_mode():
            return model(*inputs).log_prob

    return score


def on_device(batch: Batch, device: str) -> list[Any]:
    """The arrays of a batch as tensors."""
    import torch

    return [torch.from_numpy(values).to(device) for values in batch]


def operations(path: Path, batch: Batch) -> float:
    """Floating-point operations of one forward over a batch of full rows."""
    from mlmkit.train.cost import flops_per_token

    rows, length = batch.input_ids.shape
    model, tokens = shared_model(path, "cpu", "float32"), rows * length
    return flops_per_token(model, np.full(rows, length), len(batch.positions) / tokens) / 3 * tokens  # 3: with backward


def pack_of(batch: Batch, model: Any, device: str) -> tuple[dict[str, Any], Any]:
    """The batch as a pack of fixed shape, as training has it: the model's inputs, and the positions within the pack."""
    import torch

    from mlmkit.packing import Pack, packed_inputs, pad_pack

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


# ---------------------------------------------------------------- rates


def device_rates(setting: Setting) -> Iterator[Row]:
    """Matrix products, beside the data sheet's rate if it is known; copies within the device and across."""
    for name, dtype in {"bfloat16": "bfloat16", "float16": "float16", "tf32": "float32", "float32": "float32"}.items():
        yield name, attempt(_matrix_rate, setting, name, dtype)
    copies = {"device to device": (False, False), "host to device, pinned": (True, False)}
    for name, pinned in (copies | {"device to host, pinned": (False, True)}).items():
        yield name, attempt(_bandwidth, setting, *pinned)


def _matrix_rate(setting: Setting, name: str, dtype: str) -> Figures:
    import torch

    from mlmkit.train.cost import peak_flops

    if name in ("tf32", "float16") and setting.device == "cpu":  # CPUs have no tf32, and float16 is emulated
        raise SkippedError(NEEDS_GPU)
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    rate, nominal = matrix_rate(setting.device, dtype), peak_flops(setting.name) if name == "bfloat16" else 0.0
    return {
        "TFLOP/s": rate / 1e12,
        "nominal TFLOP/s": nominal / 1e12 or None,
        "of the nominal": rate / nominal if nominal else None,
    }


def _bandwidth(setting: Setting, from_host: bool, to_host: bool) -> Figures:
    """Bytes read and written within the device, bytes that cross otherwise."""
    import torch

    if setting.device == "cpu" and (from_host or to_host):
        raise SkippedError(NEEDS_GPU)
    size = 1 << 20 if setting.quick else 1 << 30

    def memory(on_host: bool) -> Any:
        device = "cpu" if on_host else setting.device
        return torch.ones(size, dtype=torch.uint8, device=device, pin_memory=on_host)

    source, target = memory(from_host), memory(to_host)
    seconds = setting.seconds_per_call(lambda: target.copy_(source, non_blocking=True))
    return {"GB/s": (1 if from_host or to_host else 2) * size / seconds / 1e9}


def rates_of(rows: Mapping[str, Figures]) -> dict[str, float]:
    """Operations per second by dtype."""
    return {name: 1e12 * figures["TFLOP/s"] for name, figures in rows.items() if "TFLOP/s" in figures}


# ---------------------------------------------------------------- parity

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
            if name in results:  # without a GPU
                continue
            results[name] = attempt(run)
            for other in others:
                if other != name:
                    difference = _difference(results[name], results[other], PRECISIONS[dtype])
                    yield f"{architecture}, {name}, with {other}", difference


def _parity_runs(setting: Setting, architecture: str) -> Iterator[tuple[str, str, list[str], Callable[[], LogProbs]]]:
    """Name, dtype, names to compare with, and the run. Each must run before the next is made: they share models."""
    from mlmkit.packing import PACKED_ATTENTION, enable_packing
    from mlmkit.train.step import compile_layers

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
    """Of the targets; where the attention packs, from a pack of fixed shape."""
    import torch

    from mlmkit.packing import PACKED_ATTENTION

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


def _difference(ours: LogProbs | Figures, expected: LogProbs | Figures, precision: str) -> Figures:
    """In nats, within the bounds of the export's report in that precision; or the failure of either."""
    from mlmkit.export.parity import BOUNDS

    if isinstance(ours, dict) or isinstance(expected, dict):
        return ours if isinstance(ours, dict) else dict(expected)
    bounds = BOUNDS[precision]
    shift = float(np.mean(expected, dtype=np.float64) - np.mean(ours, dtype=np.float64))
    largest = worst_difference(ours, expected)
    mean = float(np.abs(np.subtract(ours, expected, dtype=np.float64)).mean())
    within = largest <= bounds.max_log_prob and mean <= bounds.mean_log_prob and abs(shift) <= bounds.cross_entropy
    return {
        "max Δ log P": largest,
        "mean": mean,
        "Δ cross-entropy": shift,
        "bounds": ", ".join(f"{bound:g}" for bound in bounds),
        "within bounds": "yes" if within else "NO",
    }


# ---------------------------------------------------------------- evaluation and runtimes

Engine = Callable[[Batch], LogProbs]  # the targets' log-probabilities, from numpy to numpy
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
REFERENCE, FASTEST = "torch, fp32", "torch, bf16, compiled, CUDA graph"  # a name's second word is its precision


def evaluation(setting: Setting) -> Iterator[Row]:
    """torch on BERT-base: masked cross-entropy of full rows of 512 tokens, and pseudo-log-likelihood."""
    path = setting.checkpoint("bert-base")
    makers: dict[str, Callable[[], Engine]] = {REFERENCE: partial(torch_engine, setting.device, path, "float32")}
    for precision in ("bf16", "fp16"):
        make = partial(torch_engine, setting.device, path, DTYPES[precision])
        makers[f"torch, {precision}"] = make
        makers[f"torch, {precision}, compiled"] = partial(make, compiles=True)
        makers[f"torch, {precision}, CUDA graph"] = partial(make, captures=True)
        makers[f"torch, {precision}, compiled, CUDA graph"] = partial(make, compiles=True, captures=True)
    sizes = ((2, 64), (4, 20)) if setting.quick else ((64, 512), (100, 20))
    batches = [("masked", inputs.real_batch(*sizes[0])), ("pseudo", _pseudo_batch(*sizes[1]))]
    yield from _compared_engines(setting, path, makers, batches, "torch, bf16")


def runtimes(setting: Setting) -> Iterator[Row]:
    """ONNX Runtime on CUDA and TensorRT beside torch on BERT-base, with 15 % of the positions masked.

    In fp16, at the smallest and the largest of `SHAPES`; with `--only` in every precision and shape. TensorRT for RTX
    builds plans everywhere but runs on no H100 or H200: its row has the reason. Raises `SkippedError` if there is no
    runtime.
    """
    path, device = setting.checkpoint("bert-base"), setting.device
    on_gpu = device == "cuda"
    if on_gpu and not (has_tensorrt() or has_cuda_provider()):
        raise SkippedError("onnxruntime has no CUDA provider here, and TensorRT is not installed")
    makers: dict[str, Callable[[], Engine]] = {
        REFERENCE: partial(torch_engine, device, path, "float32"),
        FASTEST: partial(torch_engine, device, path, "bfloat16", compiles=True, captures=on_gpu),
    }
    export = partial(inputs.artifact, "bert-base", **(inputs.TINY if setting.quick else {}))
    for precision in DTYPES if setting.whole and on_gpu else ("fp16" if on_gpu else "fp32",):
        flags = ["--precision", precision, *(["--allow-drift"] if precision != "fp32" else [])]
        for plan in (["--trt"], []) if has_tensorrt() else ([],):
            folder = attempt(export, *flags, *plan)
            if isinstance(folder, Path):
                makers[f"onnx, {precision}"] = partial(backend_engine, folder, "onnx", device)
                makers[f"onnx, {precision}, CUDA graph"] = partial(recorded_engine, folder, device)
                if plan:
                    makers[f"tensorrt, {precision}"] = partial(backend_engine, folder, "tensorrt", device)
                break
            yield f"{'tensorrt' if plan else 'export'}, {precision}", folder
    shapes = ((1, 16), (4, 32)) if setting.quick else (*SHAPES, (64, 256)) if setting.whole else SHAPES[::2]
    batches = [("masked", inputs.real_batch(*shape)) for shape in shapes]
    yield from _compared_engines(setting, path, makers, batches, FASTEST)


def _compared_engines(
    setting: Setting,
    path: Path,
    makers: Mapping[str, Callable[[], Engine]],
    batches: list[tuple[str, Batch]],
    default: str,
) -> Iterator[Row]:
    """Engines in turns at each batch, with their difference from the reference.

    Differences are of another batch of the same shape, the rows in reverse: no CUDA graph was recorded with it.
    """
    engines: dict[str, Engine] = {}
    for name, make in makers.items():
        engine = attempt(make)
        if isinstance(engine, dict):
            yield name, engine
        else:
            engines[name] = engine
    for work, batch in batches:
        other, count = _reversed_rows(batch), operations(path, batch)
        expected = engines[REFERENCE](other)
        ready = {
            name: partial(_ready, setting, name.split(", ")[1], engine, batch, other, expected, count)
            for name, engine in engines.items()
        }
        for name, figures in compared(setting, ready, default):
            yield f"{work} {batch.input_ids.shape[0]} x {batch.input_ids.shape[1]}, {name}", figures


def _ready(
    setting: Setting, precision: str, engine: Engine, batch: Batch, other: Batch, expected: LogProbs, count: float
) -> Alternative:
    for _ in range(3):  # ONNX Runtime runs a shape as usual, then records its CUDA graph, then replays it
        engine(batch)
    difference = _difference(engine(other), expected, precision)
    rate = setting.rates.get(DTYPES[precision], 0.0)
    return Alternative(lambda: engine(batch), batch.input_ids.size, len(batch.input_ids), count, rate, difference)


def _reversed_rows(batch: Batch) -> Batch:
    rows, length = batch.input_ids.shape
    row, column = np.divmod(batch.positions, length)
    order = np.lexsort((column, rows - 1 - row))
    positions = ((rows - 1 - row) * length + column)[order]
    return Batch(batch.input_ids[::-1].copy(), batch.attention_mask[::-1].copy(), positions, batch.targets[order])


def _pseudo_batch(count: int, tokens: int) -> Batch:
    """`count` sentences cut at `tokens` wordpieces, in copies with one wordpiece masked each."""
    tokenizer = inputs.bert_tokenizer()
    lines = tokenizer(inputs.sentences(4 * count, tokens + 2, tokenizer), add_special_tokens=False)["input_ids"]
    texts = [ids[:tokens] for ids in lines if len(ids) >= tokens][:count]
    rows = [[tokenizer.cls_token_id, *ids, tokenizer.sep_token_id] for ids in texts]
    ((batch, _),) = _copies_by_length(rows, count * tokens * (tokens + 2), tokenizer, padded=False)
    return batch


def has_cuda_provider() -> bool:
    """Whether ONNX Runtime was built with CUDA."""
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def has_tensorrt() -> bool:
    """Whether TensorRT or TensorRT for RTX is installed."""
    return any(map(find_spec, ("tensorrt", "tensorrt_rtx")))


def torch_engine(device: str, path: Path, dtype: str, *, compiles: bool = False, captures: bool = False) -> Engine:
    """`MaskedLM`, as it is or compiled, and run or replayed as a CUDA graph."""
    model = shared_model(path, device, dtype)
    score = scorer(compiled(model, device) if compiles else model)
    graphs: dict[Any, Captured] = {}

    def replay(*tensors: Any) -> Any:
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in graphs:
            graphs[shapes] = Captured(score, tensors)
        return graphs[shapes](*tensors)

    run = replay if captures else score
    return lambda batch: run(*on_device(batch, device)).float().cpu().numpy()


def backend_engine(folder: Path, name: str, device: str) -> Engine:
    """mlmkit's backend as its users run it; ONNX Runtime's binds inputs and outputs."""
    from mlmkit.backends import load

    backend = load(str(folder), name, device)
    return lambda batch: backend.score(batch).log_prob


def recorded_engine(folder: Path, device: str) -> Engine:
    """ONNX Runtime with a CUDA graph per shape. On the CPU the same buffers and bindings, and nothing is recorded.

    ONNX Runtime wants a `gpu_graph_id` per shape, buffers that keep their addresses, and no copy between devices within
    the graph.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        onnxruntime.preload_dlls()
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0", "enable_cuda_graph": "1"}))
    session = onnxruntime.InferenceSession(folder / "model.onnx", settings, providers=providers)
    candidates = next(output.shape[1] for output in session.get_outputs() if output.name == "top_id")
    value = onnxruntime.OrtValue
    bound: dict[tuple[int, ...], tuple[Any, dict[str, Any], Any, Any]] = {}

    def bind(batch: Batch) -> tuple[Any, dict[str, Any], Any, Any]:
        """The binding, its inputs, the output that is read, and the options of a run."""
        masked = len(batch.positions)
        buffers = {name: value.ortvalue_from_numpy(values, device, 0) for name, values in batch._asdict().items()}
        outputs = {
            name: value.ortvalue_from_shape_and_type(
                [masked, candidates] if name.startswith("top_") else [masked], kind, device, 0
            )
            for name, kind in zip(Scored._fields, (np.float32, np.int64) * 2, strict=True)
        }
        binding, options = session.io_binding(), onnxruntime.RunOptions()
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
        for name, buffer in outputs.items():
            binding.bind_ortvalue_output(name, buffer)
        options.add_run_config_entry("gpu_graph_id", str(len(bound) + 1))
        return binding, buffers, outputs["log_prob"], options

    def score(batch: Batch) -> LogProbs:
        key = (*batch.input_ids.shape, len(batch.positions))
        if key not in bound:
            bound[key] = bind(batch)
        binding, buffers, log_prob, options = bound[key]
        for name, values in batch._asdict().items():
            buffers[name].update_inplace(values)
        session.run_with_iobinding(binding, options)
        return log_prob.numpy()

    return score


# ---------------------------------------------------------------- training

STEPS, TRAINING_ROUNDS = 8, 2
# Per step. 16: the longest paragraph pads its whole batch.
MICRO_BATCHES = {trainings.MLMKIT: 4, trainings.RUN_MLM: 4, trainings.PARAGRAPHS: 16}


def training(setting: Setting) -> Iterator[Row]:
    """The contestants of train_vs_transformers.py, but for one, with one size of micro-batch: no time for trials.

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
    from mlmkit.train.cost import dry_run

    tokenizer, architecture = inputs.tokenizer_folder(), case.architecture
    if setting.quick:
        architecture = trainings.tiny_architecture(case, inputs.kept_folder())
    operations = dry_run(trainings.mlmkit_config(case, text, tokenizer, architecture, setting.device)).flops_per_token
    steps, ways = (2, [trainings.MLMKIT, trainings.RUN_MLM]) if setting.quick else (STEPS, list(MICRO_BATCHES))
    if not find_spec("accelerate"):
        yield "Trainer", {FAILED: "needs accelerate: pip install accelerate"}
        ways = [trainings.MLMKIT]
    makers = {
        way: (trainings.open_contestant, case, text, tokenizer, architecture, way, setting.device) for way in ways
    }
    with contestants(makers) as started:
        turns = {
            way: partial(contestant.call, trainings.train, case, way, setting.device, MICRO_BATCHES[way], steps)
            for way, contestant in started.items()
        }
        yield from _training_rounds(setting, turns, operations)


def _training_rounds(setting: Setting, turns: dict[str, Any], operations: float) -> Iterator[Row]:
    """Rows are yielded again after each turn. A contestant that fails takes no further turn; the others do."""
    from mlmkit.train.cost import peak_flops

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


# ---------------------------------------------------------------- experiment: a CUDA graph per length


def graphs_by_length(setting: Setting) -> Iterator[Row]:
    """Pseudo-log-likelihood of sentences of many lengths, at a small and a large budget of tokens per batch.

    Batches of one length each; of few lengths, with padding and a fixed number of rows; and those as CUDA graphs.
    """
    score = scorer(shared_model(setting.checkpoint("bert-base"), setting.device, "bfloat16"))
    tokenizer = inputs.bert_tokenizer()
    texts = tokenizer(inputs.sentences(20 if setting.quick else 600, 20, tokenizer))["input_ids"]
    for budget in (256, 2048) if setting.quick else (4096, 32_768):
        plain, padded = (_copies_by_length(texts, budget, tokenizer, padded=padded) for padded in (False, True))
        makers = {
            "eager": partial(_pass, setting, plain, lambda _: score),
            "eager, padded": partial(_pass, setting, padded, lambda _: score),
            "graphs, padded": partial(_pass, setting, padded, partial(Captured, score)),
        }
        for name, figures in compared(setting, makers, "eager"):
            yield f"{budget:,} tokens per batch, {name}", figures


def _copies_by_length(texts: list[list[int]], budget: int, tokenizer: Any, *, padded: bool) -> list[tuple[Batch, int]]:
    """Masked copies of all texts in batches, and how many rows of each count; others only fill its shape.

    A row that fills a shape repeats the last one: a row of padding alone gives NaN in some models.
    """
    by_width: dict[int, list[tuple[list[int], int]]] = {}
    for ids in texts:
        width = bucket(len(ids)) if padded else len(ids)
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


def bucket(size: int) -> int:
    """The next multiple of a quarter of the power of two at or below `size`: at most a fifth of it is padding."""
    step = max((1 << size.bit_length() - 1) // 4, 1)
    return -(-size // step) * step


def _pass(setting: Setting, batches: list[tuple[Batch, int]], make: Callable[[list[Any]], Function]) -> Alternative:
    """Through all batches, from numpy to numpy, with one function per shape."""
    functions: dict[tuple[int, ...], Function] = {}
    for batch, _ in batches:
        if batch.input_ids.shape not in functions:
            functions[batch.input_ids.shape] = make(on_device(batch, setting.device))

    def score() -> LogProbs:
        parts = []
        for batch, count in batches:
            log_prob = functions[batch.input_ids.shape](*on_device(batch, setting.device))
            parts.append(log_prob[:count].float().cpu().numpy())
        return np.concatenate(parts)

    tokens = sum(int(batch.attention_mask[:count].sum()) for batch, count in batches)
    figures: Figures = {
        "shapes": len(functions),
        "padding": 1 - tokens / sum(batch.input_ids.size for batch, _ in batches),
        "mean log P": float(score().mean(dtype=np.float64)),
    }
    return Alternative(score, tokens, sum(count for _, count in batches), figures=figures)


# ---------------------------------------------------------------- experiments: a training step on a pack


def step_on_pack(setting: Setting, prepare: Callable[[Any], None] = lambda _: None) -> Alternative:
    """Forward and backward of BERT-base on a pack of fixed shape, under bfloat16 autocast."""
    import torch

    from mlmkit.packing import enable_packing

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


def autotuned(setting: Setting) -> Iterator[Row]:
    """Eager, compiled as mlmkit does, and with every kernel chosen by trial."""
    from mlmkit.train.step import encoder_layers

    def compile_layers(mode: str, model: Any) -> None:
        for layer in encoder_layers(model):
            layer.compile(**({"mode": mode} if setting.device == "cuda" else {"backend": "aot_eager"}))

    makers = {"eager": partial(step_on_pack, setting)}
    for name, mode in {"compiled": "default", "compiled, autotuned": "max-autotune-no-cudagraphs"}.items():
        makers[name] = partial(step_on_pack, setting, partial(compile_layers, mode))
    yield from compared(setting, makers, "compiled")


def flash_attention(setting: Setting) -> Iterator[Row]:
    """torch's own kernel behind `varlen_attn`, then each FlashAttention that torch knows (3 and 4)."""
    import torch
    from torch.nn import attention

    if not hasattr(attention, "activate_flash_attention_impl"):
        raise SkippedError(f"torch {torch.__version__} has no activate_flash_attention_impl")
    made = step_on_pack(setting)
    default = setting.seconds_per_call(made.call)

    def figures(seconds: float) -> Figures:
        speed = {"ms per call": 1e3 * seconds, "tokens/s": made.tokens / seconds, "x the default": default / seconds}
        return speed | {"loss": float(made.call())}

    def activated(name: str) -> Figures:
        if setting.device == "cpu":
            raise SkippedError(NEEDS_GPU)
        attention.activate_flash_attention_impl(name)  # deactivates the one before
        return figures(setting.seconds_per_call(made.call))

    yield "torch's own", figures(default)
    for name in attention.list_flash_attention_impls():
        yield name, attempt(activated, name)
    if attention.current_flash_attention_impl() and hasattr(attention, "restore_flash_attention_impl"):
        attention.restore_flash_attention_impl()


# ---------------------------------------------------------------- all sections


class Section(NamedTuple):
    """`until` is its deadline, in seconds after the start of the run."""

    title: str
    measure: Callable[[Setting], Iterator[Row]]
    until: float


SECTIONS = {
    "rates": Section("Matrix products and copies", device_rates, 45),
    "parity": Section("Parity", parity, 140),
    "evaluation": Section("Evaluation", evaluation, 235),
    "training": Section("Training", training, 365),
    "runtimes": Section("ONNX Runtime and TensorRT", runtimes, 445),
    "graphs": Section("Experiment: a CUDA graph per length", graphs_by_length, 475),
    "flash": Section("Experiment: FlashAttention", flash_attention, 490),
    "autotune": Section("Experiment: autotuned", autotuned, 530),  # last, as its time is the least known
}
Results = dict[str, dict[str, Figures]]  # rows by section


def measure(options: argparse.Namespace) -> Report:
    """Every section, in one process that is replaced only after a failure or a missed deadline."""
    began = time.perf_counter()
    only = [name for name in options.only if name]
    if unknown := set(only) - SECTIONS.keys():
        raise SkippedError(f"no section {', '.join(unknown)}: there are {', '.join(SECTIONS)}")
    device, name = isolated(find_device, options.device)
    if device == "cpu" and not options.quick:
        raise SkippedError("torch finds no GPU here: --quick makes a dry run on the CPU")
    setting = Setting(device, name, options.quick, options.rounds, whole=bool(only))
    os.environ.setdefault("MLMKIT_CACHE", str(inputs.kept_folder() / "cache"))
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path = options.json or (None if options.quick else RESULTS / f"{slug}-{datetime.now(UTC):%Y-%m-%d}.json")
    results: Results = {section: {} for section in only or SECTIONS}
    ended: dict[str, float] = {}
    worker = None
    for section in results:
        title, _, until = SECTIONS[section]
        say(f"{time.perf_counter() - began:.0f} s: {title}")
        setting = replace(setting, rates=rates_of(results.get("rates", {})))
        worker = worker or Contestant(start_worker)
        for name, figures in _rows(worker, section, setting, began + (NO_DEADLINE if only else until)):
            results[section][name] = figures
            if path:
                write(report(setting, results, ended), path, time.perf_counter() - began)
        ended[title] = time.perf_counter() - began
        if FAILED in results[section].get(STOPPED, {}):
            worker.kill()
            worker = None
    if worker:
        worker.kill()
    return report(setting, results, ended)


def _rows(worker: Contestant, section: str, setting: Setting, until: float) -> Iterator[Row]:
    """A section's rows as the worker measures them; the last one says so if it failed or ran out of time."""
    try:
        while row := worker.call(next_row, section, setting, timeout=max(until - time.perf_counter(), 0.0)):
            yield row
    except ContestantError as error:
        yield STOPPED, {FAILED: str(error)}


# ---------------------------------------------------------------- in the worker


def start_worker() -> dict[str, Any]:
    """The worker's state. It leads a process group, which includes the processes that it starts."""
    os.setsid()
    return {}


def next_row(state: dict[str, Any], section: str, setting: Setting) -> Row | None:
    """The next row of a section, which is begun if it is another than before; None at its end."""
    import torch

    if state.get("section") != section:
        state.update(section=section, rows=SECTIONS[section].measure(setting))
    try:
        return next(state["rows"])
    except StopIteration:
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()
        return None
    except SkippedError as error:  # any other error may have broken CUDA, and ends the worker
        return SKIPPED, failure(error)


def report(setting: Setting, results: Results, ended: dict[str, float]) -> Report:
    """The report of the rows so far."""
    notes = [f"On {setting.name}."]
    if setting.quick:
        notes.append("A dry run with tiny models: these figures mean nothing.")
    titled = {SECTIONS[section].title: rows for section, rows in results.items()}
    return Report(
        [table(title, [{"": name, **row} for name, row in rows.items()]) for title, rows in titled.items()],
        notes,
        figures={"device": setting.name, "quick": setting.quick, "ended_after_seconds": ended, "sections": titled},
    )


if __name__ == "__main__":
    cores = os.cpu_count() or 2
    main(__doc__, measure, device=("auto", "auto"), rounds=(3, 1), only=(("",), ("",)), threads=(cores, 2))
