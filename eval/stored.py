"""Finished evaluations on disk, read back: for reports, comparisons and the metrics themselves."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlmkit.errors import UserError

RESULT_FORMAT = 3  # also counts changes of the parts
RESULT, TOKENS, DOCUMENTS, REPORT = "result.json", "tokens.parquet", "documents.parquet", "report.html"
# What report and comparison rely on: a damaged file is to be called so.
FIELDS: dict[str, dict[str, type]] = {
    "corpus": {"source": dict, "fingerprint": str, "documents": int, "tokens": int},
    "model": {"path": str, "architecture": str, "precision": str, "tokenizer": str, "mask_id": int},
    "backend": {"name": str, "device": str},
    "masking": {"seeds": list},
    "metrics": {},
    "slices": {},
    "digests": {},
    "scored": {},
    "unknown": {"tokens": int, "characters": int, "token_share": float, "character_share": float},
    "examples": {"worst": list, "best": list},
    "timing": {},
    "versions": {},
    "identity": {},
}
TOKEN_COLUMNS = {
    *("document", "offset", "token_id", "input_id", "log_prob", "rank", "metric", "mask_seed"),
    *("top_log_prob", "token", "piece", "length", "frequency"),
}


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
    """A finished evaluation. Raises `UserError` for what is none, or is damaged."""
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {found}: name the folder that `mlmkit eval` wrote")
    again = "measure again with --overwrite"
    if not (folder / RESULT).exists():
        raise UserError(f"{folder} holds no {RESULT}: if its evaluation was interrupted, run the command again")
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder}/{RESULT} cannot be read ({str(error).splitlines()[0]}): {again}") from None
    if not isinstance(result, dict) or result.get("format") != RESULT_FORMAT:
        found = result.get("format") if isinstance(result, dict) else None
        raise UserError(f"{folder}/{RESULT} is of format {found!r}, this mlmkit reads {RESULT_FORMAT}: {again}")
    for name, keys in FIELDS.items():
        if not isinstance(result.get(name), dict):
            raise UserError(f"{folder}/{RESULT}: {name!r} is missing or of a wrong type: {again}")
        for key, kind in keys.items():
            if not isinstance(result[name].get(key), kind):
                raise UserError(f"{folder}/{RESULT}: {name}.{key} is missing or of a wrong type: {again}")
    if not isinstance(result.get("pseudo"), dict | None) or "pseudo" not in result or "set" not in result:
        raise UserError(f"{folder}/{RESULT}: 'pseudo' or 'set' is missing: {again}")
    rows = {TOKENS: sum(result["scored"].values()), DOCUMENTS: result["corpus"]["documents"]}
    for name, expected in rows.items():
        try:
            file = pq.ParquetFile(folder / name)
        except (OSError, pa.ArrowException):
            raise UserError(f"{folder}/{name} is missing or damaged: {again}") from None
        if file.metadata.num_rows != expected or (name == TOKENS and not set(file.schema_arrow.names) >= TOKEN_COLUMNS):
            raise UserError(f"{folder}/{name} is not the table that belongs to {RESULT}: {again}")
    return Stored(folder, result)


def read_blocks(folder: Path, metric: str, mask_seed: int | None) -> Iterator[tuple[pa.Table, pa.Table]]:
    """The rows of one pass with their documents' sizes, a stretch of documents at a time: (tokens, documents).

    Raises `UserError` for a damaged file.
    """
    try:
        groups = _groups(folder / TOKENS, metric, mask_seed)
        waiting = next(groups, None)
        file = pq.ParquetFile(folder / DOCUMENTS, page_checksum_verification=True)
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
    except (OSError, pa.ArrowException):
        raise UserError(f"{folder}/{TOKENS} or {DOCUMENTS} is damaged: measure again with --overwrite") from None


def _groups(path: Path, metric: str, mask_seed: int | None) -> Iterator[pa.Table]:
    file = pq.ParquetFile(path, page_checksum_verification=True)
    for group in range(file.num_row_groups):
        first = file.read_row_group(group, columns=["metric", "mask_seed"]).slice(0, 1).to_pylist()[0]
        if first == {"metric": metric, "mask_seed": mask_seed}:
            yield file.read_row_group(group)
