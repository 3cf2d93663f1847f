"""The least and the most expected tokens of an evaluation, each in its context, for the report.

tokens.parquet → the extremes of a pass → their documents, read again → `examples` of result.json
"""

import logging
from dataclasses import fields
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mlmkit.corpus import Corpus
from mlmkit.errors import UserError
from mlmkit.eval.columns import as_numpy
from mlmkit.eval.data import EvalData, file_data
from mlmkit.eval.results_store import StoredResult, read_blocks
from mlmkit.eval.rows import Pass
from mlmkit.hub import HUB
from mlmkit.locations import Source, is_remote
from mlmkit.masking import document_key
from mlmkit.stored import StoredCorpus
from mlmkit.tokenizer import LONGEST_TEXT, Tokenizer

EXAMPLES = 12
CONTEXT = 14  # tokens shown on either side of an example

Example = dict[str, Any]

log = logging.getLogger(__name__)


def token_examples(folder: Path, item: Pass, data: EvalData, tokenizer: Tokenizer) -> dict[str, list[Example]]:
    """The `worst` and `best` tokens of a pass, at most one per document, each with its neighbours and their scores.

    Where the documents can be read again, an example has the `text` that its tokens stand in, as the document spells
    it, and each token the `span` of its characters in that text, in code points.
    """
    chosen: dict[str, list[tuple[float, int, Example]]] = {"worst": [], "best": []}
    for tokens, _ in read_blocks(folder, item.metric, item.mask_seed):
        log_prob, document = as_numpy(tokens["log_prob"]), as_numpy(tokens["document"])
        for name, sign in (("worst", 1.0), ("best", -1.0)):
            order = np.argsort(sign * log_prob, kind="stable")
            first_of_document = np.sort(np.unique(document[order], return_index=True)[1])
            for row in order[first_of_document[:EXAMPLES]].tolist():
                example = _in_context(tokens, row, data.corpus, tokenizer)
                chosen[name].append((sign * float(log_prob[row]), int(document[row]), example))
            chosen[name] = sorted(chosen[name])[:EXAMPLES]
    examples = {name: [example for _, _, example in ranked] for name, ranked in chosen.items()}
    _add_document_texts([*chain.from_iterable(examples.values())], data, tokenizer)
    return examples


def _in_context(tokens: pa.Table, row: int, corpus: Corpus | StoredCorpus, tokenizer: Tokenizer) -> Example:
    token = tokens.slice(row, 1).to_pylist()[0]
    document, offset = token["document"], token["offset"]
    begin, end = np.searchsorted(as_numpy(tokens["document"]), [document, document + 1]).tolist()
    neighbours = tokens.slice(begin, end - begin)
    log_prob = dict(zip(neighbours["offset"].to_pylist(), neighbours["log_prob"].to_pylist(), strict=True))
    own = corpus.part(document, document + 1)
    shown = range(max(offset - CONTEXT, 0), min(offset + CONTEXT + 1, len(own.ids)))
    words = [int(own.words[at]) for at in shown]
    return {
        "document": document,
        "offset": offset,
        "log_prob": token["log_prob"],
        "rank": token["rank"],
        "shown": tokenizer.readable(token["input_id"]),
        "guess": None if token["top_id"] is None else tokenizer.readable(token["top_id"]),
        "target": offset - shown.start,
        "cut": [shown.start > 0, shown.stop < len(own.ids)],
        "tokens": [
            {
                "text": tokenizer.readable(int(own.ids[at])),
                "begins_word": number == 0 or words[number] != words[number - 1],
                "log_prob": log_prob.get(at),
            }
            for number, at in enumerate(shown)
        ],
    }


def _add_document_texts(examples: list[Example], data: EvalData, tokenizer: Tokenizer) -> None:
    """Add `text` and the tokens' `span` to the examples, where their documents can be read again unchanged."""
    wanted: dict[int, list[Example]] = {}
    for example in examples:
        wanted.setdefault(example["document"], []).append(example)
    try:
        for document, text in enumerate(islice(data.texts(), max(wanted, default=-1) + 1)):
            if document in wanted and len(text) <= LONGEST_TEXT:
                key = data.corpus.part(document, document + 1).keys[0]
                if document_key(text) == key:
                    _add_text(wanted[document], text, tokenizer)
    except (UserError, OSError) as error:  # an OSError if the text is remote and does not answer any more
        log.warning("examples are shown without their text, because it cannot be read again: %s", error)


def _add_text(examples: list[Example], text: str, tokenizer: Tokenizer) -> None:
    """Add to examples of one document what its `text` says."""
    (spans,) = tokenizer.spans([text])
    for example in examples:
        first = example["offset"] - example["target"]
        own = spans[first : first + len(example["tokens"])]
        begin, end = int(own[:, 0].min()), int(own[:, 1].max())
        example["text"] = text[begin:end]
        for token, span in zip(example["tokens"], (own - begin).tolist(), strict=True):
            token["span"] = span


def add_texts(tokens: list[Example], stored: StoredResult) -> str:
    """Add to tokens of a finished evaluation the `text` around each, its `span` in that text and where it is `cut`.

    Each has a `document` and an `offset`. The text and the tokenizer are read again. Returns why there is no text, or
    "".
    """
    result = stored.result
    source = dict(result["corpus"]["source"])
    locations = source.pop("locations", None)
    if not locations or any(location.startswith(HUB) or is_remote(location) for location in locations):
        return "the text is not in a local file"
    try:
        tokenizer = Tokenizer.from_folder(Path(result["model"]["path"]))
        if tokenizer.fingerprint != result["model"]["tokenizer"]:  # it would tokenise the whole text
            return f"{result['model']['path']} has another tokenizer now"
        known = {field.name for field in fields(Source)} - {"location"}
        reading: dict[str, Any] = {name: value for name, value in source.items() if name in known}
        reading["keys"] = tuple(source["keys"])
        data = file_data(Source(tuple(locations), **reading), tokenizer)
    except UserError as error:
        return str(error)
    if data.corpus.fingerprint != result["corpus"]["fingerprint"]:
        return f"{source['location']} has changed since"
    lengths, examples = data.corpus.lengths, []
    for token in tokens:
        target = min(token["offset"], CONTEXT)
        count = target + min(int(lengths[token["document"]]) - token["offset"], CONTEXT + 1)
        examples.append({**token, "target": target, "tokens": [{} for _ in range(count)]})
    _add_document_texts(examples, data, tokenizer)
    for token, example in zip(tokens, examples, strict=True):
        if "text" in example:
            end = token["offset"] - example["target"] + len(example["tokens"])
            cut = [token["offset"] > example["target"], end < int(lengths[token["document"]])]
            token |= {"text": example["text"], "span": example["tokens"][example["target"]]["span"], "cut": cut}
    return "" if any("text" in token for token in tokens) else "only the tokens of the text are there"
