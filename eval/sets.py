"""Benchmark sets, declared in TOML: a name, where its text or pairs come from, and what others have reached on it."""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlmkit.documents import HUB, Source, existing_file
from mlmkit.errors import UserError
from mlmkit.eval.material import Material, TextMaterial
from mlmkit.eval.pairs import PairColumns, PairMaterial, keep_pairs, read_pairs
from mlmkit.tokenizer import Tokenizer
from mlmkit.toml import build, read_toml

BUILT_IN = Path(__file__).parent / "sets"
TASKS = ("text", "pairs")


@dataclass(frozen=True)
class TextReading:
    """How a text set is read: see `mlmkit.documents.Source`."""

    field: str = "text"
    blank_line: bool = False
    strip: bool = False


@dataclass(frozen=True)
class PairReading(PairColumns):
    """How pairs are read. `keep` is a table, in the data folder, of the pairs to keep; `keep_from` says whence."""

    keep: str = ""
    keep_from: str = ""


@dataclass(frozen=True)
class Reference:
    """A published value of `metric`, with its origin, and those of single phenomena if they were published too."""

    model: str
    metric: str
    source: str
    value: float | None = None
    note: str = ""
    phenomena: dict[str, float] | None = None


@dataclass(frozen=True)
class EvalSet:
    """A declared set. `hub` is a location as in `Source`; `local` a path under the data folder."""

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
        """Where it is read from: a local copy if there is one, the hub otherwise. Raises `UserError` for neither."""
        if found := _local(self.local, data):
            return str(found)
        if self.hub:
            return self.hub
        where = f"put {self.local} (from {self.homepage or 'its publisher'}) under --data-dir or $MLMKIT_DATA"
        raise UserError(f"the set {self.name} is not on the hub: {where}")

    def kept(self, data: Path | None) -> Path | None:
        """The table of pairs to keep, if the set has one. Raises `UserError` where it is missing."""
        if not self.pairs.keep:
            return None
        if found := _local(self.pairs.keep, data):
            return found
        raise UserError(
            f"the set {self.name} needs {self.pairs.keep} under --data-dir or $MLMKIT_DATA (made from "
            f"{self.pairs.keep_from or self.homepage})"
        )


@dataclass(frozen=True)
class Request:
    """A set to measure on, found but not yet read."""

    name: str
    task: str
    location: str
    declared: EvalSet | None = None
    source: Source | None = None
    columns: PairColumns = field(default_factory=PairColumns)
    keep: Path | None = None

    def read(self, tokenizer: Tokenizer) -> Material:
        """Pairs are read and tokenised now, text while it is measured. Raises `UserError` for what cannot be read."""
        if self.source is not None:
            return TextMaterial(self.source, tokenizer, self.declared.name if self.declared else None)
        pairs = read_pairs(self.location, self.columns)
        if self.keep:
            pairs = keep_pairs(pairs, self.keep)
        origin = {"set": self.declared.name if self.declared else None, "location": self.location}
        return PairMaterial(pairs, tokenizer, origin, self.columns.scoring)


def find_set(
    name: str, data: Path | None = None, *, text_field: str = "text", blank_line: bool = False, pairs: bool = False
) -> Request:
    """What `--set NAME_OR_FILE` means: a built-in set, a declaration's path, or a file or hub dataset as it is.

    `data` is the data folder. `text_field`, `blank_line` and `pairs` are for the latter. Raises `UserError` if it is
    none of them.
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
        existing_file(name)
    label = Path(name.replace(":", "-").replace("#", "-")).stem
    if pairs:
        return Request(label, "pairs", name)
    return Request(label, "text", name, source=Source(name, text_field, blank_line))


def built_in_sets() -> list[EvalSet]:
    """The declarations that come with mlmkit, by name."""
    return [read_set(path) for path in sorted(BUILT_IN.glob("*.toml"))]


def data_folder(option: str | None) -> Path | None:
    """`--data-dir`, or `$MLMKIT_DATA`. Raises `UserError` if it is no folder."""
    chosen = option or os.environ.get("MLMKIT_DATA")
    if not chosen:
        return None
    if not Path(chosen).is_dir():
        raise UserError(f"the data folder {chosen} does not exist")
    return Path(chosen)


def read_set(path: Path, *, own: bool = False) -> EvalSet:
    """A declaration. Raises `UserError` naming the key that is wrong."""
    found: EvalSet = build(EvalSet, read_toml(path), f"{path}: ")
    if own:
        pairs = replace(found.pairs, keep=_beside(path, found.pairs.keep))
        found = replace(found, local=_beside(path, found.local), pairs=pairs)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", found.name):
        raise UserError(f"{path}: the name {found.name!r} is not of letters, digits, '.', '-' and '_' alone")
    if found.task not in TASKS:
        raise UserError(f"{path}: no task {found.task!r}: choose {' or '.join(TASKS)}")
    if not found.hub and not found.local:
        raise UserError(f"{path}: it needs hub or local, to say where the data is")
    return found


def _beside(declaration: Path, name: str) -> str:
    """A file that lies beside a user's own declaration, by its whole path."""
    found = declaration.absolute().parent / name
    return str(found) if name and found.exists() else name


def _local(name: str, data: Path | None) -> Path | None:
    """A file in the data folder, or one that lies beside its declaration."""
    path = Path(name) if data is None else data / name
    return path if name and (data or path.is_absolute()) and path.exists() else None
