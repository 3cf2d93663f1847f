"""Items of a set of pairs, choices or cloze targets: texts in each of which one span is scored.

    rows of fields (`set_files`) → `read_items`, by the columns that the set declares → `Item`s
    → one document per option (`item_data`) → accuracies (`item_metrics`) and correlations (`correlation`)

An item has one or more options: the two sentences of a pair, the choices, or the one target of a cloze item.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from mlmkit.documents import checked_text
from mlmkit.errors import UserError
from mlmkit.eval.rows import pll_variant
from mlmkit.lines import is_blank
from mlmkit.tables import nested_value

SCORINGS = ("all", "shared")
NORMALISATIONS = ("none", "tokens", "characters")
MISSING_NUMBERS = ("", "na", "nan", "none", "null")

Row = tuple[str, dict[str, Any]]  # where it stands, for messages, and its fields


@dataclass(frozen=True)
class Option:
    """A text of which the characters from `begin` up to `end` (code points) are scored."""

    text: str
    begin: int
    end: int

    @classmethod
    def of(cls, context: str, scored: str, join: str = " ", suffix: str = "") -> "Option":
        """`scored` in its frame. `join` is added only after a context, and is scored, as it is in the token ` word`."""
        before, scored = (context, join + scored) if context else ("", scored)
        return cls(before + scored + suffix, len(before), len(before) + len(scored))

    @property
    def is_whole(self) -> bool:
        """Whether all of the text is scored."""
        return not self.begin and self.end == len(self.text)

    @property
    def scored(self) -> str:
        """The characters that are scored."""
        return self.text[self.begin : self.end]


@dataclass(frozen=True)
class Item:
    """The option `label` should be the most probable. A cloze item has one option, and perhaps that before it.

    `phenomenon` and `paradigm` are its coarser and finer group, "" for none. `numbers` are human numbers by their
    column; NaN where there is none.
    """

    options: tuple[Option, ...]
    label: int = 0
    phenomenon: str = ""
    paradigm: str = ""
    id: str = ""
    numbers: dict[str, float] = field(default_factory=dict)


# ---------------------------------------------------------------- declarations


@dataclass(frozen=True)
class ItemColumns(ABC):
    """The columns in which a row holds an item, and how its options are scored.

    A value that names a column may be a path, an alternative or a template. `a.b` reaches into nested rows, and `a.0`
    takes the first entry of a list, or of text separated by tabs; `a|b` takes the first that exists; in a template
    (`The {animal} sleeps.`) each `{column}` is replaced. `join` stands between a context and what is scored, `suffix`
    behind it. A score is the PLL of the variant `pll` ("": the user's choice), divided by the scored tokens or
    characters if `normalisation` says so. Raises `UserError` for an unknown variant or normalisation.
    """

    join: str = " "
    suffix: str = ""
    normalisation: str = "none"
    pll: str = ""
    phenomenon: str = ""
    paradigm: str = ""
    id: str = ""
    scoring = "all"
    appended_masks = 0

    def __post_init__(self) -> None:
        _check("normalisation", self.normalisation, NORMALISATIONS)
        if self.pll:
            object.__setattr__(self, "pll", pll_variant(self.pll))

    @property
    def sides(self) -> tuple[str, ...]:
        """What a pair's two options are called in the names of metrics; none for other items."""
        return ()

    def items(self, rows: Iterable[Row], numbers: Iterable[str]) -> Iterator[Item]:
        """Yield the items of rows. Raises `UserError` naming the row that holds none."""
        return (self.item(group, numbers) for group in self.groups(rows))

    def groups(self, rows: Iterable[Row]) -> Iterator[list[Row]]:
        """The rows of each item: one, unless the options are in different rows."""
        return ([row] for row in rows)

    def item(self, group: list[Row], numbers: Iterable[str]) -> Item:
        """The item that a group of rows holds. Raises `UserError` as `items` does."""
        ((where, row),) = group
        return self._item(row, where, self.options(row, where), numbers)

    @abstractmethod
    def options(self, row: dict[str, Any], where: str) -> tuple[tuple[Option, ...], int]:
        """The options of a row, and the index of the right one."""

    def is_empty(self, item: Item) -> bool:
        """Whether what an option scores is whitespace only."""
        return any(is_blank(option.scored) for option in item.options)

    def _item(
        self, row: dict[str, Any], where: str, options: tuple[tuple[Option, ...], int], numbers: Iterable[str]
    ) -> Item:
        names = {name: _text(row, getattr(self, name), where) for name in ("phenomenon", "paradigm", "id")}
        return Item(*options, **names, numbers={column: _number(row, column, where) for column in numbers})

    def _option(self, row: dict[str, Any], where: str, context: str, scored: str) -> Option:
        suffix = _text(row, self.suffix, where, is_literal=True)
        return Option.of(_text(row, context, where), scored, self.join, suffix)


@dataclass(frozen=True)
class PairColumns(ItemColumns):
    """Pairs: `good` should be more probable than `bad`; or, where neither is better, `first` against `second`.

    With `context`, only what follows it is scored; `bad_context` is that of the worse or second option if it differs.
    `scoring`: `all` scores whole sentences, `shared` only the tokens that both have in common (CrowS-Pairs).

    With `label`, `good` and `bad` name a list of sentences, and the parallel list `label` says which entry is which.
    With `group_by`, the two stand in different rows: those of one item have the same value of `group_by`, and that of
    `variant` is one of the two `variants`, the better or first one first; rows with other variants are left out.
    """

    good: str = ""
    bad: str = ""
    first: str = ""
    second: str = ""
    context: str = ""
    bad_context: str = ""
    scoring: str = "all"
    label: str = ""
    good_label: int | str = 1
    bad_label: int | str = 0
    group_by: str = ""
    variant: str = ""
    variants: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("scoring", self.scoring, SCORINGS)
        named = [name for name in ("good", "bad", "first", "second") if getattr(self, name)]
        if named not in ([], ["good", "bad"], ["first", "second"]):
            raise UserError(f"pairs need good and bad, or first and second, not {' and '.join(named)} alone")
        if self.scoring == "shared" and (self.context or self.suffix or self.pll in ("together", "left-to-right")):
            raise UserError('scoring = "shared" is for whole sentences: leave out context, suffix and pll')
        if self.bad_context and not self.context:
            raise UserError("bad_context needs context, the context of the better sentence")
        if self.group_by and not (self.variant and len(self.variants) == len(set(self.variants)) == 2):
            raise UserError("group_by needs variant, a column, and variants, its two values")
        if (self.variant or self.variants) and not self.group_by:
            raise UserError("variant and variants need group_by, which says what the rows of an item have in common")
        if self.group_by and self.label:
            raise UserError("group_by and label exclude each other: leave one out")

    @property
    def sides(self) -> tuple[str, ...]:
        return ("first", "second") if self.first else ("good", "bad")

    def groups(self, rows: Iterable[Row]) -> Iterator[list[Row]]:
        if not self.group_by:
            return super().groups(rows)
        groups: dict[str, list[Row]] = {}
        for where, row in rows:
            groups.setdefault(_text(row, self.group_by, where), []).append((where, row))
        return iter(groups.values())

    def item(self, group: list[Row], numbers: Iterable[str]) -> Item:
        if not self.group_by:
            return super().item(group, numbers)
        variants: dict[str, Row] = {}
        for where, row in group:
            variant = _text(row, self.variant, where)
            if variant in variants:
                raise UserError(
                    f"{where}: {self.variant} {variant!r} occurs twice in one item: add columns to {self.group_by!r}"
                )
            variants[variant] = (where, row)
        if missing := [each for each in self.variants if each not in variants]:
            where, row = group[0]
            name = _text(row, self.group_by, where)
            raise UserError(
                f"{where}: {name!r} has no row with {self.variant} {missing[0]!r}, only {', '.join(variants)}"
            )
        sides = [variants[each] for each in self.variants]
        options = tuple(self._side(row, where, side) for side, (where, row) in enumerate(sides))
        return self._item(sides[0][1], sides[0][0], (options, 0), numbers)

    def options(self, row: dict[str, Any], where: str) -> tuple[tuple[Option, ...], int]:
        return (self._side(row, where, 0), self._side(row, where, 1)), 0

    def _side(self, row: dict[str, Any], where: str, side: int) -> Option:
        column = (self.first or self.good or "sentence_good", self.second or self.bad or "sentence_bad")[side]
        context = (self.context, self.bad_context or self.context)[side]
        if not self.label:
            return self._option(row, where, context, _text(row, column, where, is_strict=True))
        sentences, labels = _value(row, column, where), _value(row, self.label, where)
        wanted = (self.good_label, self.bad_label)[side]
        if not (isinstance(sentences, list) and isinstance(labels, list) and len(labels) == len(sentences)):
            raise UserError(f"{where}: {column!r} and {self.label!r} are not lists of the same length")
        if wanted not in labels:
            raise UserError(f"{where}: no sentence is labelled {wanted!r}")
        sentence = checked_text(sentences[labels.index(wanted)], f"{where}, {column!r}")
        return self._option(row, where, context, sentence)


@dataclass(frozen=True)
class ChoiceColumns(ItemColumns):
    """One right answer among several, after an optional `context`.

    `choices` names columns, or one column with a list. `label` is the column that says which is right: its index from
    0, its letter (A, B, ...) or its text; or a number, the same for all rows.
    """

    choices: tuple[str, ...] = ()
    label: str | int = ""
    context: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.choices:
            raise UserError("choices need choices: columns, or one column with a list")
        if self.label == "":
            raise UserError("choices need label: a column, or the index of the right choice")

    def options(self, row: dict[str, Any], where: str) -> tuple[tuple[Option, ...], int]:
        if len(self.choices) == 1 and isinstance(values := _value(row, self.choices[0], where), list):
            texts = [checked_text(value, f"{where}, a choice") for value in values]
        else:
            texts = [_text(row, column, where, is_strict=True) for column in self.choices]
        if len(texts) < 2:
            raise UserError(f"{where} has {len(texts)} choices, but an item needs two or more")
        value = self.label if isinstance(self.label, int) else _value(row, self.label, where)
        if (label := _index(value, texts)) is None:
            raise UserError(f"{where}: the label {value!r} is none of the {len(texts)} choices")
        return tuple(self._option(row, where, self.context, text) for text in texts), label


@dataclass(frozen=True)
class ClozeColumns(ItemColumns):
    """A `target` in the frame of `prefix` and `suffix`: how probable is it?

    With `appended_masks`, the model sees the text up to the token and then that many masks, and nothing else (the
    reading task of BabyLM). `previous_prefix` and `previous_target` name the word before, whose score may be part of
    the baseline of a correlation.
    """

    prefix: str = ""
    target: str = ""
    appended_masks: int = 0
    previous_prefix: str = ""
    previous_target: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target:
            raise UserError("cloze needs target, the column with the text to score")
        if self.previous_prefix and not self.previous_target:
            raise UserError("previous_prefix needs previous_target, the word before")
        if self.appended_masks < 0 or (self.appended_masks and self.pll != "left-to-right"):
            raise UserError('appended_masks must be at least 1 and needs pll = "left-to-right"')
        if self.appended_masks and self.suffix:
            raise UserError("suffix has no effect with appended_masks, because the model sees nothing after the target")

    def options(self, row: dict[str, Any], where: str) -> tuple[tuple[Option, ...], int]:
        options = [self._option(row, where, self.prefix, _text(row, self.target, where, is_strict=True))]
        if self.previous_target:
            values = [_value(row, column, where, "") for column in (self.previous_prefix, self.previous_target)]
            prefix, target = (str(value or "") for value in values)
            if not target or (self.previous_prefix and not prefix):  # BabyLM scores no word that begins a sentence
                prefix = target = ""
            options.append(Option.of(prefix, target, self.join))
        return tuple(options), 0

    def is_empty(self, item: Item) -> bool:
        return is_blank(item.options[0].scored)  # the word before may be missing


def read_items(rows: Iterable[Row], columns: ItemColumns, location: str, numbers: Iterable[str] = ()) -> list[Item]:
    """The items of a set's rows, with the human `numbers` of these columns.

    Raises `UserError` if there are none, or naming the first row that holds no item.
    """
    items = list(columns.items(rows, list(numbers)))
    if all(map(columns.is_empty, items)):
        raise UserError(f"{location}: it holds no items")
    return items


def keep_items(items: Iterable[Item], listing: str, rows: Iterable[Row]) -> list[Item]:
    """The items that the rows of a table list, with columns `UID` (paradigm) and `pairIDs` (separated by commas).

    Raises `UserError` for a file that is not such a table, or that lists items that do not exist.
    """
    table = [row for _, row in rows]
    if not table or not {"UID", "pairIDs"} <= table[0].keys():
        raise UserError(f"{listing}: not a table of pairs to keep: it needs columns UID and pairIDs")
    wanted = {(row["UID"], id) for row in table for id in row["pairIDs"].split(",")}
    kept = [item for item in items if (item.paradigm, item.id) in wanted]
    if len(kept) < len(wanted):
        raise UserError(f"{listing} lists {len(wanted)} pairs, of which {len(kept)} exist")
    return kept


def with_phenomena(items: Sequence[Item], phenomena: Mapping[str, Sequence[str]]) -> list[Item]:
    """The items with the phenomenon that lists their paradigm, by its name or its beginning and a `*`; "" for none.

    Raises `UserError` for a name that no paradigm has, and for a paradigm in two phenomena.
    """
    paradigms = sorted({item.paradigm for item in items})
    phenomenon_of: dict[str, str] = {}
    for phenomenon, names in phenomena.items():
        for name in names:
            matching = [each for each in paradigms if each == name or (name[-1:] == "*" and each.startswith(name[:-1]))]
            if not matching:
                raise UserError(
                    f"phenomena.{phenomenon}: no paradigm is called {name!r}: there are {', '.join(paradigms)}"
                )
            for paradigm in matching:
                if phenomenon_of.setdefault(paradigm, phenomenon) != phenomenon:
                    both = f"{phenomenon_of[paradigm]} and {phenomenon}"
                    raise UserError(f"the paradigm {paradigm!r} is in two phenomena, {both}")
    return [replace(item, phenomenon=phenomenon_of.get(item.paradigm, "")) for item in items]


# ---------------------------------------------------------------- fields of a row


def _value(row: dict[str, Any], column: str, where: str, default: Any = None) -> Any:
    """The first of a column's alternatives that the row has; "" without a column."""
    if not column:
        return ""
    for alternative in column.split("|"):
        with suppress(KeyError):
            if (value := nested_value(row, alternative)) is not None:
                return value
    if default is not None:
        return default
    problem = f"{where} has no field {column!r} (it has {', '.join(map(str, row))})"
    raise UserError(f"{problem}: name the columns in a set of your own (docs/own-sets.md)")


def _text(row: dict[str, Any], column: str, where: str, *, is_strict: bool = False, is_literal: bool = False) -> str:
    """The text of a column or template. With `is_strict` the field must hold text, not for example a number.

    With `is_literal`, a name that is not a template is used as the text itself.
    """
    if "{" in column:
        value = re.sub(r"\{([^{}]+)\}", lambda match: _text(row, match[1], where), column)
    else:
        value = column if is_literal else _value(row, column, where)
    is_ready = is_strict or isinstance(value, list | dict)  # `checked_text` refuses all but text
    return checked_text(value if is_ready else str(value), f"{where}, field {column!r}")


def _number(row: dict[str, Any], column: str, where: str) -> float:
    """The number in a column; NaN if it is missing there."""
    value = _value(row, column, where, math.nan)
    with suppress(TypeError, ValueError):
        number = math.nan if str(value).strip().lower() in MISSING_NUMBERS else float(value)
        if not math.isinf(number):
            return number
    raise UserError(f"{where}, field {column!r} holds {value!r}, not a number")


def _index(label: Any, texts: list[str]) -> int | None:
    """Which of the texts a label means: its index, its letter or the text itself; None for none of them."""
    if str(label) in texts and not isinstance(label, int):
        return texts.index(str(label))
    if re.fullmatch("[A-Za-z]", str(label)):
        index = ord(str(label).upper()) - ord("A")
    else:
        index = int(label) if re.fullmatch(r"\d+", str(label)) else -1
    return index if 0 <= index < len(texts) else None


def _check(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"no {name} {value!r}: choose {', '.join(choices)}")
