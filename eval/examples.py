"""The least and the most expected tokens, each in its context, for the report."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mlmkit.corpus import Corpus
from mlmkit.eval.passes import Pass
from mlmkit.eval.stored import read_blocks
from mlmkit.tokenizer import Tokenizer

EXAMPLES = 12
CONTEXT = 14  # tokens on either side


def token_examples(folder: Path, item: Pass, corpus: Corpus, tokenizer: Tokenizer) -> dict[str, list[dict[str, Any]]]:
    """`worst` and `best` tokens of a pass, one a document at most, each with its neighbours and their scores."""
    chosen: dict[str, list[tuple[float, int, dict[str, Any]]]] = {"worst": [], "best": []}
    for tokens, _ in read_blocks(folder, item.metric, item.mask_seed):
        log_prob, document = tokens["log_prob"].to_numpy(), tokens["document"].to_numpy()
        for name, sign in (("worst", 1.0), ("best", -1.0)):
            order = np.argsort(sign * log_prob, kind="stable")
            first_of_document = np.sort(np.unique(document[order], return_index=True)[1])
            for row in order[first_of_document[:EXAMPLES]].tolist():
                context = _in_context(tokens, row, corpus, tokenizer)
                chosen[name].append((sign * float(log_prob[row]), int(document[row]), context))
            chosen[name] = sorted(chosen[name])[:EXAMPLES]
    return {name: [context for _, _, context in found] for name, found in chosen.items()}


def _in_context(tokens: pa.Table, row: int, corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Any]:
    here = tokens.slice(row, 1).to_pylist()[0]
    d, offset = here["document"], here["offset"]
    begin, end = (int(place) for place in np.searchsorted(tokens["document"].to_numpy(), [d, d + 1]))
    scored = dict(zip(tokens["offset"][begin:end].to_pylist(), tokens["log_prob"][begin:end].to_pylist(), strict=True))
    first, length = int(corpus.starts[d]), int(corpus.starts[d + 1] - corpus.starts[d])
    span = range(max(offset - CONTEXT, 0), min(offset + CONTEXT + 1, length))
    words = [int(corpus.words[first + place]) for place in span]
    shown = [
        {
            "text": tokenizer.readable(int(corpus.ids[first + place])),
            "begins_word": number == 0 or words[number] < 0 or words[number] != words[number - 1],
            "log_prob": scored.get(place),
        }
        for number, place in enumerate(span)
    ]
    return {
        "document": d,
        "offset": offset,
        "log_prob": here["log_prob"],
        "rank": here["rank"],
        "shown": tokenizer.readable(here["input_id"]),
        "guess": None if here["top_id"] is None else tokenizer.readable(here["top_id"]),
        "target": offset - span.start,
        "cut": [span.start > 0, span.stop < length],
        "tokens": shown,
    }
