"""What a BERT-specific forward could save in exact pseudo-log-likelihood: in theory, and in time on the CPU.

The rows of a sentence are copies of it that differ at one position, the masked one, and are scored there alone. So

- share_first: the first layer's embeddings and projections to query, key and value are those of the sentence, but for
  the masked position's, which depend on the position alone and are one row a position for all sentences,
- prune_last: the last layer needs keys and values of all positions, but queries, output projection and feed-forward
  of the masked position only.

Theory counts two operations a multiply-add, of the matrix products in layers and vocabulary head, for a sentence of
20 tokens between two special ones, at BERT-base's width. Time is that of a forward written by hand on the weights of
transformers' BertForMaskedLM (random), whose log-probabilities are held to that model's first.
"""

import argparse
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import Report, Table, alternate, main, timed
from inputs import bert_tokenizer, sentences
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

TOKENS, HIDDEN, INNER, ENTRIES = 20, 768, 3072, 30522
SENTENCES_A_BATCH = 4  # about 1,800 tokens: larger batches leave the cache
BOUND = 1e-4  # nats
VARIANTS = {"plain": (False, False), "share_first": (True, False), "prune_last": (False, True), "both": (True, True)}


def bert(layers: int) -> BertForMaskedLM:
    """BERT-base's shape but for the number of layers; the same random weights each time."""
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(vocab_size=ENTRIES, num_hidden_layers=layers)).eval()


# ---------------------------------------------------------------- the forward by hand


class Copies(NamedTuple):
    """Some sentences and their masked copies.

    `sentences` `[sentences, seq]`, padded; `rows` `[copies, seq]`; `sentence`, `place` and `target` `[copies]`: whose
    copy it is, where the mask is, and what it hides. `seen` `[copies, 1, 1, seq]` is False at padding.
    """

    sentences: Tensor
    rows: Tensor
    sentence: Tensor
    place: Tensor
    target: Tensor
    seen: Tensor


def copies_of(texts: list[list[int]], tokenizer: Any) -> Copies:
    """From the ids of sentences, special tokens first and last."""
    longest = max(map(len, texts))
    sentences = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids in texts])
    lengths = torch.tensor([len(ids) for ids in texts])
    column = torch.arange(longest)
    sentence, place = ((column > 0) & (column < lengths[:, None] - 1)).nonzero(as_tuple=True)
    every = torch.arange(len(place))
    rows = sentences[sentence]
    target = rows[every, place]
    rows[every, place] = tokenizer.mask_token_id
    return Copies(sentences, rows, sentence, place, target, (column < lengths[:, None])[sentence, None, None])


def log_probs(model: BertForMaskedLM, copies: Copies, mask_id: int, share_first: bool, prune_last: bool) -> Tensor:
    """Log-probability of the hidden token of each copy, `[copies]`; a model of two layers or more."""
    (first, *inner, last), every = model.bert.encoder.layer, torch.arange(len(copies.place))
    if share_first:
        sentences = embedded_and_projected(model, copies.sentences)
        masks = embedded_and_projected(model, torch.full_like(copies.sentences[:1], mask_id))
        states, *projected = (spread(*both, copies) for both in zip(sentences, masks, strict=True))
    else:
        states, *projected = embedded_and_projected(model, copies.rows)
    states = after_attention(first, projected, states, copies.seen)
    for layer in inner:
        states = after_attention(layer, [part(states) for part in projections(layer)], states, copies.seen)
    query, key, value = projections(last)
    kept = states[every, copies.place].unsqueeze(1) if prune_last else states
    states = after_attention(last, [query(kept), key(states), value(states)], kept, copies.seen)
    scored = states[:, 0] if prune_last else states[every, copies.place]
    return model.cls(scored).log_softmax(-1)[every, copies.target]


def projections(layer: Any) -> tuple[Any, Any, Any]:
    """A layer's query, key and value."""
    attention = layer.attention.self
    return attention.query, attention.key, attention.value


def embedded_and_projected(model: BertForMaskedLM, ids: Tensor) -> list[Tensor]:
    """Embeddings, and the first layer's queries, keys and values, `[rows, seq, hidden]` each."""
    states = model.bert.embeddings(ids)
    return [states, *(part(states) for part in projections(model.bert.encoder.layer[0]))]


def spread(sentences: Tensor, masks: Tensor, copies: Copies) -> Tensor:
    """`[sentences, seq, hidden]` and, of a mask at each position, `[1, seq, hidden]` → `[copies, seq, hidden]`."""
    rows = sentences[copies.sentence]
    rows[torch.arange(len(rows)), copies.place] = masks[0, copies.place]
    return rows


def after_attention(layer: Any, projected: list[Tensor], states: Tensor, seen: Tensor) -> Tensor:
    """The layer's output at the positions that `states` and the queries have, `[copies, 1 or seq, hidden]`."""
    context = F.scaled_dot_product_attention(*map(heads, projected), attn_mask=seen).transpose(1, 2).flatten(2)
    return layer.feed_forward_chunk(layer.attention.output(context, states))


def heads(states: Tensor) -> Tensor:
    """`[copies, seq, hidden]` → `[copies, heads, seq, 64]`."""
    return states.unflatten(-1, (-1, 64)).transpose(1, 2)


# ---------------------------------------------------------------- theory and time


def operations(layers: int, share_first: bool, prune_last: bool) -> int:
    """Of one sentence, all its copies."""
    seq = TOKENS + 2
    square, feed_forward = 2 * HIDDEN * HIDDEN, 4 * HIDDEN * INNER  # a position's
    attention = 4 * seq * HIDDEN  # a query's
    head = square + 2 * HIDDEN * ENTRIES
    total = TOKENS * (layers * seq * (4 * square + feed_forward + attention) + head)
    if share_first:
        total -= (TOKENS - 1) * seq * 3 * square  # the masks' row a position is shared by all sentences
    if prune_last:
        total -= TOKENS * (seq - 1) * (2 * square + feed_forward + attention)
    return total


def check(model: BertForMaskedLM, copies: Copies, mask_id: int) -> None:
    """That every variant gives what transformers gives."""
    every = torch.arange(len(copies.rows))
    logits = model(copies.rows, copies.seen[:, 0, 0].long()).logits[every, copies.place]
    expected = logits.log_softmax(-1)[every, copies.target]
    for name, flags in VARIANTS.items():
        worst = (log_probs(model, copies, mask_id, *flags) - expected).abs().max().item()
        assert worst <= BOUND, f"{name} is {worst:.1e} nats off"


def saved(layers: int, texts: list[list[int]], tokenizer: Any, rounds: int) -> dict[str, list[float]]:
    """The share of the plain forward's time that each variant saves, in each round over all batches."""
    model = bert(layers)
    check(model, copies_of([texts[0], texts[-1]], tokenizer), tokenizer.mask_token_id)  # the shorter one is padded
    batches = [copies_of(texts[i : i + SENTENCES_A_BATCH], tokenizer) for i in range(0, len(texts), SENTENCES_A_BATCH)]

    def forward(flags: tuple[bool, bool]) -> None:
        for copies in batches:
            log_probs(model, copies, tokenizer.mask_token_id, *flags)

    taken = alternate({name: partial(timed, forward, flags) for name, flags in VARIANTS.items()}, rounds)
    return {
        name: [1 - time / plain for time, plain in zip(times, taken["plain"], strict=True)]
        for name, times in taken.items()
    }


def measure(options: argparse.Namespace) -> Report:
    """A row a number of layers and variant."""
    torch.set_num_threads(options.threads)
    tokenizer = bert_tokenizer()
    texts = sorted(tokenizer(sentences(options.sentences, TOKENS, tokenizer))["input_ids"], key=len)
    rows, figures = [], {}
    for layers in options.layers:
        with torch.inference_mode():
            figures[layers] = saved(layers, texts, tokenizer, options.rounds)
        for name, flags in list(VARIANTS.items())[1:]:
            theory = 1 - operations(layers, *flags) / operations(layers, False, False)
            rows.append([layers, name, f"{theory:.1%}", f"{median(figures[layers][name]):.1%}"])
    return Report([Table("", ["layers", "variant", "saved in theory", "saved in time"], rows)], figures=figures)


if __name__ == "__main__":
    main(__doc__, measure, layers=((2, 6), (2,)), sentences=(12, 4), rounds=(2, 1))
