"""The evidence on disk: finished parts while an evaluation runs, then `tokens.parquet` and `documents.parquet`."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mlmkit.corpus import TEXT_SIZES
from mlmkit.errors import CheckError, UserError
from mlmkit.eval.material import Material
from mlmkit.eval.parts import Part
from mlmkit.eval.passes import Pass
from mlmkit.eval.plan import Plan, pieces, scorable, shown_ids
from mlmkit.eval.scoring import TokenScores
from mlmkit.eval.stored import DOCUMENTS, RESULT, TOKENS, load_result
from mlmkit.files import atomic, content, exclusive, home, new_folder, replace, write_json
from mlmkit.masking import Corruption, format_digest, mask_digest
from mlmkit.tokenizer import Tokenizer

UNFINISHED, PARTS = "unfinished.json", "parts"
FACTS = b"mlmkit"


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

    `identity` says what is measured by what: a folder that holds another evaluation is refused. Use it within `locked`.
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
        if not self.final.exists() and (replacement / RESULT).exists():
            replacement.rename(self.final)  # killed between the two renames of `finish`
        if self.final.exists() and not self.final.is_dir():
            raise UserError(f"{self.final} exists and is not a folder: choose another --output")
        if not self.final.is_dir() or not content(self.final):
            return None
        found = _read_json(self.final / RESULT) or _read_json(self.final / UNFINISHED)
        if found is None or "identity" not in found:
            spared = ", so --overwrite leaves it alone" if overwrite else ""
            raise UserError(f"{self.final} exists and holds no evaluation{spared}: choose another --output")
        is_same, is_complete = found["identity"] == self.identity, "metrics" in found
        if overwrite and (is_complete or not is_same):
            self.folder = replacement
            return None
        if not is_same:
            known = found["identity"] if isinstance(found["identity"], dict) else {}
            changed = [key for key in self.identity if known.get(key) != self.identity[key]]
            raise UserError(
                f"{self.final} holds an evaluation with another {' and '.join(changed) or 'version of mlmkit'}: "
                "choose another --output, or replace it with --overwrite"
            )
        if is_complete:
            load_result(self.final)
            self._clear()
            return found
        return None

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes out, before anything here is read or removed. Raises `UserError` if one is at work."""
        lock = home(self.final) / f".{self.final.name}.lock"  # not within, where `finish` would replace it
        return exclusive(lock, f"another process is evaluating into {self.final}: wait for it", temporary=True)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Make the folder and note what is being measured. If no part was finished, nothing is left behind."""
        unfinished = _read_json(self.folder / UNFINISHED)
        if self.folder != self.final and (unfinished or {}).get("identity") != self.identity:
            shutil.rmtree(self.folder, ignore_errors=True)
        if not (self.folder / UNFINISHED).exists():
            with new_folder(self.folder) as building:  # whole or not at all: what is in the way of no later run
                (building / PARTS).mkdir()
                write_json(building / UNFINISHED, {"identity": self.identity})
        try:
            yield
        except BaseException:
            if not any((self.folder / PARTS).glob("*.parquet")) and not (self.folder / RESULT).exists():
                self.discard()
            raise

    def discard(self) -> None:
        """Remove an evaluation that came to nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # ------------------------------------------------------------ parts

    def has(self, name: str, index: int) -> bool:
        """Whether a pass's part is done, and can be read: a power cut may leave one that cannot."""
        path = self._part(name, index)
        try:
            pq.read_schema(path)
        except FileNotFoundError:
            return False
        except (OSError, pa.ArrowException):
            path.unlink()
            return False
        return True

    def write_part(self, name: str, index: int, table: pa.Table, facts: PartFacts) -> None:
        """A part that is there is whole."""
        described = table.replace_schema_metadata({FACTS: json.dumps(asdict(facts)).encode()})
        with atomic(self._part(name, index)) as partial:
            pq.write_table(described, partial, compression="zstd", write_page_checksum=True)

    def part_facts(self, name: str) -> list[PartFacts]:
        """Of a pass's parts, in order."""
        schemas = (pq.read_schema(path) for path in self._parts(name))
        return [PartFacts(**json.loads((schema.metadata or {})[FACTS])) for schema in schemas]

    def _part(self, name: str, index: int) -> Path:
        return self.folder / PARTS / f"{name}-{index:07d}.parquet"

    def _parts(self, name: str) -> list[Path]:
        return sorted((self.folder / PARTS).glob(f"{name}-{'[0-9]' * 7}.parquet"))

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
                for path in self._parts(name):
                    table = _read_part(path).replace_schema_metadata(None)
                    counted = frequency[table["token_id"].to_numpy()]
                    write(table.append_column("frequency", pa.array(counted)))
        return 0 if tokenizer.unk_id is None else int(frequency[tokenizer.unk_id])

    def finish(self, result: dict[str, Any]) -> None:
        """Write `result.json`; with it the evaluation is complete, and the parts are no longer needed."""
        write_json(self.folder / RESULT, result)
        self._clear()
        if self.folder != self.final:
            replace(self.folder, self.final)

    def _clear(self) -> None:
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)
        (self.folder / UNFINISHED).unlink(missing_ok=True)


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


def _read_part(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, partitioning=None, page_checksum_verification=True)
    except (OSError, pa.ArrowException):
        path.unlink(missing_ok=True)
        raise CheckError(f"{path} is damaged and was removed: run the same command again") from None


def _optional(values: NDArray, kind: pa.DataType, item: Pass) -> pa.Array:
    """The likeliest tokens are kept of masked passes alone."""
    return pa.array(values).cast(kind) if item.metric == "masked" else pa.nulls(len(values), kind)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
