"""Which documents of an evaluated text a model was trained on, by document key.

training texts ── record_texts ──> RUN/texts.json: where their tokens are, and the overlap with each held-out text
RUN/texts.json ── find_overlap ──> the overlap of the text that `mlmkit eval` measures a model of the run on
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from mlmkit.corpus import Corpus
from mlmkit.errors import DamagedError
from mlmkit.files import RUN, read_record, write_record
from mlmkit.stored import StoredCorpus

log = logging.getLogger(__name__)

TEXTS = "texts.json"


class Overlap(TypedDict):
    """The documents of a text that are also in training texts, their share, and their number in each of these."""

    documents: int
    share: float
    texts: dict[str, int]


def shared_documents(keys: NDArray[np.uint64], blocks: Iterable[NDArray[np.uint64]]) -> NDArray[np.bool_]:
    """Which of the documents with these `keys` also occur in blocks of keys, `[documents]`.

    Takes memory for `keys` and one block.
    """
    distinct, document = np.unique(keys, return_inverse=True)
    occurs = np.zeros(len(distinct), np.bool_)
    for block in blocks:
        near = block[(block >= distinct[0]) & (block <= distinct[-1])]  # nothing if the documents are held out by key
        near.sort()  # makes the search seven times as fast for half a million keys
        at = np.searchsorted(distinct, near)
        occurs[at[distinct[at] == near]] = True
    return occurs[document]


def measure_overlap(corpus: Corpus | StoredCorpus, texts: Iterable[StoredCorpus]) -> Overlap:
    """The overlap of a corpus with training texts."""
    keys = np.concatenate([*corpus.key_blocks()])
    overlaps, counts = np.zeros(len(keys), np.bool_), {}
    for text in texts:
        shared = shared_documents(keys, text.key_blocks())
        overlaps |= shared
        if shared.any():
            counts[text.name] = int(shared.sum())
    documents = int(overlaps.sum())
    return {"documents": documents, "share": documents / len(keys), "texts": counts}


def describe_overlap(overlap: Overlap | None) -> str:
    """One line about an overlap, for messages; "" if there is none or it is not known."""
    if not overlap or not overlap["documents"]:
        return ""
    counts = ", ".join(f"{count} in {name}" for name, count in overlap["texts"].items())
    return f"{overlap['documents']} documents ({overlap['share']:.2%}) are also in the training text ({counts})"


def record_texts(
    run: Path, origin: str | Path, texts: Sequence[StoredCorpus], held_out: Sequence[StoredCorpus]
) -> None:
    """Write `RUN/texts.json` if it does not say all of this, and warn of held-out documents among the training texts.

    The training texts are `texts`, and those of the run that the model `origin` comes from, if it comes from one.
    """
    before = _read(run)
    tokens = _read(run_of(origin))["tokens"] | {str(text.folder.resolve()): text.name for text in texts}
    if before["tokens"] == tokens and all(corpus.fingerprint in before["overlap"] for corpus in held_out):
        return
    corpora, overlaps = _open(tokens), {}
    for corpus in held_out if corpora else ():
        overlap = overlaps[corpus.fingerprint] = measure_overlap(corpus, corpora)
        if message := describe_overlap(overlap):
            log.warning("%s: %s, which makes its loss too low: take them out of one of the two", corpus.name, message)
    write_record(run / TEXTS, {"tokens": tokens, "overlap": overlaps})


def find_overlap(model: str | Path, corpus: Corpus | StoredCorpus) -> Overlap | None:
    """The overlap of a corpus with the training texts of the run that a model comes from.

    None if it does not come from a run, or if the tokens of a text no longer exist.
    """
    if known := _read(run_of(model))["overlap"].get(corpus.fingerprint):
        return known
    corpora = training_texts(model)
    return measure_overlap(corpus, corpora) if corpora else None


def training_texts(model: str | Path) -> list[StoredCorpus]:
    """The training texts of the run that a model comes from; none if it comes from none, or the tokens are gone."""
    return _open(_read(run_of(model))["tokens"])


def run_of(model: str | Path) -> Path | None:
    """The folder of the training run that a model lies in, as its checkpoints and its final model do."""
    if not (model and Path(model).exists()):  # the name of a model on the hub
        return None
    folder = Path(model).resolve()
    return next((each for each in (folder, *folder.parents[:2]) if (each / RUN).exists()), None)


def _read(run: Path | None) -> dict[str, dict[str, Any]]:
    """What `record_texts` wrote, or nothing."""
    try:
        if run and (run / TEXTS).exists():
            return read_record(run / TEXTS, "it is ignored")
    except DamagedError as error:
        log.warning("%s", error)
    return {"tokens": {}, "overlap": {}}


def _open(tokens: dict[str, str]) -> list[StoredCorpus]:
    """The training texts; none if the tokens of one are gone."""
    try:
        return [StoredCorpus.open(Path(folder), name) for folder, name in tokens.items()]
    except DamagedError:
        return []
