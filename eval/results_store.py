"""An evaluation's folder.

    parts/*.parquet, while it runs → tokens.parquet + documents.parquet → result.json, written last → report.html

`ResultsStore` writes it and resumes an unfinished one; `load_result` and `read_blocks` read a finished one.
"""

import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mlmkit.corpus import TEXT_SIZES
from mlmkit.errors import CheckError, DamagedError, UserError
from mlmkit.eval.columns import as_numpy, number_column, text_column
from mlmkit.eval.data import EvalData, Part
from mlmkit.eval.result import RESULT_FORMAT, Result
from mlmkit.eval.rows import Pass, Rows, pieces, scorable, shown_ids
from mlmkit.eval.scoring import TokenScores
from mlmkit.files import atomic, changed_file, content, file_sha256, home, read_record, replace, write_record
from mlmkit.masking import Corruption, format_digest, mask_digest
from mlmkit.tokenizer import Tokenizer

RESULT, TOKENS, DOCUMENTS, REPORT = "result.json", "tokens.parquet", "documents.parquet", "report.html"
UNFINISHED, PARTS = "unfinished.json", "parts"
RECORD_SUFFIX = ".json"  # of the file that describes a part and completes it
REMEASURE_HINT = "measure again with --overwrite"

log = logging.getLogger(__name__)


# ---------------------------------------------------------------- reading a finished evaluation


@dataclass(frozen=True)
class StoredResult:
    """A finished evaluation: its folder and `result.json`."""

    folder: Path
    result: Result


def load_result(folder: Path) -> StoredResult:
    """Read a finished evaluation. Raises `UserError` if there is none, or if a file changed since it was written."""
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {problem}: name the folder that `mlmkit eval` wrote")
    if not (folder / RESULT).exists():
        if (folder / UNFINISHED).exists():
            raise UserError(f"{folder} holds an unfinished evaluation: run the same `mlmkit eval` again")
        raise UserError(f"{folder} has no {RESULT}: name the folder that `mlmkit eval` wrote")
    result = read_record(folder / RESULT, REMEASURE_HINT)
    if result.get("format") != RESULT_FORMAT:
        raise UserError(f"{folder}/{RESULT} has format {result.get('format')}, this mlmkit reads {RESULT_FORMAT}")
    if name := changed_file(folder, result["files"]):
        raise UserError(f"{folder}/{name} is missing, damaged or not that of {RESULT}: {REMEASURE_HINT}")
    return StoredResult(folder, cast(Result, result))


def read_blocks(folder: Path, metric: str, mask_seed: int | None) -> Iterator[tuple[pa.Table, pa.Table]]:
    """The token rows of one pass and the rows of their documents, some documents at a time: (tokens, documents)."""
    tokens = pq.ParquetFile(folder / TOKENS).read_row_groups([])  # a schema's `empty_table` imports pandas
    row_groups = _row_groups(folder / TOKENS, metric, mask_seed)
    file = pq.ParquetFile(folder / DOCUMENTS)
    for documents in map(file.read_row_group, range(file.num_row_groups)):
        end = documents["document"][-1].as_py() + 1
        while not len(tokens) or tokens["document"][-1].as_py() < end:
            if (row_group := next(row_groups, None)) is None:
                break
            tokens = pa.concat_tables([tokens, row_group])
        count = int(np.searchsorted(as_numpy(tokens["document"]), end))
        yield tokens.slice(0, count), documents
        tokens = tokens.slice(count)


def _row_groups(path: Path, metric: str, mask_seed: int | None) -> Iterator[pa.Table]:
    """The row groups of one pass; a row group never holds tokens of two."""
    file = pq.ParquetFile(path)
    for number in range(file.num_row_groups):
        first = file.read_row_group(number, columns=["metric", "mask_seed"]).slice(0, 1).to_pylist()[0]
        if first == {"metric": metric, "mask_seed": mask_seed}:
            yield file.read_row_group(number)


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class PartRecord:
    """The record stored beside a part's table: its documents, its share of the mask digest, and the work it took."""

    first_document: int
    end_document: int
    digest: str
    rows: int
    scored: int
    tokens: int
    seconds: float

    @classmethod
    def of(cls, part: Part, rows: Rows, tokenizer: Tokenizer, seconds: float) -> "PartRecord":
        """The record of a part whose rows were scored in `seconds`."""
        corpus = part.corpus
        flat = corpus.starts[rows.document] + rows.offset
        shown = corpus.ids.astype(np.int64)
        shown[flat] = shown_ids(rows, corpus, tokenizer.mask_id)
        return cls(
            first_document=part.first_document,
            end_document=part.end_document,
            digest=format_digest(mask_digest(Corruption(shown, flat), corpus.lengths, corpus.keys)),
            rows=len(rows),
            scored=len(rows.offset),
            tokens=int(rows.lengths.sum()) + len(rows) * tokenizer.added_tokens,
            seconds=seconds,
        )


class ResultsStore:
    """The folder of one evaluation. Use it within `files.locked`.

    `identity` says what is measured with which model. A folder that holds another evaluation is refused.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.final = self.folder = folder.resolve()
        self.identity = identity

    def finished(self, *, overwrite: bool = False) -> Result | None:
        """The result, if this evaluation is complete in the folder.

        With `overwrite`, a complete evaluation or a different one stays in place until this one is finished and
        replaces it; an unfinished one of the same identity is resumed. Raises `UserError` when the folder holds
        something else.
        """
        replacement = home(self.final) / f".{self.final.name}.replacement"
        if was_killed := (replacement / RESULT).exists():  # after it was finished, before it could take its place
            _remove_parts(replacement)
            replace(replacement, self.final)
        if self.final.exists() and not self.final.is_dir():
            raise UserError(f"{self.final} exists and is not a folder: choose another --output")
        if not self.final.is_dir() or not content(self.final):
            return None
        signs = (RESULT, UNFINISHED, TOKENS, f"{PARTS}/*-{'[0-9]' * 7}.parquet")
        if not any(any(self.final.glob(sign)) for sign in signs):
            spared = ", so --overwrite leaves it alone" if overwrite else ""
            raise UserError(f"{self.final} exists and holds no evaluation{spared}: choose another --output")
        is_complete = (self.final / RESULT).exists()
        try:
            record = read_record(self.final / (RESULT if is_complete else UNFINISHED), REMEASURE_HINT)
        except DamagedError:
            if not overwrite:
                raise
            record = {}
        known = record.get("identity") or {}
        if overwrite and not (known == self.identity and (was_killed or not is_complete)):
            self.folder = replacement
            return None
        if known != self.identity:
            changed = [key for key in self.identity if known.get(key) != self.identity[key]]
            raise UserError(
                f"{self.final} holds an evaluation with another {' and '.join(changed) or 'version of mlmkit'}: "
                "choose another --output, or replace it with --overwrite"
            )
        if not is_complete:
            return None
        load_result(self.final)
        _remove_parts(self.final)
        return cast(Result, record)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Create the folder, marked as unfinished. If the block fails before a part is done, nothing stays behind."""
        if self.folder != self.final and self._unfinished_identity() != self.identity:
            shutil.rmtree(self.folder, ignore_errors=True)
        if not (self.folder / UNFINISHED).exists():
            with atomic(self.folder, folder=True) as building:  # so a crash here cannot block a later run
                write_record(building / UNFINISHED, {"identity": self.identity})
        (self.folder / PARTS).mkdir(exist_ok=True)
        try:
            yield
        except BaseException:
            if not any((self.folder / PARTS).glob(f"*{RECORD_SUFFIX}")) and not (self.folder / RESULT).exists():
                self.discard()
            raise

    def _unfinished_identity(self) -> object:
        with suppress(DamagedError):
            return read_record(self.folder / UNFINISHED, REMEASURE_HINT)["identity"]

    def discard(self) -> None:
        """Remove an evaluation that failed."""
        for entry in content(self.folder) if self.folder.exists() else ():
            if entry.name != UNFINISHED:  # removed last, so a crash here cannot block a later run
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        (self.folder / UNFINISHED).unlink(missing_ok=True)
        if self.folder.exists() and not self.folder.is_mount():
            self.folder.rmdir()

    def part(self, name: str, index: int) -> PartRecord | None:
        """The record of a pass's part, or None if it has to be scored, because it is missing, damaged or another's."""
        path = self._part_path(name, index)
        if not path.with_suffix(RECORD_SUFFIX).exists():
            return None
        with suppress(DamagedError):
            record = read_record(path.with_suffix(RECORD_SUFFIX), "it is scored again")
            is_ours = record.get("identity") == self.identity and path.name in record.get("files", {})
            if is_ours and not changed_file(path.parent, record["files"]):
                return PartRecord(**record["facts"])
        log.warning("%s is damaged or belongs to another evaluation: scoring it again", path)
        path.with_suffix(RECORD_SUFFIX).unlink()
        return None

    def write_part(self, name: str, index: int, table: pa.Table, record: PartRecord) -> None:
        """Store a part. Its record is written last, which completes it."""
        path = self._part_path(name, index)
        with atomic(path) as partial:
            pq.write_table(table, partial, compression="zstd")
        values = {"identity": self.identity, "files": {path.name: file_sha256(path)}, "facts": asdict(record)}
        write_record(path.with_suffix(RECORD_SUFFIX), values)

    def parts(self, name: str) -> list[PartRecord]:
        """The records of a pass's parts in order, up to the first that is missing."""
        records: list[PartRecord] = []
        while record := self.part(name, len(records)):
            records.append(record)
        return records

    def count_parts(self) -> int:
        """The number of stored parts of all passes; some may be damaged."""
        return len([*(self.folder / PARTS).glob(f"*{RECORD_SUFFIX}")])

    def _part_path(self, name: str, index: int) -> Path:
        return self.folder / PARTS / f"{name}-{index:07d}.parquet"

    def write_tables(
        self, parts: Mapping[str, Sequence[PartRecord]], data: EvalData, tokenizer: Tokenizer
    ) -> NDArray[np.int64]:
        """Write `documents.parquet`, and `tokens.parquet` with a row group per part, adding the tokens' frequencies.

        `parts` are those of each pass by its name. Returns how often each id occurs in the corpus, `[vocabulary]`.
        Raises `CheckError` when a part is missing.
        """
        is_context = scorable(tokenizer).is_special
        frequency = np.zeros(len(is_context), dtype=np.int64)

        def document_tables() -> Iterator[pa.Table]:
            begin = 0
            for block in data.corpus.blocks():
                np.add(frequency, np.bincount(block.ids, minlength=len(frequency)), out=frequency)
                document = np.repeat(np.arange(len(block)), block.lengths)
                targets = np.bincount(document[~is_context[block.ids]], minlength=len(block))
                index = np.arange(begin, begin + len(block))
                counts = {"document": index, "tokens": block.lengths, "scorable": targets}
                sizes = dict(zip(TEXT_SIZES, block.text_sizes.T, strict=True))
                columns = {name: number_column(values) for name, values in (counts | sizes).items()}
                yield pa.table({**columns, **data.document_columns(begin, begin + len(block))})
                begin += len(block)

        def token_tables() -> Iterator[pa.Table]:
            for name, records in parts.items():
                ends = [record.end_document for record in records]
                if [record.first_document for record in records] + [len(data.corpus)] != [0, *ends]:
                    raise CheckError(f"{self.folder}: parts of {name} are missing: run the same command again")
                for index in range(len(records)):
                    table = pq.ParquetFile(self._part_path(name, index)).read()
                    yield table.append_column("frequency", number_column(frequency[as_numpy(table["token_id"])]))

        _write_row_groups(self.folder / DOCUMENTS, document_tables())
        _write_row_groups(self.folder / TOKENS, token_tables())
        return frequency

    def finish(self, result: Result) -> Result:
        """Write `result.json`, which completes the evaluation, remove the parts, and return the result."""
        result["files"] = {name: file_sha256(self.folder / name) for name in (TOKENS, DOCUMENTS)}
        write_record(self.folder / RESULT, cast(dict[str, Any], result))
        _remove_parts(self.folder)
        if self.folder != self.final:
            replace(self.folder, self.final)
        return result


def _remove_parts(folder: Path) -> None:
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    if (folder / UNFINISHED).exists():  # on a read-only file system, unlinking a missing file fails too
        (folder / UNFINISHED).unlink()


def _write_row_groups(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write tables as the row groups of one Parquet file, atomically."""
    tables = iter(tables)
    first = next(tables)
    options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
    with atomic(path) as partial, pq.ParquetWriter(partial, first.schema, **options) as writer:
        for table in chain([first], tables):
            if len(table):
                writer.write_table(table, row_group_size=len(table))


def token_table(item: Pass, part: Part, rows: Rows, scores: TokenScores, tokenizer: Tokenizer) -> pa.Table:
    """A part's rows of `tokens.parquet`, one per scored token."""
    corpus = part.corpus
    flat = corpus.starts[rows.document] + rows.offset
    ids, spelled = np.unique(corpus.ids[flat], return_inverse=True)
    spellings = text_column([tokenizer.readable(int(id)) for id in ids])

    def of_masked(values: NDArray) -> pa.Array:
        kind = pa.from_numpy_dtype(values.dtype)
        return number_column(values) if item.metric == "masked" else pa.nulls(len(values), kind)

    numbers = {
        "document": part.first_document + rows.document,
        "offset": rows.offset.astype(np.int32),
        "token_id": corpus.ids[flat].astype(np.int32),
        "input_id": shown_ids(rows, corpus, tokenizer.mask_id).astype(np.int32),
        "word": corpus.words[flat],
        "log_prob": scores.log_prob,
        "rank": scores.rank.astype(np.int32),
    }
    seed = np.full(len(flat), item.mask_seed or 0, dtype=np.uint64)
    no_seed = pa.nulls(len(flat), pa.uint64())
    return pa.table(
        {name: number_column(values) for name, values in numbers.items()}
        | {
            "metric": text_column([item.metric] * len(flat)),
            "mask_seed": no_seed if item.mask_seed is None else number_column(seed),
            "top_id": of_masked(scores.top_id.astype(np.int32)),
            "top_log_prob": of_masked(scores.top_log_prob.astype(np.float32)),
            "token": pa.DictionaryArray.from_arrays(number_column(spelled.astype(np.int32)), spellings),
            "piece": number_column(pieces(corpus, flat)),
            "length": number_column(corpus.lengths[rows.document].astype(np.int32)),
        }
    )
