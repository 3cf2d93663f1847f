"""Minimal pairs: how often does the model prefer the better of two sentences?

file, zip or hub dataset → `Pair`s → documents 2i (better) and 2i + 1 (worse) → pseudo-log-likelihoods → accuracies
"""

import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mlmkit.corpus import Corpus, tokenize
from mlmkit.documents import checked_text, read_rows
from mlmkit.errors import UserError
from mlmkit.eval.data import EvalData
from mlmkit.eval.result import Metrics
from mlmkit.eval.results_store import DOCUMENTS, read_blocks
from mlmkit.eval.statistics import Estimator, bootstrap, sum_by
from mlmkit.lines import is_blank
from mlmkit.locations import Source, formats
from mlmkit.tables import json_object
from mlmkit.tokenizer import Tokenizer
from mlmkit.windows import ranges

SCORINGS = ("all", "shared")
LARGEST_UNPACKED = 256 << 20  # bytes, of a zip; BLiMP has 27 MB


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Pair:
    """`good` should be more probable. `phenomenon` and `paradigm` are its coarser and finer group, "" for none."""

    good: str
    bad: str
    phenomenon: str = ""
    paradigm: str = ""
    id: str = ""

    @property
    def has_empty_sentence(self) -> bool:
        """Whether a sentence is whitespace only."""
        return not (self.good.strip() and self.bad.strip())


@dataclass(frozen=True)
class PairColumns:
    """Where a row holds a pair. `a.b` reaches into nested rows, `a|b` takes the first that exists.

    With `label`, `good` and `bad` name a list of sentences, and the parallel list `label` says which entry is which.
    `scoring`: `all` scores whole sentences, `shared` only the tokens that both have in common (CrowS-Pairs). Raises
    `UserError` for another scoring.
    """

    good: str = "sentence_good"
    bad: str = "sentence_bad"
    phenomenon: str = ""
    paradigm: str = ""
    id: str = ""
    label: str = ""
    good_label: int | str = 1
    bad_label: int | str = 0
    scoring: str = "all"

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise UserError(f"no scoring {self.scoring!r} of pairs: choose {' or '.join(SCORINGS)}")


def read_pairs(location: str, columns: PairColumns) -> list[Pair]:
    """Read pairs from a `.jsonl`, `.csv`, `.tsv` or `.parquet` file, a `.zip` of `.jsonl` files, or `hub:...`.

    In a hub location, `*` stands for every configuration. Raises `UserError` for a file that cannot be read or holds
    no pairs, and naming the row for one that holds no pair.
    """
    if Path(location).suffix.lower() == ".zip":
        rows = _zip_rows(location)
    elif "text" in formats(Source(location)):
        raise UserError(f"{location}: pairs are read from .jsonl, .csv, .tsv, .parquet, .arrow and .zip files")
    else:
        rows = read_rows(Source(location))
    pairs = [_pair(row, columns, where) for where, row in rows]
    if all(pair.has_empty_sentence for pair in pairs):
        raise UserError(f"{location}: it holds no pairs")
    return pairs


def keep_pairs(pairs: Iterable[Pair], listing: Path) -> list[Pair]:
    """The pairs that a table lists, with columns `UID` (paradigm) and `pairIDs` (separated by commas).

    Raises `UserError` for a file that is not such a table, or that lists pairs that do not exist.
    """
    rows = [row for _, row in read_rows(Source(str(listing), format="tsv"))]
    if not rows or not {"UID", "pairIDs"} <= rows[0].keys():
        raise UserError(f"{listing}: not a table of pairs to keep: it needs columns UID and pairIDs")
    wanted = {(row["UID"], id) for row in rows for id in row["pairIDs"].split(",")}
    kept = [pair for pair in pairs if (pair.paradigm, pair.id) in wanted]
    if len(kept) < len(wanted):
        raise UserError(f"{listing} lists {len(wanted)} pairs, of which {len(kept)} exist")
    return kept


def _pair(row: dict[str, Any], columns: PairColumns, where: str) -> Pair:
    good, bad = _value(row, columns.good, where), _value(row, columns.bad, where)
    if columns.label:
        labels = _value(row, columns.label, where)
        if not all(isinstance(values, list) and len(values) == len(good) for values in (good, bad, labels)):
            raise UserError(f"{where}: {columns.good!r} and {columns.label!r} are not lists of one length")
        if columns.good_label not in labels or columns.bad_label not in labels:
            raise UserError(f"{where}: no sentence is labelled {columns.good_label!r} or {columns.bad_label!r}")
        good, bad = good[labels.index(columns.good_label)], bad[labels.index(columns.bad_label)]
    groups = {}
    for name in ("phenomenon", "paradigm", "id"):
        column = getattr(columns, name)
        groups[name] = checked_text(str(_value(row, column, where)), f"{where}, field {column!r}")
    good, bad = checked_text(good, f"{where}, {columns.good!r}"), checked_text(bad, f"{where}, {columns.bad!r}")
    return Pair(good, bad, **groups)


def _value(row: dict[str, Any], column: str, where: str) -> Any:
    if not column:
        return ""
    for alternative in column.split("|"):
        value: Any = row
        for key in alternative.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return value
    problem = f"{where} has no field {column!r} (it has {', '.join(map(str, row))})"
    raise UserError(f"{problem}: name the columns in a set of your own (docs/evaluation.md)")


def _zip_rows(location: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with zipfile.ZipFile(location) as archive:
            if sum(member.file_size for member in archive.infolist()) > LARGEST_UNPACKED:
                raise ValueError(f"more than {LARGEST_UNPACKED >> 20} MiB when unpacked")
            for name in sorted(archive.namelist()):
                if name.lower().endswith(".jsonl") and not name.startswith("__MACOSX"):
                    with io.TextIOWrapper(archive.open(name), encoding="utf-8-sig", newline="\n") as lines:
                        for number, line in enumerate(lines, start=1):
                            if not is_blank(line):
                                yield _parsed(line, f"{location}/{name}: line {number}")
    # RuntimeError: encrypted, or compressed in a way that Python does not support
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, EOFError, OSError, ValueError) as error:
        cause = str(error) or type(error).__name__
        raise UserError(f"{location}: cannot be read: {cause}: unpack it, and name the .jsonl file in it") from None


def _parsed(line: str, where: str) -> tuple[str, dict[str, Any]]:
    try:
        return where, json_object(line)
    except ValueError as error:
        raise UserError(f"{where}{error}") from None


# ---------------------------------------------------------------- as documents to be scored


class PairData(EvalData):
    """Pairs as a corpus: documents 2i and 2i + 1 are the better and the worse sentence of pair i.

    Pairs with a whitespace-only sentence are left out and counted as `empty_texts`. `source` says where the pairs came
    from.
    """

    corpus: Corpus

    def __init__(self, given: Sequence[Pair], tokenizer: Tokenizer, source: dict[str, Any], scoring: str) -> None:
        self.pairs = pairs = [pair for pair in given if not pair.has_empty_sentence]
        self._tokenizer = tokenizer
        corpus = tokenize([text for pair in pairs for text in (pair.good, pair.bad)], tokenizer)
        # The groups are part of what is measured: the same sentences with other labels are another corpus.
        labels = json.dumps([(pair.phenomenon, pair.paradigm, pair.id) for pair in pairs] + [scoring])
        fingerprint = blake2b((corpus.fingerprint + labels).encode(), digest_size=16).hexdigest()
        corpus = replace(corpus, fingerprint=fingerprint, empty_texts=len(given) - len(pairs))
        super().__init__(corpus, {**source, "scoring": scoring})

    def pseudo_targets(self) -> NDArray[np.int64] | None:
        """With `shared` scoring, the flat indices of the tokens that the two sentences have in common.

        They are those that `difflib.SequenceMatcher` matches between the two token sequences with their special
        tokens, as in the script of Nangia et al. 2020.
        """
        if self.source["scoring"] == "all":
            return None
        corpus, spans, prefix = self.corpus, [], len(self._tokenizer.prefix)
        for pair in range(len(self.pairs)):
            starts, ends = corpus.starts[2 * pair : 2 * pair + 2], corpus.starts[2 * pair + 1 : 2 * pair + 3]
            framed = [self._tokenizer.frame(corpus.ids[a:b]).tolist() for a, b in zip(starts, ends, strict=True)]
            for match in SequenceMatcher(None, *framed).get_matching_blocks():
                for start, end, matched in zip(starts, ends, (match.a, match.b), strict=True):
                    begin = int(start) + matched - prefix
                    first = max(begin, int(start))
                    spans.append((first, min(begin + match.size, int(end)) - first))
        first, size = np.array(spans, dtype=np.int64).reshape(-1, 2).T
        return np.sort(ranges(first, np.maximum(size, 0)))

    def document_columns(self, begin: int, end: int) -> dict[str, pa.Array]:
        documents = np.arange(begin, end)
        pairs = [self.pairs[document // 2] for document in range(begin, end)]
        same = [self._ids(document & ~1) == self._ids(document | 1) for document in range(begin, end)]
        columns = {"pair": documents // 2, "is_good": documents % 2 == 0, "same_ids": same}
        columns |= {name: [getattr(pair, name) for pair in pairs] for name in ("phenomenon", "paradigm", "id")}
        return {name: pa.array(values) for name, values in columns.items()}

    def _ids(self, document: int) -> bytes:
        starts = self.corpus.starts
        return self.corpus.ids[starts[document] : starts[document + 1]].tobytes()


# ---------------------------------------------------------------- accuracies

COUNT, UNSCORED, CORRECT, TIE, CORRECT_PER_TOKEN, TIE_PER_TOKEN = range(6)  # columns of `pair_columns`
ACCURACIES: dict[str, Estimator] = {
    "pair_accuracy": lambda totals: totals[..., CORRECT] / totals[..., COUNT],
    "pair_accuracy_per_token": lambda totals: totals[..., CORRECT_PER_TOKEN] / totals[..., COUNT],
}
GROUPS = {"phenomenon": "phenomena", "paradigm": "paradigms"}


def measure_pairs(folder: Path) -> tuple[Metrics, dict[str, Any]]:
    """Metrics, and `pairs` of the result: counts, ties, and the accuracies of each group, with intervals.

    A pair is right only if the better sentence has the strictly greater PLL. Sentences with the same ids tie, whatever
    the last bits say. A sentence without a scored token has no PLL, so its pair is neither right nor a tie.
    """
    scores = sentence_scores(folder)
    columns = pair_columns(scores)
    metrics = bootstrap(columns, ACCURACIES)
    described: dict[str, Any] = _counts(columns)
    for plural, names in pair_groups(folder).items():
        groups = {name: columns[names == name] for name in dict.fromkeys(names.tolist()) if name}
        if groups:
            described[plural] = {
                name: {**_counts(rows), **bootstrap(rows, ACCURACIES)} for name, rows in sorted(groups.items())
            }
        if groups and plural == "paradigms":
            metrics |= _macro_accuracy(columns, names, list(groups))
    for name, sentences in (("good", scores[::2]), ("bad", scores[1::2])):
        perplexity = {f"pseudo_perplexity_{name}": lambda totals: np.exp(-totals[..., 1] / totals[..., 0])}
        metrics |= bootstrap(sentences, perplexity)
    return metrics, described


def pair_groups(folder: Path) -> dict[str, NDArray[np.str_]]:
    """The names of each pair's phenomenon and paradigm, `[pairs]` each; "" for none."""
    labels = pq.read_table(folder / DOCUMENTS, columns=list(GROUPS))
    return {plural: np.array(labels[column].to_pylist()[::2]) for column, plural in GROUPS.items()}


def sentence_scores(folder: Path) -> NDArray[np.float64]:
    """For each sentence `[2 * pairs, 3]`: scored tokens, PLL, and whether both of its pair have the same ids."""
    scores = []
    for tokens, documents in read_blocks(folder, "pseudo", None):
        document = tokens["document"].to_numpy() - documents["document"][0].as_py()
        log_prob, same = tokens["log_prob"].to_numpy(), documents["same_ids"].to_numpy()
        sums = [sum_by(values, document, len(documents)) for values in (np.ones(len(log_prob)), log_prob)]
        scores.append(np.stack([*sums, same], axis=1))
    return np.concatenate(scores)


def pair_columns(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each pair `[pairs, 6]`: 1, unscored, right, tied, and the latter two by mean log-probability per token."""
    count, total = scores[:, 0], scores[:, 1]
    is_same = scores[::2, 2] == 1
    mean = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    is_scored = (count[::2] > 0) & (count[1::2] > 0)
    columns = [np.ones(len(is_same)), ~is_scored]
    for score in (total, mean):
        good, bad = score[::2], score[1::2]
        columns += [is_scored & (good > bad) & ~is_same, is_scored & ((good == bad) | is_same)]
    return np.stack(columns, axis=1).astype(np.float64)


def _counts(columns: NDArray[np.float64]) -> dict[str, int]:
    sums = columns.sum(axis=0).astype(int).tolist()
    names = {"pairs": COUNT, "ties": TIE, "ties_per_token": TIE_PER_TOKEN, "unscored": UNSCORED}
    return {name: sums[column] for name, column in names.items()}


def _macro_accuracy(columns: NDArray[np.float64], names: NDArray[np.str_], groups: list[str]) -> Metrics:
    """The mean of the paradigms' accuracies, all weighted equally."""
    membership = names[:, None] == np.array(groups)
    sums = np.concatenate([columns[:, [COUNT]], membership, membership * columns[:, [CORRECT]]], axis=1)
    end = len(groups) + 1
    estimators: dict[str, Estimator] = {
        "pair_accuracy_macro": lambda totals: np.nanmean(totals[..., end:] / totals[..., 1:end], axis=-1)
    }
    return bootstrap(sums.astype(np.float64), estimators)
