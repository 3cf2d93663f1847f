"""Finished evaluations on disk, read back: for reports, comparisons and the metrics themselves."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlmkit.errors import UserError
from mlmkit.files import changed_file, read_record

RESULT_FORMAT = 4  # also counts changes of the parts
RESULT, TOKENS, DOCUMENTS, REPORT = "result.json", "tokens.parquet", "documents.parquet", "report.html"
AGAIN = "measure again with --overwrite"


@dataclass(frozen=True)
class Stored:
    """A finished evaluation: its folder and `result.json`."""

    folder: Path
    result: dict[str, Any]

    @property
    def mask_id(self) -> int:
        """The tokenizer's mask."""
        return self.result["model"]["mask_id"]


def load_result(folder: Path) -> Stored:
    """A finished evaluation. Raises `UserError` for what is none, or has changed since it was written."""
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {found}: name the folder that `mlmkit eval` wrote")
    if not (folder / RESULT).exists():
        raise UserError(f"{folder} holds no {RESULT}: if its evaluation was interrupted, run the command again")
    result = read_record(folder / RESULT, AGAIN)
    if result.get("format") != RESULT_FORMAT:
        raise UserError(f"{folder}/{RESULT} is of format {result.get('format')}, this mlmkit reads {RESULT_FORMAT}")
    if name := changed_file(folder, result["files"]):
        raise UserError(f"{folder}/{name} is missing or damaged, or not that of {RESULT}: {AGAIN}")
    return Stored(folder, result)


def read_blocks(folder: Path, metric: str, mask_seed: int | None) -> Iterator[tuple[pa.Table, pa.Table]]:
    """The rows of one pass with their documents' sizes, a stretch of documents at a time: (tokens, documents)."""
    groups = _groups(folder / TOKENS, metric, mask_seed)
    waiting = next(groups, None)
    file = pq.ParquetFile(folder / DOCUMENTS)
    for documents in map(file.read_row_group, range(file.num_row_groups)):
        end = documents["document"][-1].as_py() + 1
        taken = []
        while waiting is not None:
            cut = int(np.searchsorted(waiting["document"].to_numpy(), end))
            taken.append(waiting.slice(0, cut))
            if cut < len(waiting):
                waiting = waiting.slice(cut)
                break
            waiting = next(groups, None)
        if taken:
            yield pa.concat_tables(taken), documents
        else:
            yield pq.read_schema(folder / TOKENS).empty_table(), documents


def _groups(path: Path, metric: str, mask_seed: int | None) -> Iterator[pa.Table]:
    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        first = file.read_row_group(group, columns=["metric", "mask_seed"]).slice(0, 1).to_pylist()[0]
        if first == {"metric": metric, "mask_seed": mask_seed}:
            yield file.read_row_group(group)
