"""Suites: sets that are measured together and end in one table.

--suite NAME_OR_FILE → `find_suite` → the names of its sets → evaluations → `suite_record` → DIR/suite.json
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from mlmkit.errors import UserError
from mlmkit.eval.result import Result, main_metric, sample_size
from mlmkit.eval.sets import beside
from mlmkit.locations import existing_file
from mlmkit.toml import build, read_toml

BUILT_IN = Path(__file__).parent / "suites"
SUITE = "suite.json"

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Suite:
    """Sets by name, or files beside the suite's own. `babylm` says where BabyLM looks for the predictions of a set."""

    name: str
    sets: tuple[str, ...]
    description: str = ""
    babylm: dict[str, str] = field(default_factory=dict)


def find_suite(name: str) -> Suite:
    """A built-in suite, or that of a .toml file. Raises `UserError` if there is none, or it is invalid."""
    own = name.lower().endswith(".toml")
    known = sorted(path.stem for path in BUILT_IN.glob("*.toml"))
    if not own and name not in known:
        raise UserError(f"no suite {name!r}: choose {', '.join(known)}, or a .toml file that declares one")
    path = existing_file(name) if own else BUILT_IN / f"{name}.toml"
    suite: Suite = build(Suite, read_toml(path), f"{path}: ")
    if not suite.sets:
        raise UserError(f"{path}: sets is empty: name the sets of the suite")
    return replace(suite, sets=tuple(beside(path, each) for each in suite.sets)) if own else suite


def each_or_none(action: Callable[[Given], Made], values: Iterable[Given]) -> list[Made]:
    """The action on each value. Raises one `UserError` with all problems, so that users see them together."""
    made, problems = [], []
    for value in values:
        try:
            made.append(action(value))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    return made


def suite_record(suite: Suite, folders: Sequence[Path], results: Sequence[Result]) -> dict[str, Any]:
    """What `suite.json` holds: the model, and for each set its main metric with the published values of the same."""
    rows = [_row(folder.name, result) for folder, result in zip(folders, results, strict=True)]
    described = {"suite": suite.name, "description": suite.description}
    return {**described, "model": results[0]["model"], "backend": results[0]["backend"], "sets": rows}


def _row(name: str, result: Result) -> dict[str, Any]:
    metric = main_metric(result)
    published = [each for each in (result["set"] or {}).get("reference", ()) if each["metric"] == metric]
    return {
        "set": name,
        "metric": metric,
        **result["metrics"][metric],
        "n": sample_size(result, metric),
        "published": [{key: each[key] for key in ("model", "value", "source")} for each in published if each["value"]],
    }
