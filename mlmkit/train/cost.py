"""What a run costs: operations, memory and time, which `mlmkit train --dry-run` shows before anything is trained."""

import copy
import math
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mlmkit.backends.torch import pick_device
from mlmkit.distributed import Ranks
from mlmkit.errors import UserError
from mlmkit.model import MaskedLM, probe_inputs
from mlmkit.packing import PACKED_ATTENTION, Pack, packed_inputs
from mlmkit.stored import StoredCorpus
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.checkpoints import is_out_of_memory
from mlmkit.train.config import Config
from mlmkit.train.data import MicroBatch
from mlmkit.train.log import check_loggers
from mlmkit.train.model_setup import build_model, fit_model
from mlmkit.train.optimisers import build_optimizers
from mlmkit.train.order import Cursor
from mlmkit.train.precision import resolve_precision
from mlmkit.train.start import begin_or_check, corpora_of, prepare
from mlmkit.train.step import LossModule, backward, update

SHOWN_DOCUMENTS, SHOWN_CHARACTERS = 6, 400
# Dense bfloat16 rate in TFLOP/s, by a pattern in the name of torch.cuda.get_device_name; the first match counts.
# From NVIDIA's data sheets, halved where they quote sparsity; for GeForce from the architecture white papers, with
# float32 accumulation.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "G?H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A40": 149.7,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def peak_flops(gpu: str) -> float:
    """Dense bfloat16 operations per second of the GPU with this name; 0 if it is unknown."""
    return next((1e12 * rate for name, rate in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b(?! Laptop)", gpu)), 0.0)


# ---------------------------------------------------------------- floating-point operations


def flops_per_token(model: MaskedLM, lengths: NDArray[np.int64], mask_prob: float) -> float:
    """Operations per real token, forward and backward, for documents of `lengths` `[documents]` tokens.

    `6 M + 6 m H + 12 Σ_layers h s`. M counts the weights of the encoder's matrices, each as often as it is used, and H
    those of the head; m is the masked share, h the hidden size, and s how many tokens a token attends to, itself
    included: its document, or at most a sliding window. A multiply-add is two operations and the backward pass takes
    two forward passes (Kaplan et al. 2020, section 2.1; Chowdhery et al. 2022, appendix B). Recomputation does not
    count.

    M and H are measured on a few tokens, so no architecture needs a formula. The model must be on the CPU.
    """
    tokens = min(8, model.max_length())
    with_head, without = (_matrix_flops(model, tokens, masked) for masked in (tokens, 0))
    config = model.network.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    attended = sum(_attended(lengths, _window(config) if kind == "sliding_attention" else None) for kind in kinds)
    head = (with_head - without) / tokens
    return 3 * (without / tokens + mask_prob * head) + 12 * config.hidden_size * attended


def _matrix_flops(model: MaskedLM, tokens: int, masked: int) -> int:
    """Operations of one forward pass over a document of `tokens`, without attention's own products."""
    inputs = probe_inputs(model, [tokens])
    del inputs["positions"]
    if model.network.config._attn_implementation == PACKED_ATTENTION:
        position_ids = torch.arange(tokens).unsqueeze(0) + model.position_offset
        inputs = packed_inputs(Pack(inputs["input_ids"], position_ids, torch.tensor([0, tokens]).int(), tokens))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(torch.arange(masked), **inputs)
    counts = counter.get_flop_counts().get("Global", {})
    kinds = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)
    return sum(counts.get(kind, 0) for kind in kinds)


def _window(config: Any) -> int:
    """The full width: `local_attention` in ModernBERT; `sliding_window` elsewhere in transformers is half of it."""
    return getattr(config, "local_attention", None) or 2 * config.sliding_window


def _attended(lengths: NDArray[np.int64], window: int | None) -> float:
    """How many tokens a token attends to, averaged over tokens."""
    seen = lengths if window is None else np.minimum(lengths, window)
    return float((lengths * seen).sum() / lengths.sum())


# ---------------------------------------------------------------- the dry run


@dataclass(frozen=True)
class DryRun:
    """What `--dry-run` reports. Everything per step is measured on the first one.

    `tokens` are real ones, special tokens included and padding not; `fill` is their share of the batch size, `masked`
    the share of them that is predicted. `flops_per_token` counts forward and backward. `state_bytes` holds weights,
    gradients and optimiser state. `step_seconds` is for one process, from one micro-batch that is timed once warm.
    `first_batch` shows the first micro-batch, one text per document: `[MASK→original]`, `[random→original]`, and
    `[=original]` where the token was kept.
    """

    architecture: str
    vocabulary: int
    parameters: int
    documents: int
    corpus_tokens: int
    packed: bool
    micro_batches: int
    micro_batch_tokens: int
    masked: float
    fill: float
    tokens_per_step: int
    steps: int
    tokens: int
    epochs: float
    flops_per_token: float
    flops: float
    device: str
    precision: str
    state_bytes: int
    step_seconds: float
    first_batch: list[str]


def dry_run(config: Config, start_from: Path | None = None) -> dict[str, DryRun]:
    """The report on each phase by name, or on the run as "" if it has no phases.

    Prepares training in a temporary folder, and times the first micro-batch. Raises `UserError` as training does.
    """
    check_loggers(config.train)
    precision = resolve_precision(config.train.precision, pick_device(config.train.device))
    config = replace(config, train=replace(config.train, precision=precision))
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer, texts = begin_or_check(config, Path(temporary) / "run", Ranks(), start_from)
    reports, model = {}, None
    for name, phase in config.phases.items():
        if model:
            model = fit_model(model, tokenizer, tokenizer, phase.model)
        else:
            model = build_model(phase, tokenizer, resume_from=start_from)
        reports[name] = _dry_run(phase, copy.deepcopy(model), tokenizer, corpora_of(phase, texts))
    return reports


def _dry_run(config: Config, model: MaskedLM, tokenizer: Tokenizer, corpora: Sequence[StoredCorpus]) -> DryRun:
    data = prepare(model, config, tokenizer, corpora)
    run, device = config.train, torch.device(pick_device(config.train.device))
    micro_batches = run.global_batch_tokens // run.micro_batch_tokens
    packs = islice(data.rows.packs(Cursor()), micro_batches)
    recipe = config.masking.recipe(0.0)
    batch = [data.lay_out(data.rows.build(block.take(members), recipe)) for _, block, members in packs]
    lengths = np.concatenate([micro.lengths for micro in batch])
    tokens = sum(micro.tokens for micro in batch)
    masked = sum(len(micro.targets) for micro in batch) / tokens
    flops = flops_per_token(model, lengths, masked)

    model.to(device).train()
    optimizers = build_optimizers(model, config.optim)
    began = 0.0
    try:
        for _ in ("allocates memory, chooses kernels", "is timed"):
            began = time.perf_counter()
            backward(LossModule(model), batch[:1], [run.seed], scale=1.0, device=device, precision=run.precision)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory with train.micro_batch_tokens = {run.micro_batch_tokens}: lower it") from error
    micro_batch_seconds = time.perf_counter() - began
    update(optimizers, 0.0)
    if device.type == "cuda":
        torch.cuda.synchronize()  # `backward` waits for its kernels when it reads the loss; the update does not
    step_seconds = time.perf_counter() - began + micro_batch_seconds * (micro_batches - 1)
    states = (chain.from_iterable(state.values() for state in each.state.values()) for each in optimizers)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = [*model.parameters(), *trained, *(value for value in chain(*states) if isinstance(value, Tensor))]
    schedule = data.rows.schedule
    steps = math.ceil(schedule.total / tokens) if schedule.in_tokens else schedule.total
    all_tokens = schedule.total if schedule.in_tokens else tokens * steps
    return DryRun(
        architecture=config.model.init_from or config.model.architecture,
        vocabulary=model.vocabulary_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        documents=sum(len(corpus) for corpus in corpora),
        corpus_tokens=sum(corpus.tokens for corpus in corpora),
        packed=data.packed,
        micro_batches=micro_batches,
        micro_batch_tokens=run.micro_batch_tokens,
        masked=masked,
        fill=tokens / run.global_batch_tokens,
        tokens_per_step=tokens,
        steps=steps,
        tokens=all_tokens,
        epochs=all_tokens / data.rows.epoch_tokens,
        flops_per_token=flops,
        flops=flops * all_tokens,
        device=device.type,
        precision=run.precision,
        state_bytes=sum(tensor.numel() * tensor.element_size() for tensor in kept),
        step_seconds=step_seconds,
        first_batch=decode(tokenizer, batch[0]),
    )


def figures(report: DryRun) -> dict[str, str]:
    """Size and cost of the run by name, for a console."""
    whole_run = timedelta(seconds=round(report.step_seconds * report.steps))
    return {
        "model": f"{report.architecture}, {_short(report.parameters)} parameters, vocabulary {report.vocabulary:,}",
        "text": f"{report.documents:,} documents, {report.corpus_tokens:,} tokens",
        "per step": f"{report.tokens_per_step:,} tokens in {report.micro_batches} × {report.micro_batch_tokens:,}, "
        f"{'packed' if report.packed else 'padded'} to {report.fill:.1%}; {report.masked:.1%} masked",
        "the run": f"{report.steps:,} steps, {_short(report.tokens)} tokens, {report.epochs:.2f} epochs",
        "operations": f"{_short(report.flops_per_token)}FLOP per token, {_short(report.flops)}FLOP in all",
        "time": f"{report.step_seconds:.3g} s per step, {whole_run} in all on one {report.device}, "
        f"{report.precision} (first micro-batch)",
        "memory": f"{_short(report.state_bytes)}B for weights, gradients and optimiser",
    }


def first_texts(report: DryRun) -> list[str]:
    """The beginning of the first micro-batch, for a console."""
    texts = report.first_batch[:SHOWN_DOCUMENTS]
    more = len(report.first_batch) - len(texts)
    return [
        "first micro-batch: [MASK→original], [random→original], [=original] where the token was kept",
        *(f"  {text[:SHOWN_CHARACTERS]}{'…' if len(text) > SHOWN_CHARACTERS else ''}" for text in texts),
        *([f"  and {more:,} more documents"] if more else []),
    ]


def _short(value: float) -> str:
    """The value to three digits with an SI prefix."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "


def decode(tokenizer: Tokenizer, micro: MicroBatch) -> list[str]:
    """The documents of a micro-batch as texts that show what was done to each token, as in `DryRun.first_batch`."""
    ids = micro.inputs["input_ids"].flatten().tolist()
    original = dict(zip(micro.positions.tolist(), micro.targets.tolist(), strict=True))

    def shown(id: int) -> str:
        return tokenizer.decode([id]).strip() or tokenizer.token(id)

    def mark(position: int) -> str:
        before, after = original[position], ids[position]
        if before == after:
            return f"[={shown(before)}]"
        return f"[{'MASK' if after == tokenizer.mask_id else shown(after)}→{shown(before)}]"

    is_packed = "cu_seq_lens_q" in micro.inputs
    width = micro.inputs["input_ids"].shape[1]
    begins = np.cumsum(micro.lengths) - micro.lengths if is_packed else np.arange(len(micro.lengths)) * width
    texts = []
    for begin, length in zip(begins.tolist(), micro.lengths.tolist(), strict=True):
        parts = []
        for is_target, group in groupby(range(begin, begin + length), key=original.__contains__):
            positions = list(group)
            parts += map(mark, positions) if is_target else [tokenizer.decode([ids[p] for p in positions]).strip()]
        texts.append(" ".join(parts))
    return texts
