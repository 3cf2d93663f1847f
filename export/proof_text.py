"""The text that an export is proven on: the user's, the training run's held-out text, or Python's documentation."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mlmkit.documents import Source, read_documents
from mlmkit.errors import DamagedError, UserError
from mlmkit.files import read_record
from mlmkit.pydocs import topics

log = logging.getLogger(__name__)

FALLBACK = "Python's documentation"
FITTED = ("fp16", "int8")  # precisions that depend on the ranges of values on real text
DOCUMENTS = 1024  # half to fit a precision to, half to prove it on


@dataclass(frozen=True)
class ProofText:
    """`texts`, and the `name` under which the manifest reports them."""

    name: str
    texts: Sequence[str]

    def split(self, precision: str) -> tuple["ProofText | None", "ProofText"]:
        """What to fit a precision to, if it is fitted, and what to prove it on: every other text, or all of them."""
        if precision not in FITTED:
            return None, self
        fitted, proven = (self.texts[1::2], self.texts[::2]) if len(self.texts) > 1 else (self.texts, self.texts)
        return ProofText(self.name, fitted), ProofText(self.name, proven)


def proof_text(checkpoint: str, given: str | None = None) -> ProofText:
    """The first documents of the file `given`, or of what stands for it, in the model's own language if possible.

    Raises `UserError` for a text that cannot be read, or has no documents.
    """
    if source := Source(given) if given else _held_out(Path(checkpoint).resolve()):
        texts = list(islice(read_documents(source), DOCUMENTS))
        if not texts:
            raise UserError(f"{source.location}: no documents in it")
        return ProofText(given or f"the run's held-out text ({source.location})", texts)
    log.info("the proof is made on Python's documentation, in English: name a text like yours with --text")
    return ProofText(FALLBACK, topics())


def _held_out(checkpoint: Path) -> Source | None:
    """The held-out text of the run in which the checkpoint lies, if it is still there."""
    for run in (checkpoint, checkpoint.parent, checkpoint.parent.parent):
        for result in sorted(run.glob("checkpoints/*/held-out/result.json"), reverse=True):
            try:
                found = read_record(result, "it does not count")["corpus"]["source"]
            except DamagedError as error:
                log.warning("%s", error)
                continue
            source = Source(**{name: value for name, value in found.items() if name != "set"})
            if Path(source.location).is_file():
                return source
            log.warning("the run's held-out text %s is not there", source.location)
            return None
    return None
