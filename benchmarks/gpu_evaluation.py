"""Evaluation on a GPU: torch, ONNX Runtime and TensorRT, and an experiment with a CUDA graph per length."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import inputs
import numpy as np
from gpu_models import Captured, compiled, copies_by_length, on_device, operations, scorer, shared_model
from gpu_parity import log_prob_difference
from gpu_timing import Alternative, Figures, Function, LogProbs, Row, Setting, attempt, compared
from harness import SkippedError

from mlmkit.backends import Batch, Scored, load

Engine = Callable[[Batch], LogProbs]  # the targets' log-probabilities, from numpy to numpy
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
REFERENCE, FASTEST = "torch, fp32", "torch, bf16, compiled, CUDA graph"  # the second part of a name is its precision


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

    In fp16, at the smallest and the largest of `inputs.SHAPES`; with `--only` in every precision and shape. TensorRT
    for RTX builds plans everywhere but does not run on H100 and H200: its row has the reason. Raises `SkippedError` if
    neither runtime is installed.
    """
    import onnxruntime

    path, device = setting.checkpoint("bert-base"), setting.device
    on_gpu = device == "cuda"
    if on_gpu and not has_tensorrt() and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise SkippedError("onnxruntime has no CUDA provider here, and TensorRT is not installed")
    makers: dict[str, Callable[[], Engine]] = {
        REFERENCE: partial(torch_engine, device, path, "float32"),
        FASTEST: partial(torch_engine, device, path, "bfloat16", compiles=True, captures=on_gpu),
    }
    export = partial(inputs.artifact, "bert-base", **(inputs.TINY if setting.quick else {}))
    for precision in DTYPES if setting.all_runtimes and on_gpu else ("fp16" if on_gpu else "fp32",):
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
    shapes = (*inputs.SHAPES, (64, 256)) if setting.all_runtimes else inputs.SHAPES[::2]
    if setting.quick:
        shapes = ((1, 16), (4, 32))
    batches = [("masked", inputs.real_batch(*shape)) for shape in shapes]
    yield from _compared_engines(setting, path, makers, batches, FASTEST)


def _compared_engines(
    setting: Setting,
    path: Path,
    makers: Mapping[str, Callable[[], Engine]],
    batches: list[tuple[str, Batch]],
    default: str,
) -> Iterator[Row]:
    """Engines that take turns at each batch, with their difference from the reference.

    Differences are measured on the batch with its rows reversed: no CUDA graph was recorded with that.
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
    difference = log_prob_difference(engine(other), expected, precision)
    rate = setting.rates.get(DTYPES[precision], 0.0)
    return Alternative(lambda: engine(batch), batch.input_ids.size, len(batch.input_ids), count, rate, difference)


def _reversed_rows(batch: Batch) -> Batch:
    rows, length = batch.input_ids.shape
    row, column = np.divmod(batch.positions, length)
    order = np.lexsort((column, rows - 1 - row))
    positions = ((rows - 1 - row) * length + column)[order]
    return Batch(batch.input_ids[::-1].copy(), batch.attention_mask[::-1].copy(), positions, batch.targets[order])


def _pseudo_batch(count: int, tokens: int) -> Batch:
    """Copies of `count` sentences cut to `tokens` wordpieces, with one wordpiece masked each."""
    tokenizer = inputs.bert_tokenizer()
    lines = tokenizer(inputs.sentences(4 * count, tokens + 2, tokenizer), add_special_tokens=False)["input_ids"]
    texts = [ids[:tokens] for ids in lines if len(ids) >= tokens][:count]
    rows = [[tokenizer.cls_token_id, *ids, tokenizer.sep_token_id] for ids in texts]
    ((batch, _),) = copies_by_length(rows, count * tokens * (tokens + 2), tokenizer, padded=False)
    return batch


def has_tensorrt() -> bool:
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


def graphs(setting: Setting) -> Iterator[Row]:
    """Pseudo-log-likelihood of sentences of many lengths, at a small and a large budget of tokens per batch.

    Batches of one length each; of few lengths, with padding and a fixed number of rows; and those as CUDA graphs.
    """
    score = scorer(shared_model(setting.checkpoint("bert-base"), setting.device, "bfloat16"))
    tokenizer = inputs.bert_tokenizer()
    texts = tokenizer(inputs.sentences(20 if setting.quick else 600, 20, tokenizer))["input_ids"]
    for budget in (256, 2048) if setting.quick else (4096, 32_768):
        plain, padded = (copies_by_length(texts, budget, tokenizer, padded=padded) for padded in (False, True))
        makers = {
            "eager": partial(_pass, setting, plain, lambda _: score),
            "eager, padded": partial(_pass, setting, padded, lambda _: score),
            "graphs, padded": partial(_pass, setting, padded, partial(Captured, score)),
        }
        for name, figures in compared(setting, makers, "eager"):
            yield f"{budget:,} tokens per batch, {name}", figures


def _pass(setting: Setting, batches: list[tuple[Batch, int]], make: Callable[[list[Any]], Function]) -> Alternative:
    """A pass through all batches, from numpy to numpy, with one function per shape."""
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
