"""Show a set as it will be scored, and everything that is wrong with it: `mlmkit eval MODEL --check-set FILE`.

rows → items, and a problem for each row that holds none → what the model reads for the first three items
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mlmkit.backends import Backend, capacity
from mlmkit.errors import UserError
from mlmkit.eval.data import Part
from mlmkit.eval.item_data import ItemData
from mlmkit.eval.items import Item
from mlmkit.eval.rows import Settings, how_masked
from mlmkit.eval.scoring import build_batch
from mlmkit.eval.sets import Request

EXAMPLES = 3


def check_set(request: Request, backend: Backend, settings: Settings) -> tuple[list[str], list[str]]:
    """Lines that show what a set of items holds, and a line for each problem that keeps it from being evaluated.

    Raises `UserError` for a set of text.
    """
    if request.task == "text":
        raise UserError(f"{request.name} holds text: --check-set is for pairs, choices and cloze items")
    items, problems = _read(request)
    try:
        data = ItemData(items, backend.tokenizer, {}, request.task, request.columns)
    except UserError:  # all are blank, or there are none
        return [], [*problems, f"{request.location}: it holds no items that can be scored"]
    targets = data.pseudo_targets()
    return [
        *_examples(data, targets, backend, settings),
        *_summary(data, settings),
        *_warnings(data, targets, capacity(backend)),
    ], problems


def _read(request: Request) -> tuple[list[Item], list[str]]:
    """The items, and a line for each kind of problem."""
    items: list[Item] = []
    rows: dict[str, list[str]] = {}  # that have a problem
    problems: list[str] = []
    try:
        for group in request.columns.groups(request.rows()):
            where = group[0][0]
            try:
                items.append(request.columns.item(group, request.numbers))
            except UserError as error:
                rows.setdefault(str(error).removeprefix(where), []).append(where)
    except UserError as error:
        problems.append(f"{error} (what follows was not read)")
    for problem, places in rows.items():
        more = f" (and {len(places) - 1} more like it)" if len(places) > 1 else ""
        problems.append(f"{places[0] if problem[0] in ' ,:' else ''}{problem}{more}")
    try:
        return request.select(items), problems
    except UserError as error:
        return items, [*problems, str(error)]


def _examples(data: ItemData, targets: NDArray[np.int64] | None, backend: Backend, settings: Settings) -> Iterator[str]:
    """For each option of the first items: its text, the tokens that are scored, and what the model reads for one."""
    items, tokenizer, task = data.items[:EXAMPLES], backend.tokenizer, data.source["task"]
    corpus = data.corpus.part(0, int(data.first[len(items)]))
    (pseudo,) = settings.passes(targets)
    rows = pseudo.rows(Part(0, 0, 0, corpus), tokenizer, capacity(backend))
    names = data.source["sides"] or (["target", "the word before"] if task == "cloze" else [])
    for index, item in enumerate(items):
        yield " / ".join(filter(None, (f"item {index}", item.phenomenon, item.paradigm, item.id)))
        for number, option in enumerate(item.options):
            name = names[number] if names else f"choice {number}{' (right)' if number == item.label else ''}"
            (own,) = np.nonzero(rows.document == data.first[index] + number)
            ids = corpus.ids[corpus.starts[rows.document[own]] + rows.offset[own]]
            yield f"  {name}: {option.text}"
            yield f"    scored: {' '.join(map(tokenizer.token, ids.tolist())) or 'nothing'}"
            if len(own):
                read = build_batch(corpus, rows, own[:1], tokenizer)[0].input_ids[0]
                yield f"    the model reads, for the first of these: {' '.join(map(tokenizer.token, read.tolist()))}"


def _summary(data: ItemData, settings: Settings) -> Iterator[str]:
    """What is compared, and how many items there are of each phenomenon and paradigm."""
    source, masked = data.source, how_masked(settings.variant, settings.appended_masks)
    shared = " that both sentences share" if source["scoring"] == "shared" else ""
    per = "" if source["normalisation"] == "none" else f", divided by the number of scored {source['normalisation']}"
    yield f"{len(data.items)} items with {len(data.options)} options"
    yield f"score: the sum of the log-probabilities of the scored tokens{shared}, {masked}{per}"
    if source["task"] != "cloze":
        yield f"compared: an item counts if its {(source['sides'] or ['right'])[0]} option has the greatest score"
    groups = Counter((item.phenomenon, item.paradigm) for item in data.items)
    for names, count in sorted(groups.items()) if len(groups) > 1 else ():
        yield f"{' / '.join(filter(None, names)) or 'without a paradigm'}: {count} items"


def _warnings(data: ItemData, targets: NDArray[np.int64] | None, capacity: int) -> Iterator[str]:
    """Warnings about the items, one line for each kind."""
    corpus, columns = data.corpus, data.document_columns(0, len(data.corpus))
    scored = corpus.lengths if targets is None else np.diff(np.searchsorted(targets, corpus.starts))
    of_options = {
        "options with the same tokens, which tie": columns["same_ids"].to_numpy(zero_copy_only=False),
        "an option without a scored token": scored == 0,
        "an option longer than the model takes, which is read in windows": corpus.lengths > capacity,
        "characters that the tokenizer does not know": corpus.text_sizes[:, 3] > 0,
    }
    kinds = {kind: np.unique(columns["item"].to_numpy()[odd]).tolist() for kind, odd in of_options.items()}
    seen = Counter((item.options, item.label) for item in data.items)
    kinds["a copy in the set"] = [i for i, item in enumerate(data.items) if seen[item.options, item.label] > 1]
    for kind, which in kinds.items():
        if which:
            yield f"warning: {len(which)} of {len(data.items)} items have {kind}; the first is item {which[0]}"
    if corpus.empty_texts:
        yield f"warning: {corpus.empty_texts} items with an empty text are left out"
