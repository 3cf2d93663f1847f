"""The evidence on disk: finished parts while an evaluation runs, then `tokens.parquet` and `documents.parquet`."""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mlmkit.corpus import TEXT_SIZES
from mlmkit.errors import CheckError, DamagedError, UserError
from mlmkit.eval.material import Material
from mlmkit.eval.parts import Part
from mlmkit.eval.passes import Pass
from mlmkit.eval.plan import Plan, pieces, scorable, shown_ids
from mlmkit.eval.scoring import TokenScores
from mlmkit.eval.stored import AGAIN, DOCUMENTS, RESULT, TOKENS, load_result
from mlmkit.files import atomic, changed_file, content, file_sha256, home, read_record, replace, write_record
from mlmkit.masking import Corruption, format_digest, mask_digest
from mlmkit.tokenizer import Tokenizer

UNFINISHED, PARTS = "unfinished.json", "parts"
FACTS = ".json"  # suffix of what describes a part

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PartFacts:
    """What a part's file says of itself: its documents, share of the mask digest, and what scoring it took."""

    first_document: int
    end_document: int
    digest: str
    rows: int
    scored: int
    tokens: int
    seconds: float


class Store:
    """The folder of one evaluation. `result.json` comes last.

    `identity` says what is measured by what: a folder that holds another evaluation is refused. Use it within
    `files.locked`.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.final = self.folder = folder.resolve()
        self.identity = identity

    def finished(self, *, overwrite: bool = False) -> dict[str, Any] | None:
        """The result, if this evaluation is complete here.

        Raises `UserError` when the folder holds something else. With `overwrite`, another evaluation or a complete one
        stays until this one is finished and takes its place; an unfinished one is gone on with.
        """
        replacement = home(self.final) / f".{self.final.name}.replacement"
        if was_killed := (replacement / RESULT).exists():  # before it could take its place
            _clear(replacement)
            replace(replacement, self.final)
        if self.final.exists() and not self.final.is_dir():
            raise UserError(f"{self.final} exists and is not a folder: choose another --output")
        if not self.final.is_dir() or not content(self.final):
            return None
        record = self.final / (RESULT if (self.final / RESULT).exists() else UNFINISHED)
        signs = (RESULT, UNFINISHED, TOKENS, f"{PARTS}/*-{'[0-9]' * 7}.parquet")
        if not any(any(self.final.glob(sign)) for sign in signs):
            spared = ", so --overwrite leaves it alone" if overwrite else ""
            raise UserError(f"{self.final} exists and holds no evaluation{spared}: choose another --output")
        try:
            found = read_record(record, AGAIN)
        except DamagedError:
            if not overwrite:
                raise
            found = {}
        known = found.get("identity") or {}
        is_same, is_complete = known == self.identity, record.name == RESULT
        if overwrite and not (is_same and (was_killed or not is_complete)):
            self.folder = replacement
            return None
        if not is_same:
            changed = [key for key in self.identity if known.get(key) != self.identity[key]]
            raise UserError(
                f"{self.final} holds an evaluation with another {' and '.join(changed) or 'version of mlmkit'}: "
                "choose another --output, or replace it with --overwrite"
            )
        if is_complete:
            load_result(self.final)
            _clear(self.final)
            return found
        return None

    @contextmanager
    def working(self) -> Iterator[None]:
        """Make the folder and note what is being measured. If no part was finished, nothing is left behind."""
        if self.folder != self.final and _identity(self.folder) != self.identity:
            shutil.rmtree(self.folder, ignore_errors=True)
        if not (self.folder / UNFINISHED).exists():
            with atomic(self.folder, folder=True) as building:  # so a crash here cannot block a later run
                write_record(building / UNFINISHED, {"identity": self.identity})
        (self.folder / PARTS).mkdir(exist_ok=True)
        try:
            yield
        except BaseException:
            if not any((self.folder / PARTS).glob(f"*{FACTS}")) and not (self.folder / RESULT).exists():
                self.discard()
            raise

    def discard(self) -> None:
        """Remove an evaluation that came to nothing."""
        for entry in content(self.folder) if self.folder.exists() else ():
            if entry.name != UNFINISHED:  # which comes last, so that a crash here cannot block a later run
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        (self.folder / UNFINISHED).unlink(missing_ok=True)
        if self.folder.exists() and not self.folder.is_mount():
            self.folder.rmdir()

    # ------------------------------------------------------------ parts

    def part(self, name: str, index: int) -> PartFacts | None:
        """A pass's part, if it is done. One that is damaged, or of another evaluation, is to be scored again."""
        path = self._part(name, index)
        if not path.with_suffix(FACTS).exists():
            return None
        with suppress(DamagedError):
            described = read_record(path.with_suffix(FACTS), "it is scored again")
            known = described.get("identity") == self.identity and path.name in described.get("files", {})
            if known and not changed_file(path.parent, described["files"]):
                return PartFacts(**described["facts"])
        log.warning("%s is damaged, or another's: scoring it again", path)
        path.with_suffix(FACTS).unlink()
        return None

    def write_part(self, name: str, index: int, table: pa.Table, facts: PartFacts) -> None:
        """A part is done once what describes it lies beside its table."""
        path = self._part(name, index)
        with atomic(path) as partial:
            pq.write_table(table, partial, compression="zstd")
        files = {path.name: file_sha256(path)}
        write_record(path.with_suffix(FACTS), {"identity": self.identity, "files": files, "facts": asdict(facts)})

    def parts(self, name: str) -> list[PartFacts]:
        """A pass's parts, in order, up to the first that is missing."""
        parts: list[PartFacts] = []
        while part := self.part(name, len(parts)):
            parts.append(part)
        return parts

    def _part(self, name: str, index: int) -> Path:
        return self.folder / PARTS / f"{name}-{index:07d}.parquet"

    # ------------------------------------------------------------ the whole

    def gather(self, facts: dict[str, list[PartFacts]], material: Material, tokenizer: Tokenizer) -> int:
        """Write `documents.parquet`, and `tokens.parquet` with a row group a part and each token's frequency.

        `facts` are those of each pass. Returns the count of unknown tokens. Raises `CheckError` when a part is missing.
        """
        corpus, document = material.corpus(), 0
        is_context = scorable(tokenizer).is_special
        frequency = np.zeros(len(is_context), dtype=np.int64)
        with _writer(self.folder / DOCUMENTS) as write:
            for block in corpus.blocks():
                frequency += np.bincount(block.ids, minlength=len(frequency))
                end, owner = document + len(block), np.repeat(np.arange(len(block)), block.lengths)
                targets = np.bincount(owner[~is_context[block.ids]], minlength=len(block))
                sizes = dict(zip(TEXT_SIZES, block.text_sizes.T, strict=True))
                index = np.arange(document, end)
                counts = {"document": index, "tokens": block.lengths, "scorable": targets, **sizes}
                write(pa.table({**counts, **material.columns(document, end)}))
                document = end
        with _writer(self.folder / TOKENS) as write:
            for name, parts in facts.items():
                reached = 0
                for part in parts:
                    reached = part.end_document if part.first_document == reached else -1
                if reached != len(corpus):
                    raise CheckError(f"{self.folder}: parts of {name} are missing: run the same command again")
                for index in range(len(parts)):
                    table = pq.read_table(self._part(name, index), partitioning=None)
                    counted = frequency[table["token_id"].to_numpy()]
                    write(table.append_column("frequency", pa.array(counted)))
        return 0 if tokenizer.unk_id is None else int(frequency[tokenizer.unk_id])

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write `result.json`, which completes the evaluation, and return it. The parts are no longer needed."""
        result = {**result, "files": {name: file_sha256(self.folder / name) for name in (TOKENS, DOCUMENTS)}}
        write_record(self.folder / RESULT, result)
        _clear(self.folder)
        if self.folder != self.final:
            replace(self.folder, self.final)
        return result


def _clear(folder: Path) -> None:
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    if (folder / UNFINISHED).exists():  # a read-only file system refuses even what there is not
        (folder / UNFINISHED).unlink()


@contextmanager
def _writer(path: Path) -> Iterator[Callable[[pa.Table], None]]:
    """Yield what appends a table to a parquet file, as a row group. The file appears when it is complete."""
    with ExitStack() as stack:
        partial, writers = stack.enter_context(atomic(path)), []

        def write(table: pa.Table) -> None:
            if not writers:
                writer = pq.ParquetWriter(partial, table.schema, compression="zstd", write_page_checksum=True)
                writers.append(stack.enter_context(writer))
            if len(table):
                writers[0].write_table(table, row_group_size=len(table))

        yield write


def part_facts(part: Part, plan: Plan, tokenizer: Tokenizer, seconds: float) -> PartFacts:
    """Of a part that was scored in `seconds`."""
    corpus = part.corpus
    flat = corpus.starts[plan.document] + plan.offset
    shown = corpus.ids.astype(np.int64)
    shown[flat] = shown_ids(plan, corpus, tokenizer.mask_id)
    return PartFacts(
        first_document=part.first_document,
        end_document=part.end_document,
        digest=format_digest(mask_digest(Corruption(shown, flat), corpus.lengths, corpus.keys)),
        rows=len(plan),
        scored=len(plan.offset),
        tokens=int(plan.rows.length.sum()) + len(plan) * tokenizer.added_tokens,
        seconds=seconds,
    )


def token_table(item: Pass, part: Part, plan: Plan, scores: TokenScores, tokenizer: Tokenizer) -> pa.Table:
    """A part's rows of `tokens.parquet`."""
    corpus = part.corpus
    flat = corpus.starts[plan.document] + plan.offset
    words = corpus.words[flat].astype(np.int32)
    shown = shown_ids(plan, corpus, tokenizer.mask_id)
    seed = np.full(len(flat), item.mask_seed or 0, dtype=np.uint64)
    ids, spelled = np.unique(corpus.ids[flat], return_inverse=True)
    spellings = pa.array([tokenizer.readable(int(id)) for id in ids], pa.string())
    return pa.table(
        {
            "document": part.first_document + plan.document,
            "offset": plan.offset.astype(np.int32),
            "token_id": corpus.ids[flat].astype(np.int32),
            "input_id": shown.astype(np.int32),
            "word": pa.array(words, mask=words < 0),
            "log_prob": scores.log_prob,
            "rank": scores.rank.astype(np.int32),
            "metric": pa.array([item.metric] * len(flat), pa.string()),
            "mask_seed": pa.array(seed, mask=np.full(len(flat), item.mask_seed is None)),
            "top_id": _optional(scores.top_id, pa.int32(), item),
            "top_log_prob": _optional(scores.top_log_prob, pa.float32(), item),
            "token": pa.DictionaryArray.from_arrays(spelled.astype(np.int32), spellings),
            "piece": pieces(corpus, flat),
            "length": corpus.lengths[plan.document].astype(np.int32),
        }
    )


def _optional(values: NDArray, kind: pa.DataType, item: Pass) -> pa.Array:
    """The likeliest tokens are kept of masked passes alone."""
    return pa.array(values).cast(kind) if item.metric == "masked" else pa.nulls(len(values), kind)


def _identity(folder: Path) -> object:
    """What is being measured into a folder; None if it does not say."""
    with suppress(DamagedError):
        return read_record(folder / UNFINISHED, AGAIN)["identity"]
