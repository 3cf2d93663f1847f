"""TOML files as dataclasses: a field's type, and a `Rule` if it is `Annotated`, say what its key may hold."""

import math
import tomllib
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from mlmkit.errors import UserError

KINDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number", dict: "a table"}


@dataclass(frozen=True)
class Rule:
    """Which values a field may hold: `holds` decides, `text` completes "NAME must be ...".

    `convert`, if given, comes first; it returns values that it cannot convert as they are.
    """

    holds: Callable[[Any], bool]
    text: str
    convert: Callable[[Any], Any] | None = None


def one_of(*choices: str) -> Rule:
    """The rule that a value is one of `choices`."""
    return Rule(choices.__contains__, f"one of {', '.join(choices)}")


def read_toml(path: str | Path) -> dict[str, Any]:
    """The file's tables. Raises `UserError` if it cannot be read or is not TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # tomllib's own error is a ValueError
        raise UserError(f"{path}: not valid TOML: {error}") from None


def build(kind: type, values: dict[str, Any], prefix: str = "") -> Any:
    """The dataclass `kind` with the values of a table. Raises `UserError` naming a key that is unknown or wrong.

    A field that is a tuple takes a list or a single value. `prefix` precedes the key in messages.
    """
    arguments = checked(kind, values, prefix)
    for item in fields(kind):
        if item.name not in arguments and item.default is item.default_factory is MISSING:
            raise UserError(f"{prefix}{item.name} is missing")
    return kind(**arguments)


def checked(kind: type, values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a table as the fields of the dataclass `kind` hold them. Raises `UserError` as `build` does."""
    hints, arguments = get_type_hints(kind, include_extras=True), {}
    for key, value in values.items():
        if key not in hints:
            guess = get_close_matches(key, hints, n=1)
            hint = f"did you mean {prefix}{guess[0]}?" if guess else f"known are {', '.join(hints)}"
            raise UserError(f"unknown setting {prefix}{key}: {hint}")
        arguments[key] = _checked(hints[key], value, f"{prefix}{key}")
    return arguments


def _checked(kind: Any, value: Any, name: str) -> Any:
    if get_origin(kind) is Annotated:
        kind, rule = get_args(kind)
        value = rule.convert(value) if rule.convert else value
        if rule.convert and isinstance(value, str):
            raise UserError(f"{name} must be {rule.text}, not {value!r}")
        value = _checked(kind, value, name)
        if not rule.holds(value):
            raise UserError(f"{name} must be {rule.text}, not {value!r}")
        return value
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{name} must be a table")
        return build(kind, value, f"{name}.")  # pyright: ignore[reportArgumentType]
    if get_origin(kind) is tuple:
        values = value if isinstance(value, list | tuple) else [value] if value != "" else []
        return tuple(_checked(get_args(kind)[0], each, name) for each in values)
    if get_origin(kind) is dict and not isinstance(value, dict):
        raise UserError(f"{name} must be a table, not {value!r}")
    if get_origin(kind) is dict:
        return {key: _checked(get_args(kind)[1], each, f"{name}.{key}") for key, each in value.items()}
    kinds = [each for each in get_args(kind) or (kind,) if each is not NoneType]  # TOML has no None
    if len(kinds) == 1 and kinds[0] is not kind:
        return _checked(kinds[0], value, name)
    if type(value) is int and float in kinds:
        value = float(value)
    if type(value) not in kinds or (type(value) is float and math.isnan(value)):
        raise UserError(
            f"{name} must be {' or '.join(KINDS[get_origin(each) or each] for each in kinds)}, not {value!r}"
        )
    return value
