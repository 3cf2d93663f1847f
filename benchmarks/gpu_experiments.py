"""Sections of gpu.py: three ideas, each beside the default, in turns.

- CUDA graphs a length for pseudo-log-likelihood: sentences of many lengths are padded to few (`bucket`), each
  of which is recorded once with a fixed number of rows; at a small and a large budget of tokens a batch.
- `torch.compile(mode="max-autotune-no-cudagraphs")` for the layers, on a pack of fixed shape: a training step.
- FlashAttention-3 and -4 behind `varlen_attn`, by `torch.nn.attention.activate_flash_attention_impl`: the same step.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from gpu_eval import load_model, on_device, scorer
from gpu_parity import fixed_pack, to_device
from gpu_shared import NEEDS_GPU, Captured, Figures, Made, Row, Setting, attempt, compared, seconds_a_call
from harness import SkippedError
from inputs import bert_tokenizer, real_batch, sentences
from numpy.typing import NDArray

from mlmkit.backends import Batch

AUTOTUNE = "max-autotune-no-cudagraphs"
BUDGETS = (4096, 32_768)  # tokens a batch


# ---------------------------------------------------------------- graphs a length


class Work(NamedTuple):
    """Batches, and which of the plan's tokens each scores; what a padded batch has beyond them is dropped."""

    batches: list[Batch]
    scored: list[NDArray[np.int64]]


def graphs_by_length(setting: Setting) -> Iterator[Row]:
    """All rows of a plan: as they come, padded to few shapes, and replayed in those."""
    from mlmkit.tokenizer import Tokenizer

    path = setting.checkpoint("bert-base")
    model = load_model(path, setting.device, "bfloat16")
    tokenizer = Tokenizer.from_folder(path)
    texts = sentences(20 if setting.quick else 600, 20, bert_tokenizer())
    for budget in [each // 16 for each in BUDGETS] if setting.quick else BUDGETS:
        plain, padded = (works(texts, tokenizer, budget, fixed=fixed) for fixed in (False, True))
        makers = {
            "eager": partial(_pass, setting, plain, lambda _: scorer(model), plain),
            "eager, padded": partial(_pass, setting, padded, lambda _: scorer(model), plain),
            "graphs, padded": partial(_pass, setting, padded, partial(Captured, scorer(model)), plain),
        }
        for name, figures in compared(setting, makers, "eager"):
            yield f"{budget:,} tokens a batch, {name}", figures


def works(texts: list[str], tokenizer: Any, budget: int, *, fixed: bool) -> Work:
    """The plan in batches of similar length; with `fixed`, the batches of a bucket have one shape."""
    from mlmkit.backends.fitting import Shape
    from mlmkit.batching import length_batches
    from mlmkit.corpus import tokenize
    from mlmkit.eval.plan import pseudo_plan
    from mlmkit.eval.scoring import build_batch

    corpus = tokenize(texts, tokenizer)
    plan = pseudo_plan(corpus, tokenizer, 500)
    lengths = plan.rows.length + tokenizer.added_tokens
    if not fixed:
        pairs = [build_batch(corpus, plan, rows, tokenizer) for rows in length_batches(lengths, budget)]
        return Work(*map(list, zip(*pairs, strict=True)))
    columns = np.array([bucket(int(length)) for length in lengths])
    found = Work([], [])
    for rows in length_batches(columns, budget, equal=True):
        width = int(columns[rows[0]])
        batch, scored = build_batch(corpus, plan, rows, tokenizer)
        count = budget // width
        found.batches.append(widen(batch, Shape(count, width, count), tokenizer.pad_id))
        found.scored.append(scored)
    return found


def bucket(size: int) -> int:
    """The next multiple of a quarter of the power of two at or below `size`: at most a quarter of it is padding."""
    step = max((1 << size.bit_length() - 1) // 4, 1)
    return -(-size // step) * step


def widen(batch: Batch, shape: Any, pad_id: int) -> Batch:
    """The batch with more columns, rows and positions behind its own, whose results are to be dropped.

    An added row repeats the first and an added position the last: a row that is all padding gives NaN in some models.
    """
    (rows, seq), masked = batch.input_ids.shape, len(batch.positions)
    row, column = np.divmod(batch.positions, seq)

    def wider(values: NDArray[np.int64], filling: int) -> NDArray[np.int64]:
        wide = np.pad(values, ((0, 0), (0, shape.seq - seq)), constant_values=filling)
        return np.concatenate([wide, np.repeat(wide[:1], shape.batch - rows, axis=0)])

    def longer(values: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.pad(values, (0, shape.masked - masked), mode="edge")

    return Batch(
        wider(batch.input_ids, pad_id),
        wider(batch.attention_mask, 0),
        longer(row * shape.seq + column),
        longer(batch.targets),
    )


def _pass(setting: Setting, work: Work, make: Callable[[list[Any]], Callable[..., Any]], plain: Work) -> Made:
    """Through all batches, from numpy to numpy; with one function a shape."""
    functions: dict[tuple[int, ...], Callable[..., Any]] = {}
    for batch in work.batches:
        if batch.input_ids.shape not in functions:
            functions[batch.input_ids.shape] = make(on_device(batch, setting.device))

    def score() -> NDArray[np.float32]:
        log_prob = np.empty(sum(map(len, work.scored)), np.float32)
        for batch, scored in zip(work.batches, work.scored, strict=True):
            found = functions[batch.input_ids.shape](*on_device(batch, setting.device))
            log_prob[scored] = found[: len(scored)].float().cpu().numpy()
        return log_prob

    tokens = sum(int(batch.attention_mask.sum()) for batch in plain.batches)
    total = float(score().sum(dtype=np.float64))
    figures: Figures = {
        "shapes": len({batch.input_ids.shape for batch in work.batches}),
        "padding": 1 - tokens / sum(batch.input_ids.size for batch in work.batches),
        "mean log P": total / sum(map(len, work.scored)),
    }
    return Made(score, tokens, sum(map(len, work.scored)), figures=figures)


# ---------------------------------------------------------------- steps on a pack


def autotuned(setting: Setting) -> Iterator[Row]:
    """A training step: eager, compiled as mlmkit does, and with every kernel chosen by trial."""
    from mlmkit.train.layers import encoder_layers

    def compile_layers(mode: str, model: Any) -> None:
        for layer in encoder_layers(model):
            layer.compile(**({"mode": mode} if setting.device == "cuda" else {"backend": "aot_eager"}))

    makers = {"eager": partial(step_on_pack, setting)}
    for name, mode in {"compiled": "default", f"compiled, {AUTOTUNE}": AUTOTUNE}.items():
        makers[name] = partial(step_on_pack, setting, partial(compile_layers, mode))
    yield from compared(setting, makers, "compiled")


def flash_attention(setting: Setting) -> Iterator[Row]:
    """A training step with each implementation that torch knows, beside torch's own kernel, measured first."""
    import torch
    from torch.nn import attention

    if not hasattr(attention, "activate_flash_attention_impl"):
        raise SkippedError(f"torch {torch.__version__} has no activate_flash_attention_impl")
    made = step_on_pack(setting)
    default = seconds_a_call(made.call, setting.device)

    def figures(seconds: float) -> Figures:
        found = {"ms a call": 1e3 * seconds, "tokens/s": made.tokens / seconds, "x the default": default / seconds}
        return found | {"loss": float(made.call())}

    def activated(name: str) -> Figures:
        if setting.device == "cpu":
            raise SkippedError(NEEDS_GPU)
        attention.activate_flash_attention_impl(name)  # gives up what was activated before
        return figures(seconds_a_call(made.call, setting.device))

    yield "torch's own", figures(default)
    for name in attention.list_flash_attention_impls():
        yield attempt(name, activated, name)
    if attention.current_flash_attention_impl() and hasattr(attention, "restore_flash_attention_impl"):
        attention.restore_flash_attention_impl()


def step_on_pack(setting: Setting, prepare: Callable[[Any], None] = lambda _: None) -> Made:
    """Forward and backward of BERT-base on a pack of fixed shape, under bfloat16 autocast."""
    import torch

    from mlmkit.packing import enable_packing, packed_inputs

    model = load_model(setting.checkpoint("bert-base"), "cpu", "float32")
    if not enable_packing(model):
        raise SkippedError("bert-base cannot be packed")
    model.to(setting.device).train()
    prepare(model)
    batch = real_batch(*((4, 64) if setting.quick else (64, 512)), ragged=True)
    pack, positions = fixed_pack(batch, model.position_offset)
    inputs = to_device(packed_inputs(pack), setting.device)
    positions, targets = positions.to(setting.device), torch.from_numpy(batch.targets).to(setting.device)

    def step() -> Any:
        with torch.autocast(setting.device, torch.bfloat16):
            loss = model.loss_sum(positions, targets, **inputs) / len(targets)
        loss.backward()
        model.zero_grad()
        return loss.detach()

    return Made(step, int(batch.attention_mask.sum()), figures={"loss": float(step())})
