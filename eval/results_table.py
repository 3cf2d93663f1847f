"""A table of models by sets, with intervals and ranks: what `mlmkit compare --table` prints and writes.

folders of results → a column per set, of results that compare → paired draws → ranks → Markdown, CSV, HTML
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlmkit.errors import UserError, require
from mlmkit.eval.compare import (
    TOKENIZER_FREE,
    check_comparable,
    draws_difference,
    is_distinguishable,
    metric_draws,
    pass_of,
)
from mlmkit.eval.display import ARROWS, headline, markdown_cell, markdown_table, model_name, name_parts, number
from mlmkit.eval.metrics import FAMILIES, better
from mlmkit.eval.pages import render
from mlmkit.eval.result import Metric, Result, main_metric, sample_size
from mlmkit.eval.results_store import RESULT, StoredResult, load_result
from mlmkit.eval.statistics import RESAMPLES
from mlmkit.files import write_text
from mlmkit.locations import last_part, name_stem

SUFFIXES = (".md", ".csv", ".html")
RULE = (
    f"Brackets: 95 % interval, bootstrap over documents or items, {RESAMPLES:,} resamples. Parentheses: rank, 1 + the "
    "number of models that are better by a paired difference whose 95 % interval excludes 0. Models with the same rank "
    "are tied. Bold: rank 1. ↓: lower is better; ↑: higher is better; a column without an arrow is not ranked. Not "
    "corrected for the number of comparisons."
)
Draws = tuple[NDArray[np.float64], int]  # see `metric_draws`


@dataclass(frozen=True)
class Cell:
    """A model's result on a set. `rank` is None if the column is not ranked, or this value has no interval."""

    folder: Path
    metric: Metric
    rank: int | None = None


@dataclass(frozen=True)
class Column:
    """A set: its main metric, the number of documents or items (`unit`), and the cells by model."""

    name: str
    metric: str
    better: str
    n: int
    unit: str
    cells: dict[str, Cell]
    note: str = ""


@dataclass(frozen=True)
class ResultsTable:
    """Models by sets. `models` maps their names to what they are: architecture, precision and backend."""

    models: dict[str, str]
    columns: list[Column]

    def rows(self) -> list[dict[str, Any]]:
        """One row per result: model, set, metric, value, interval, rank, and the result's folder."""
        rows = []
        for column in self.columns:
            ranks = [cell.rank for cell in column.cells.values()]
            described = {"set": column.name, "metric": column.metric, "better": column.better}
            for model, cell in column.cells.items():
                values = {name: cell.metric[name] for name in ("value", "low", "high")}
                tied = None if cell.rank is None else ranks.count(cell.rank) > 1
                measured = {"n": column.n, "unit": column.unit, "rank": cell.rank, "tied": tied}
                rows.append({"model": model, **described, **values, **measured, "result": str(cell.folder)})
        return rows


def results_table(folders: Sequence[Path]) -> ResultsTable:
    """The table of these results, or of those in these folders.

    Raises `UserError` if the results of a set measure different text or masks, or share no metric that compares, and
    for two results of one model on one set.
    """
    once = {folder.resolve(): folder for folder in _result_folders(folders)}
    results = [load_result(folder) for folder in once.values()]
    names = _model_names(each.result for each in results)
    models: dict[str, str] = {}
    by_set: dict[str, list[tuple[str, StoredResult]]] = {}
    for each in results:
        identity = _identity(each.result)
        architecture = each.result["model"]["architecture"]
        models[names[identity]] = f"{architecture}, {identity.precision}, {identity.backend}"
        by_set.setdefault(_set_name(each.result), []).append((names[identity], each))
    columns = [column for name, named in by_set.items() for column in _columns(name, named)]
    return ResultsTable(models, columns)


def _result_folders(folders: Iterable[Path]) -> Iterable[Path]:
    for folder in folders:
        paths = (path.relative_to(folder) for path in folder.rglob(RESULT))
        # Hidden folders are what a killed process has left.
        inside = sorted(folder / path.parent for path in paths if not any(part[0] == "." for part in path.parts))
        yield from inside or [folder]


# ---------------------------------------------------------------- names


class _Identity(NamedTuple):
    """What makes two results those of one model. A checkpoint and its artifact share the weights."""

    weights: str
    tokenizer: str
    precision: str
    backend: str
    name: str


def _identity(result: Result) -> _Identity:
    model = result["model"]
    name = model_name(model["path"])
    return _Identity(model["fingerprint"], model["tokenizer"], model["precision"], result["backend"]["name"], name)


def _model_names(results: Iterable[Result]) -> dict[_Identity, str]:
    """The shortest end of each model's path that tells it from the others; if none does, what else differs."""
    paths: dict[_Identity, tuple[str, ...]] = {}
    for result in results:
        paths.setdefault(_identity(result), name_parts(result["model"]["path"]))
    names = {identity: _shortest_end(path, set(paths.values())) for identity, path in paths.items()}
    for describe in (lambda own: f"{own.precision}, {own.backend}", lambda own: f"weights {own.weights[:8]}"):
        counts = Counter(names.values())
        names = {own: f"{name} ({describe(own)})" if counts[name] > 1 else name for own, name in names.items()}
    return names


def _shortest_end(path: tuple[str, ...], paths: Iterable[tuple[str, ...]]) -> str:
    others = [other for other in paths if other != path]
    ends = (path[-length:] for length in range(1, len(path)))
    return "/".join(next((end for end in ends if all(other[-len(end) :] != end for other in others)), path))


def _set_name(result: Result) -> str:
    source = result["corpus"]["source"]
    return source["set"] or name_stem(last_part(source["location"]))


# ---------------------------------------------------------------- columns


def _columns(name: str, named: Sequence[tuple[str, StoredResult]]) -> list[Column]:
    """The column of a set, or one for each variant of pseudo-likelihood."""
    metric, note = _shared_metric(name, [each for _, each in named])
    variants: dict[str, list[tuple[str, StoredResult]]] = {}
    for model, each in named:
        pseudo = {} if metric in FAMILIES["masked"].estimators else each.result["pseudo"] or {}
        variants.setdefault(pseudo.get("variant", ""), []).append((model, each))
    return [
        _column(f"{name}, {variant}" if len(variants) > 1 else name, metric, own, note)
        for variant, own in variants.items()
    ]


def _shared_metric(name: str, results: Sequence[StoredResult]) -> tuple[str, str]:
    """The metric of a column, and a note if it is not the main one: bits per byte, which any tokenizer can share.

    The summed pseudo-log-likelihood says nothing without the size of the text, so it is never the one.
    """
    first = results[0]
    main = main_metric(first.result)
    candidates = dict.fromkeys([main, "bits_per_byte", "pseudo_perplexity"])
    candidates.pop("pseudo_log_likelihood", None)
    problem: UserError | None = None
    for metric in candidates:
        try:
            for each in results:
                _check_metric(first, each, metric)
        except UserError as error:
            problem = problem or error
            continue
        return metric, f"{name}: {headline(metric)[0]}, because {problem}" if problem else ""
    raise problem or UserError(f"{first.folder} has no metric for a table")


def _check_metric(a: StoredResult, b: StoredResult, metric: str) -> None:
    """Raise `UserError` unless the metric of the two results compares."""
    for each in (a, b):
        if each.result["metrics"].get(metric, {"value": None})["value"] is None:
            raise UserError(f"{each.folder} has no {metric}")
    kind = "masked" if metric in FAMILIES["masked"].estimators else "pseudo"
    passes, others = ([name for name in each.result["digests"] if pass_of(name)[0] == kind] for each in (a, b))
    if passes != others:
        raise UserError(f"{a.folder} and {b.folder} use other masks ({', '.join(passes)} and {', '.join(others)})")
    same_tokens = check_comparable(a, b, {kind: [pass_of(name)[1] for name in passes]})
    if not same_tokens and "items" not in a.result and metric not in TOKENIZER_FREE:
        raise UserError(f"the tokenizers of {a.folder} and {b.folder} differ")


def _column(name: str, metric: str, named: Sequence[tuple[str, StoredResult]], note: str) -> Column:
    first = named[0][1].result
    cells: dict[str, Cell] = {}
    for model, each in named:
        if model in cells:
            raise UserError(f"{cells[model].folder} and {each.folder} both measure {model} on {name}: leave one out")
        cells[model] = Cell(each.folder, each.result["metrics"][metric])
    direction = _direction(first, metric)
    bounded = {model: each for model, each in named if cells[model].metric["low"] is not None}
    ranks: dict[str, int] = {}
    if len(bounded) > 1 and direction != "neither":
        draws = {model: metric_draws(each, metric) for model, each in bounded.items()}
        ranks = {model: 1 + _count_better(metric, direction, own, draws.values()) for model, own in draws.items()}
    cells = {model: replace(cell, rank=ranks.get(model)) for model, cell in cells.items()}
    unit = "items" if "items" in first else "documents"
    return Column(name, metric, direction, sample_size(first, metric), unit, cells, note)


def _direction(result: Result, metric: str) -> str:
    """Which values of a metric are better. The perplexity of one side of pairs only describes a result."""
    if any(metric == each["name"] for each in (result["set"] or {}).get("correlation", ())):
        return "higher"  # a mean of gains
    return "neither" if "items" in result and "perplexity" in metric else better(metric)


def _count_better(metric: str, direction: str, own: Draws, draws: Iterable[Draws]) -> int:
    """How many of `draws` are better than `own` by a difference whose interval excludes 0."""
    sign = 1 if direction == "higher" else -1
    rows = (draws_difference(metric, own[0], values, min(own[1], count)) for values, count in draws)
    return sum(is_distinguishable(row) and sign * row["difference"] > 0 for row in rows)


# ---------------------------------------------------------------- forms


def write_table(table: ResultsTable, path: Path) -> None:
    """Write the table as its suffix says, `.md`, `.csv` or `.html`. Raises `UserError` if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".html":
            counts = (("model", len(table.models)), ("set", len(table.columns)))
            title = " on ".join(f"{count:,} {name}{'s' if count > 1 else ''}" for name, count in counts)
            render("table.html.jinja", path, title=title, table=table, rule=RULE, parts=_cell_parts, heading=_heading)
        else:
            write_text(path, as_markdown(table) if path.suffix == ".md" else as_csv(table))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def check_path(path: Path) -> None:
    """Raise `UserError` for a folder, a suffix that is no form of the table, or one whose packages are missing."""
    if path.is_dir():
        raise UserError(f"--table {path}: this is a folder: name a file, or put --table after the results")
    if path.suffix not in SUFFIXES:
        raise UserError(f"--table {path}: end the file's name in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if path.suffix == ".html":
        require("report", "jinja2")


def as_markdown(table: ResultsTable) -> str:
    """The table in Markdown: a row per model, and a paragraph that says how to read it."""
    header = ["model", *(column.name for column in table.columns)]
    rows = [["*metric*", *map(_heading, table.columns)]]
    rows.append(["*n*", *(f"{column.n:,} {column.unit}" for column in table.columns)])
    for model in table.models:
        rows.append([model, *(_markdown_value(column, column.cells.get(model)) for column in table.columns)])
    notes = "".join(f"{markdown_cell(column.note)}.\n\n" for column in table.columns if column.note)
    return f"{markdown_table(header, rows, 'l' + 'r' * len(table.columns))}\n{notes}{RULE}\n"


def as_csv(table: ResultsTable) -> str:
    """One line per result with full precision; empty where there is no value, interval or rank."""
    text, rows = io.StringIO(), table.rows()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _markdown_value(column: Column, cell: Cell | None) -> str:
    text = " ".join(_cell_parts(column, cell)) if cell else "–"
    return f"**{text}**" if cell and cell.rank == 1 else text


def _heading(column: Column) -> str:
    """The metric with its unit and direction, such as `bits per byte ↓`."""
    label, unit, form = headline(column.metric)
    named = ", ".join(filter(None, (label, unit, "%" if form.endswith("%}") else "")))
    return f"{named} {ARROWS[column.better]}".rstrip()


def _cell_parts(column: Column, cell: Cell) -> list[str]:
    """Value, rank and interval as text; the latter two are left out if there are none."""
    form = headline(column.metric)[2]
    value, low, high = (number(cell.metric[name], form).removesuffix("%") for name in ("value", "low", "high"))
    rank = [] if cell.rank is None else [f"({cell.rank})"]
    return [value, *rank, *([] if cell.metric["low"] is None else [f"[{low}, {high}]"])]
