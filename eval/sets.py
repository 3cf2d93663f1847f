"""Evaluation sets, declared in TOML: name, source of the text or items, and published scores.

--set NAME_OR_FILE → `find_set` → `Request` → `Request.read` → evaluation data
"""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path

from mlmkit.errors import UserError
from mlmkit.eval.correlation import Correlation, number_columns
from mlmkit.eval.data import EvalData, file_data
from mlmkit.eval.item_data import ItemData
from mlmkit.eval.items import (
    ChoiceColumns,
    ClozeColumns,
    Item,
    ItemColumns,
    PairColumns,
    Row,
    keep_items,
    read_items,
    with_phenomena,
)
from mlmkit.eval.rows import Settings, pll_variant
from mlmkit.eval.set_files import FileReading, set_rows
from mlmkit.hub import HUB
from mlmkit.locations import Source, existing_file, find_files, is_tokens, location_exists
from mlmkit.tokenizer import Tokenizer
from mlmkit.toml import build, read_toml

BUILT_IN = Path(__file__).parent / "sets"
TASKS = ("text", "pairs", "choices", "cloze")


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
    """A published value of `metric` with its source, and the values of single phenomena if published.

    `languages` holds the value of each language of a set in several languages.
    """

    model: str
    metric: str
    source: str
    value: float | None = None
    note: str = ""
    phenomena: dict[str, float] | None = None
    languages: dict[str, float] | None = None


@dataclass(frozen=True)
class EvalSet:
    """A declared set. `hub` is a location as in `Source`, `local` a path or pattern in the data folder.

    With `languages` it describes one set per language; the language replaces `{language}` in `hub` and `local`. `files`
    says how local files of items are read. `phenomena` lists the paradigms of each, by name or as `prefix*`. `metric`
    is its main metric, which tables of several sets show: by default the first one.
    """

    name: str
    task: str
    description: str = ""
    language: str = ""
    licence: str = ""
    citation: str = ""
    homepage: str = ""
    hub: str = ""
    local: str = ""
    languages: tuple[str, ...] = ()
    metric: str = ""
    files: FileReading = field(default_factory=FileReading)
    text: TextReading = TextReading()
    pairs: PairReading = PairReading()
    choices: ChoiceColumns | None = None
    cloze: ClozeColumns | None = None
    phenomena: dict[str, tuple[str, ...]] = field(default_factory=dict)
    correlation: tuple[Correlation, ...] = ()
    reference: tuple[Reference, ...] = ()

    @property
    def usage(self) -> str:
        """How `--set` names it."""
        return f"{self.name}:LANGUAGE" if self.languages else self.name

    def for_language(self, language: str) -> "EvalSet":
        """The set in one of its `languages`, called NAME-LANGUAGE; the set itself if it has none.

        Raises `UserError` for a language that the set does not have.
        """
        if not self.languages and language:
            raise UserError(f"the set {self.name} has no languages to choose from: leave out {language!r}")
        if not self.languages:
            return self
        if language not in self.languages:
            example = f"{self.name}:{self.languages[0]}"
            raise UserError(f"name a language of {self.name}, as in {example}: it has {', '.join(self.languages)}")
        reference = (each for each in self.reference if not each.languages or language in each.languages)
        return replace(
            self,
            name=f"{self.name}-{language}",
            language=language,
            languages=(),
            hub=self.hub.replace("{language}", language),
            local=self.local.replace("{language}", language),
            reference=tuple(
                replace(each, value=each.languages[language], languages=None) if each.languages else each
                for each in reference
            ),
        )

    @property
    def columns(self) -> ItemColumns | None:
        """Where rows hold the items; None for text."""
        return None if self.task == "text" else getattr(self, self.task)

    def location(self, data: Path | None) -> str:
        """Where to read it from: a local copy if there is one, else the hub. Raises `UserError` if there is neither."""
        if path := _local(self.local, data):
            return str(path)
        if self.hub:
            return self.hub
        if not self.homepage:
            raise UserError(f"the set {self.name} has no {self.local} beside its declaration, nor under --data-dir")
        where = f"put {self.local} (from {self.homepage}) under --data-dir or $MLMKIT_DATA"
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
    columns: ItemColumns = field(default_factory=PairColumns)
    keep: Path | None = None

    def settings(self, settings: Settings, variant: str | None) -> Settings:
        """The settings to measure the set with; `variant` is that of pseudo-likelihood which the user asked for.

        Items are measured by pseudo-likelihood, in the variant that the set declares. Raises `UserError` if the user
        asked for another one, or for a sample of the tokens.
        """
        if self.task == "text":
            return settings
        if settings.pseudo_sample < 1.0:
            raise UserError(f"{self.name} holds {self.task}, whose tokens must all be scored: sampling is for text")
        declared, variant = self.columns.pll, variant and pll_variant(variant)
        if variant and declared and variant != declared:
            raise UserError(
                f"{self.name} is scored with pll = {declared!r}, as it was published: leave out {variant!r}"
            )
        chosen = {"variant": declared or variant or "original", "appended_masks": self.columns.appended_masks}
        return replace(settings, metrics=("pseudo",), **chosen)

    @property
    def numbers(self) -> list[str]:
        """The columns of human numbers."""
        return number_columns(self.declared.correlation if self.declared else ())

    def rows(self) -> Iterator[Row]:
        """The rows of a set that is not text. Raises `UserError` for one that is unreadable."""
        return set_rows(self.location, self.declared.files if self.declared else FileReading())

    def select(self, items: list[Item]) -> list[Item]:
        """The items that the set keeps, with their phenomena. Raises `UserError` for one that does not exist, and for a
        column of human numbers without one.
        """
        for column in self.numbers:
            if items and all(math.isnan(item.numbers[column]) for item in items):
                raise UserError(f"{self.location}: no row has a number in {column!r}, a column of [[correlation]]")
        if self.keep:
            items = keep_items(items, str(self.keep), set_rows(str(self.keep), FileReading(format="tsv")))
        phenomena = self.declared.phenomena if self.declared else {}
        return with_phenomena(items, phenomena) if phenomena else items

    def items(self) -> list[Item]:
        """The items of a set that is not text. Raises `UserError` if they are unreadable."""
        return self.select(read_items(self.rows(), self.columns, self.location, self.numbers))

    def read(self, tokenizer: Tokenizer) -> EvalData:
        """The set's data, tokenised. Raises `UserError` if it is unreadable."""
        set_name = self.declared.name if self.declared else None
        if self.source is not None:
            return file_data(self.source, tokenizer, set_name)
        source = {"set": set_name, "location": self.location}
        return ItemData(self.items(), tokenizer, source, self.task, self.columns)


def find_set(
    name: str, data: Path | None = None, *, text_field: str = "text", blank_line: bool = False, pairs: bool = False
) -> Request:
    """Find what `--set NAME_OR_FILE` names: a built-in set, the path of a declaration, or a file or hub dataset.

    `:LANGUAGE` after either of the first two chooses a language of a set in several languages.

    `data` is the data folder. `text_field`, `blank_line` and `pairs` say how to read a file or hub dataset. Raises
    `UserError` if `name` is none of these, or if its declaration is invalid.
    """
    if declared := _declared(name):
        location = declared.location(data)
        if declared.columns:
            keep = declared.kept(data)
            return Request(declared.name, declared.task, location, declared, columns=declared.columns, keep=keep)
        text = declared.text
        source = Source(location, text.field, text.blank_line, text.strip)
        return Request(declared.name, "text", location, declared, source)
    if not name.startswith(HUB):
        path = Path(name)
        if not path.exists() and not path.suffix and path.name == name:
            known = [item.usage for item in built_in_sets()]
            guess = get_close_matches(name, known, n=2)
            hint = f"did you mean {' or '.join(guess)}?" if guess else f"the sets are {', '.join(known)}"
            raise UserError(f"no set or file {name!r}: {hint}")
        if not is_tokens(name):
            find_files(Source(name))
    label = Path(name.replace(":", "-").replace("#", "-")).stem
    if pairs:
        return Request(label, "pairs", name)
    return Request(label, "text", name, source=Source(name, text_field, blank_line))


def _declared(name: str) -> EvalSet | None:
    """The declaration that NAME or FILE.toml means, alone or with :LANGUAGE; or NAME-LANGUAGE, as its results say."""
    built_in = {path.stem: path for path in BUILT_IN.glob("*.toml")}
    base, _, language = name.partition(":")
    if base.lower().endswith(".toml"):
        return read_set(existing_file(base), own=True).for_language(language)
    if base in built_in:
        return read_set(built_in[base]).for_language(language)
    base, _, language = name.rpartition("-")
    declared = read_set(built_in[base]) if base in built_in else None
    return declared.for_language(language) if declared and language in declared.languages else None


def built_in_sets() -> list[EvalSet]:
    """The declarations that come with mlmkit, sorted by name."""
    return [read_set(path) for path in sorted(BUILT_IN.glob("*.toml"), key=lambda path: path.stem)]


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
    tables = read_toml(path)
    try:
        declared: EvalSet = build(EvalSet, tables, f"{path}: ")
    except UserError as error:  # one that a dataclass raises does not name the file
        message = str(error)
        raise UserError(message if str(path) in message else f"{path}: {message}") from None
    if own:
        pairs = replace(declared.pairs, keep=beside(path, declared.pairs.keep))
        declared = replace(declared, local=beside(path, declared.local), pairs=pairs)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", declared.name):
        raise UserError(f"{path}: the name {declared.name!r} may only have letters, digits, '.', '-' and '_'")
    if declared.task not in TASKS:
        raise UserError(f"{path}: no task {declared.task!r}: choose {' or '.join(TASKS)}")
    others = {*TASKS, *(("files", "phenomena") if declared.task == "text" else ())} - {declared.task}
    if unused := sorted(others & tables.keys()):
        raise UserError(f"{path}: the table [{unused[0]}] has no effect, because its task is {declared.task!r}")
    if declared.task != "text" and declared.columns is None:
        raise UserError(f"{path}: it needs a table [{declared.task}], which names the columns (docs/own-sets.md)")
    _check_correlations(declared, path)
    if "files" in tables and not declared.local:
        raise UserError(f"{path}: the table [files] has no effect, because the set has no local")
    if declared.phenomena and declared.columns and declared.columns.phenomenon:
        raise UserError(f"{path}: [phenomena] and {declared.task}.phenomenon exclude each other: leave one out")
    if declared.phenomena and declared.columns and not declared.columns.paradigm:
        raise UserError(f"{path}: [phenomena] needs {declared.task}.paradigm, the column whose names it lists")
    if not declared.hub and not declared.local:
        raise UserError(f"{path}: it needs hub or local, to say where the data is")
    if bool(declared.languages) != ("{language}" in declared.hub + declared.local):
        raise UserError(f"{path}: give both languages and {{language}} in hub or local, or neither")
    return declared


def _check_correlations(declared: EvalSet, path: Path) -> None:
    if declared.correlation and declared.task == "text":
        raise UserError(f"{path}: [[correlation]] needs items: pairs, choices or cloze")
    names = [each.name for each in declared.correlation]
    if "" in names or len(set(names)) < len(names):
        raise UserError(f"{path}: each [[correlation]] needs a name of its own")
    for each in declared.correlation:
        if each.score in ("probability", "difference") and declared.task != "pairs":
            raise UserError(f"{path}: the score {each.score!r} of correlation {each.name} is for pairs")
        if each.previous_score and not (declared.cloze and declared.cloze.previous_target):
            raise UserError(f"{path}: previous_score needs previous_target in [cloze]")


def beside(declaration: Path, name: str) -> str:
    """The absolute path of a file beside a declaration; the name itself if there is none."""
    path = declaration.absolute().parent / name
    return str(path) if name and location_exists(path) else name


def _local(name: str, data: Path | None) -> Path | None:
    """An existing file in the data folder, or at an absolute path; else None."""
    path = Path(name) if data is None else data / name
    return path if name and (data or path.is_absolute()) and location_exists(path) else None
