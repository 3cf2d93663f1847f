"""Evaluation sets, declared in TOML: name, source of the text or pairs, and published scores.

--set NAME_OR_FILE → `find_set` → `Request` → `Request.read` → evaluation data
"""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlmkit.errors import UserError
from mlmkit.eval.data import EvalData, file_data
from mlmkit.eval.pairs import PairColumns, PairData, keep_pairs, read_pairs
from mlmkit.locations import HUB, Source, existing_file, find_files, is_tokens
from mlmkit.tokenizer import Tokenizer
from mlmkit.toml import build, read_toml

BUILT_IN = Path(__file__).parent / "sets"
TASKS = ("text", "pairs")


@dataclass(frozen=True)
class TextReading:
    """How a text set is read; the fields are those of `mlmkit.locations.Source`."""

    field: str = "text"
    blank_line: bool = False
    strip: bool = False


@dataclass(frozen=True)
class PairReading(PairColumns):
    """How pairs are read. `keep` is a table of the pairs to keep, in the data folder; `keep_from` is its source."""

    keep: str = ""
    keep_from: str = ""


@dataclass(frozen=True)
class Reference:
    """A published value of `metric` with its source, and the values of single phenomena if published."""

    model: str
    metric: str
    source: str
    value: float | None = None
    note: str = ""
    phenomena: dict[str, float] | None = None


@dataclass(frozen=True)
class EvalSet:
    """A declared set. `hub` is a location as in `Source`, `local` a path in the data folder."""

    name: str
    task: str
    description: str = ""
    language: str = ""
    licence: str = ""
    citation: str = ""
    homepage: str = ""
    hub: str = ""
    local: str = ""
    text: TextReading = TextReading()
    pairs: PairReading = PairReading()
    reference: tuple[Reference, ...] = ()

    def location(self, data: Path | None) -> str:
        """Where to read it from: a local copy if there is one, else the hub. Raises `UserError` if there is neither."""
        if path := _local(self.local, data):
            return str(path)
        if self.hub:
            return self.hub
        where = f"put {self.local} (from {self.homepage or 'its publisher'}) under --data-dir or $MLMKIT_DATA"
        raise UserError(f"the set {self.name} is not on the hub: {where}")

    def kept(self, data: Path | None) -> Path | None:
        """The table of pairs to keep, or None. Raises `UserError` if the set needs one that is missing."""
        if not self.pairs.keep:
            return None
        if path := _local(self.pairs.keep, data):
            return path
        raise UserError(
            f"the set {self.name} needs {self.pairs.keep} under --data-dir or $MLMKIT_DATA (made from "
            f"{self.pairs.keep_from or self.homepage})"
        )


@dataclass(frozen=True)
class Request:
    """A set that was found but not read yet."""

    name: str
    task: str
    location: str
    declared: EvalSet | None = None
    source: Source | None = None
    columns: PairColumns = field(default_factory=PairColumns)
    keep: Path | None = None

    def read(self, tokenizer: Tokenizer) -> EvalData:
        """The set's data, tokenised. Raises `UserError` if it is unreadable."""
        set_name = self.declared.name if self.declared else None
        if self.source is not None:
            return file_data(self.source, tokenizer, set_name)
        pairs = read_pairs(self.location, self.columns)
        if self.keep:
            pairs = keep_pairs(pairs, self.keep)
        return PairData(pairs, tokenizer, {"set": set_name, "location": self.location}, self.columns.scoring)


def find_set(
    name: str, data: Path | None = None, *, text_field: str = "text", blank_line: bool = False, pairs: bool = False
) -> Request:
    """Find what `--set NAME_OR_FILE` names: a built-in set, the path of a declaration, or a file or hub dataset.

    `data` is the data folder. `text_field`, `blank_line` and `pairs` say how to read a file or hub dataset. Raises
    `UserError` if `name` is none of these, or if its declaration is invalid.
    """
    if (own := name.lower().endswith(".toml")) or name in {path.stem for path in BUILT_IN.glob("*.toml")}:
        declared = read_set(existing_file(name) if own else BUILT_IN / f"{name}.toml", own=own)
        location = declared.location(data)
        if declared.task == "pairs":
            return Request(declared.name, "pairs", location, declared, columns=declared.pairs, keep=declared.kept(data))
        text = declared.text
        source = Source(location, text.field, text.blank_line, text.strip)
        return Request(declared.name, "text", location, declared, source)
    if not name.startswith(HUB):
        path = Path(name)
        if not path.exists() and not path.suffix and path.name == name:
            known = ", ".join(item.name for item in built_in_sets())
            raise UserError(f"no set or file {name!r}: the sets are {known}")
        if not is_tokens(name):
            find_files(Source(name))
    label = Path(name.replace(":", "-").replace("#", "-")).stem
    if pairs:
        return Request(label, "pairs", name)
    return Request(label, "text", name, source=Source(name, text_field, blank_line))


def built_in_sets() -> list[EvalSet]:
    """The declarations that come with mlmkit, sorted by name."""
    return [read_set(path) for path in sorted(BUILT_IN.glob("*.toml"))]


def data_folder(option: str | None) -> Path | None:
    """`--data-dir`, or `$MLMKIT_DATA`, or None. Raises `UserError` if the folder does not exist."""
    chosen = option or os.environ.get("MLMKIT_DATA")
    if not chosen:
        return None
    if not Path(chosen).is_dir():
        raise UserError(f"the data folder {chosen} does not exist")
    return Path(chosen)


def read_set(path: Path, *, own: bool = False) -> EvalSet:
    """Read a declaration; `own` is for one outside mlmkit. Raises `UserError` naming the key that is wrong."""
    declared: EvalSet = build(EvalSet, read_toml(path), f"{path}: ")
    if own:
        pairs = replace(declared.pairs, keep=_beside(path, declared.pairs.keep))
        declared = replace(declared, local=_beside(path, declared.local), pairs=pairs)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", declared.name):
        raise UserError(f"{path}: the name {declared.name!r} may only have letters, digits, '.', '-' and '_'")
    if declared.task not in TASKS:
        raise UserError(f"{path}: no task {declared.task!r}: choose {' or '.join(TASKS)}")
    if not declared.hub and not declared.local:
        raise UserError(f"{path}: it needs hub or local, to say where the data is")
    return declared


def _beside(declaration: Path, name: str) -> str:
    """The absolute path of a file beside a declaration; the name itself if there is none."""
    path = declaration.absolute().parent / name
    return str(path) if name and path.exists() else name


def _local(name: str, data: Path | None) -> Path | None:
    """An existing file in the data folder, or at an absolute path; else None."""
    path = Path(name) if data is None else data / name
    return path if name and (data or path.is_absolute()) and path.exists() else None
