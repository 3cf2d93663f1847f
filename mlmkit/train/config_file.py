"""Read a training configuration: a TOML file with overrides, for a run, or for a branch of a checkpoint's run."""

import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlmkit.errors import UserError
from mlmkit.locations import Source, formats, is_tokens
from mlmkit.toml import build, read_toml
from mlmkit.train.config import CHANGEABLE, LENGTHS, PHASE_KEYS, REPLACES, Config, change, setting_names


def _are_tables(sources: Iterable[Source]) -> set[bool]:
    return {format != "text" for source in sources for format in formats(source)}


def _texts(config: Config) -> list[Source]:
    return [*config.data.sources, *config.held_out_sources.values()]


_HOW_TRAINED = "tokenizer.kind tokenizer.lowercase tokenizer.train_tokens"
_ADAPTED = "tokenizer.add model.new_head"
# Keys without effect, when that holds, and why. They are refused if the user gave them, even with the default value.
WITHOUT_EFFECT: tuple[tuple[str, Callable[[Config], object], str], ...] = (
    ("model.architecture", lambda c: c.model.init_from, "model.init_from brings its own"),
    (f"{_HOW_TRAINED} tokenizer.vocab_size", lambda c: c.tokenizer.path, "tokenizer.path names a finished tokenizer"),
    (
        _HOW_TRAINED,
        lambda c: c.model.init_from and not c.tokenizer.vocab_size,
        "model.init_from brings its own tokenizer and no tokenizer.vocab_size asks for another",
    ),
    (_ADAPTED, lambda c: not c.model.init_from, "there is no model.init_from to change"),
    (
        "data.text_field",
        lambda c: True not in _are_tables(text for text in _texts(c) if text.text_field == c.data.text_field),
        "text files have no fields, and the other texts state their own",
    ),
    ("data.blank_line", lambda c: c.data.blank_line and False not in _are_tables(_texts(c)), "there is no text file"),
    (
        "data.on_bad_row",
        lambda c: all(is_tokens(text.location) for text in _texts(c)),
        "all texts are tokenised",
    ),
    ("data.weights", lambda c: len({*c.data.weights}) == 1 and 1.0 not in c.data.weights, "they are equal"),
    ("data.temperature", lambda c: len(c.data.sources) == 1, "there is one text"),
    ("masking.final_mask_prob", lambda c: c.train.steps == 1, "one step has one rate"),
    ("optim.decay_share optim.decay_shape", lambda c: c.optim.schedule != "wsd", 'optim.schedule is not "wsd"'),
)


def load_config(path: str | Path, overrides: Sequence[str] = (), base: Config | None = None) -> Config:
    """Read a TOML file and apply `table.key=value` or `phase.NAME.table.key=value` overrides.

    With `base`, the file states what changes in the phase that follows `base`. Raises `UserError` naming a wrong or
    useless key.
    """
    tables = read_toml(path)
    phases = tables.get("phase", [])
    if not (isinstance(phases, list) and all(isinstance(phase, dict) for phase in phases)):
        raise UserError(f"{path}: write each phase as [[phase]]")
    for override in overrides:
        name, equals, value = override.partition("=")
        *parents, key = name.strip().split(".")
        if not equals or len(parents) != (3 if parents[:1] == ["phase"] else 1):
            raise UserError(f"--set {override}: write it as table.key=value, for example optim.lr=1e-3")
        values = _phase(phases, parents[1], override) if len(parents) == 3 else tables
        values = values.setdefault(parents[-1], {})
        if not isinstance(values, dict):
            raise UserError(f"{path}: {parents[-1]} must be a table, [{parents[-1]}]")
        values[key] = toml_value(value.strip())
    whole = {name: values for name, values in tables.items() if name != "phase"}
    config = _continue(base, whole, phases) if base else build(Config, {**whole, "phase": phases})
    given = setting_names(whole, str(path))
    if phases:
        if length := next((name for name in LENGTHS if f"train.{name}" in given), ""):
            raise UserError(f"train.{length} has no effect, as each phase has its own length: leave it out")
        first = {name: values for name, values in phases[0].items() if name != "name"}
        replaced = {
            f"{table}.{key}" for table in first for own in first[table] for key in (own, *REPLACES.get(own, ()))
        }
        if useless := sorted(replaced.intersection(given)):
            raise UserError(f"{useless[0]} has no effect, as the first phase sets it: leave one of them out")
    _refuse_useless(given, list(config.phases.values()))
    for data in (phase.data for phase in config.phases.values()):
        for stated, text in zip(data.source, data.sources, strict=False):
            if stated.text_field and True not in _are_tables([text]):
                raise UserError(f"data.source.text_field has no effect on {text.name}, a text file: leave it out")
    for phase in phases:
        given = setting_names({table: phase[table] for table in phase if table != "name"}, "")
        _refuse_useless(given, [config.phases[phase["name"]]])
    return config


def _phase(phases: list[dict[str, Any]], name: str, override: str) -> dict[str, Any]:
    for phase in phases:
        if phase.get("name") == name:
            return phase
    known = ", ".join(str(phase.get("name")) for phase in phases) or "there are none"
    raise UserError(f"--set {override}: no phase is called {name}: {known}")


def _continue(base: Config, tables: dict[str, Any], phases: list[dict[str, Any]]) -> Config:
    """The configuration of a branch: the phase that follows `base`, and settings of the run such as `train.device`.

    A setting that a branch cannot change may be repeated.
    """
    given = setting_names(tables, "the branch")
    tables = dict(tables)
    if tables.get("train", {}).get("precision") == "auto":  # that of the checkpoint
        tables["train"] = {key: value for key, value in tables["train"].items() if key != "precision"}
    held_out = {**base.held_out, **tables.pop("held_out", {})}
    if "data.held_out" in given and isinstance(tables["data"]["held_out"], str):
        base = replace(base, held_out={})
    elif held_out:
        base = replace(base, data=replace(base.data, held_out=base.data.held_out_share or ""), held_out=held_out)
    if not phases and not any(tables.get("train", {}).get(length) for length in LENGTHS):
        raise UserError("a branch needs a length from the checkpoint on: train.steps, train.tokens or train.epochs")
    config = change(base, tables, phases)
    for table, _, name in (key.partition(".") for key in given if not key.startswith("held_out.")):
        was = getattr(getattr(base, table), name)
        can_change = f"{PHASE_KEYS.get(table, '')} {CHANGEABLE.get(table, '')}".split()
        if name not in can_change and getattr(getattr(config, table), name) != was:
            raise UserError(f"{table}.{name} cannot change in a branch: it is {was!r} in the checkpoint: leave it out")
    return config


def _refuse_useless(given: Sequence[str], phases: Sequence[Config]) -> None:
    for names, applies, reason in WITHOUT_EFFECT:
        if (useless := sorted(set(given).intersection(names.split()))) and all(map(applies, phases)):
            raise UserError(f"{useless[0]} has no effect, as {reason}: leave it out")


def toml_value(text: str) -> Any:
    """A TOML value, or the text itself, so that `--set data.train=corpus.txt` needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
