"""What a configuration would train, and what it would cost, before anything is trained."""

import tempfile
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlmkit.backends.torch import pick_device
from mlmkit.distributed import Ranks
from mlmkit.packing import enable_packing
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.config import Config
from mlmkit.train.data import MicroBatch, TrainingData
from mlmkit.train.estimate import Parameters, count_parameters, flops_per_token, state_bytes
from mlmkit.train.log import check_loggers
from mlmkit.train.order import Cursor
from mlmkit.train.start import begin_or_check, build_model
from mlmkit.train.texts import token_shares

SAMPLED_TOKENS = 500_000  # fill and document lengths are those of so many
SHOWN_DOCUMENTS, SHOWN_CHARACTERS = 6, 400


@dataclass(frozen=True)
class DryRun:
    """`tokens` are real ones, special tokens included, padding never; `fill` is their share of the batch's size.

    `unknown_characters` and `unknown_tokens` are shares of the text. `flops_per_token` counts forward and backward,
    `state_bytes` weights, gradients and the optimizer's moments. `first_batch` is the first micro-batch, decoded, a
    text a document: `[MASK→original]`, `[random→original]`, and `[=original]` where it was left.
    """

    architecture: str
    vocabulary: int
    parameters: Parameters
    documents: int
    corpus_tokens: int
    unknown_characters: float
    unknown_tokens: float
    packed: bool
    micro_batches: int
    micro_batch_tokens: int
    masked: float
    fill: float
    tokens_per_step: float
    steps: int
    tokens: float
    epochs: float
    flops_per_token: float
    flops: float
    device: str
    state_bytes: int
    first_batch: list[str]


def dry_run(config: Config) -> DryRun:
    """Do all that training does before its first step, in a temporary folder. Raises `UserError` as training does."""
    check_loggers(config.train)
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer, corpora = begin_or_check(config, Path(temporary) / "run", Ranks())
        model = build_model(config, tokenizer)
    model.train()
    packed = enable_packing(model)
    data = TrainingData(config, corpora, tokenizer, packed=packed, position_offset=model.position_offset)
    settings = config.train
    micro_batches = settings.global_batch_tokens // settings.micro_batch_tokens
    sampled = min(settings.steps, max(1, SAMPLED_TOKENS // settings.global_batch_tokens))
    batches = [batch for _, batch in data.batches(Cursor(), micro_batches=micro_batches, steps=sampled)]

    flat = [micro for batch in batches for micro in batch]
    lengths = np.concatenate([document_lengths(micro) for micro in flat])
    tokens = sum(micro.tokens for micro in flat) / len(batches)
    masked = sum(len(micro.targets) for micro in flat) / len(batches) / tokens
    content = tokens - tokenizer.added_tokens * len(lengths) / len(batches)
    flops = flops_per_token(model, lengths, masked)
    device, sizes = pick_device(settings.device), np.sum([corpus.text_sizes.sum(axis=0) for corpus in corpora], axis=0)
    epoch_tokens = sum(len(corpus.ids) * weight for corpus, weight in zip(corpora, config.data.passes, strict=True))
    return DryRun(
        architecture=config.model.init_from or config.model.architecture,
        vocabulary=model.vocabulary_size,
        parameters=count_parameters(model),
        documents=sum(len(corpus) for corpus in corpora),
        corpus_tokens=sum(len(corpus.ids) for corpus in corpora),
        unknown_characters=float(sizes[3] / sizes[1]),
        unknown_tokens=token_shares(corpora, tokenizer)[0],
        packed=packed,
        micro_batches=micro_batches,
        micro_batch_tokens=settings.micro_batch_tokens,
        masked=masked,
        fill=tokens / settings.global_batch_tokens,
        tokens_per_step=tokens,
        steps=settings.steps,
        tokens=tokens * settings.steps,
        epochs=content * settings.steps / epoch_tokens,
        flops_per_token=flops,
        flops=flops * tokens * settings.steps,
        device=device,
        state_bytes=state_bytes(model, config.optim),
        first_batch=decode(tokenizer, flat[0]),
    )


def lines(found: DryRun) -> list[str]:
    """For a console."""
    size = found.parameters
    rows = {
        "model": f"{found.architecture}, vocabulary {found.vocabulary:,}",
        "parameters": f"{_short(size.total)}: embeddings {_short(size.embeddings)}, encoder {_short(size.encoder)}, "
        f"head {_short(size.head)}",
        "text": f"{found.documents:,} documents, {found.corpus_tokens:,} tokens, {found.unknown_tokens:.2%} of them "
        f"unknown ({found.unknown_characters:.2%} of the characters)",
        "a step": f"{found.tokens_per_step:,.0f} tokens in {found.micro_batches} × {found.micro_batch_tokens:,} "
        f"places, {'packed' if found.packed else 'padded'} to {found.fill:.1%}; {found.masked:.1%} masked",
        "the run": f"{found.steps:,} steps, {_short(found.tokens)} tokens, {found.epochs:.2f} epochs",
        "operations": f"{_short(found.flops_per_token)}FLOP a token, {_short(found.flops)}FLOP in all",
        "memory": f"{_short(found.state_bytes)}B on {found.device} for weights, gradients and optimizer",
    }
    texts = found.first_batch[:SHOWN_DOCUMENTS]
    more = len(found.first_batch) - len(texts)
    return [
        *(f"{name:12}{value}" for name, value in rows.items()),
        "first micro-batch, [MASK→original], [random→original], [=original] where it was left",
        *(f"  {text[:SHOWN_CHARACTERS]}{'…' if len(text) > SHOWN_CHARACTERS else ''}" for text in texts),
        *([f"  and {more:,} more documents"] if more else []),
    ]


def _short(value: float) -> str:
    """With the prefixes of the SI."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "


# ---------------------------------------------------------------- a micro-batch as documents


def document_lengths(micro: MicroBatch) -> NDArray[np.int64]:
    """Tokens of each document, special tokens included, `[documents]`."""
    return np.array([len(places) for places in _documents(micro)], dtype=np.int64)


def _documents(micro: MicroBatch) -> list[range]:
    """The flat places of each document. One without a token fills `cu_seqlens` up."""
    if "cu_seq_lens_q" in micro.inputs:
        ends = micro.inputs["cu_seq_lens_q"].tolist()
        spans = [range(begin, end) for begin, end in pairwise(ends)]
    else:
        mask = micro.inputs["attention_mask"]
        width = mask.shape[1]
        spans = [range(row * width, row * width + length) for row, length in enumerate(mask.sum(1).tolist())]
    return [span for span in spans if span]


def decode(tokenizer: Tokenizer, micro: MicroBatch) -> list[str]:
    """The documents of a micro-batch as texts that show what was done to each token."""
    ids = micro.inputs["input_ids"].flatten().tolist()
    original = dict(zip(micro.positions.tolist(), micro.targets.tolist(), strict=True))

    def shown(id: int) -> str:
        return tokenizer.decode([id]).strip() or tokenizer.token(id)

    def mark(place: int) -> str:
        before, after = original[place], ids[place]
        if before == after:
            return f"[={shown(before)}]"
        return f"[{'MASK' if after == tokenizer.mask_id else shown(after)}→{shown(before)}]"

    texts = []
    for places in _documents(micro):
        parts = []
        for is_target, group in groupby(places, key=original.__contains__):
            members = list(group)
            parts += map(mark, members) if is_target else [tokenizer.decode([ids[place] for place in members]).strip()]
        texts.append(" ".join(parts))
    return texts
