"""Render the HTML pages from `eval/templates`. They load nothing from elsewhere."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlmkit.eval.display import number, p_value, signed, span
from mlmkit.files import write_text


def render(template: str, path: Path, **content: Any) -> None:
    """Write a template of `eval/templates`, with everything escaped that it does not mark as safe."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent / "templates")
    options = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, **options)
    environment.filters |= {each.__name__: _with_minus(each) for each in (number, signed, span, p_value)}
    environment.filters["heat"] = heat
    write_text(path, environment.get_template(template).render(**content))


def _with_minus(shown: Callable[..., str]) -> Callable[..., str]:
    """The same text with the minus sign in place of the hyphen."""
    return lambda *values: shown(*values).replace("-", "−")


def heat(log_prob: float | None) -> str:
    """How unexpected a token was, as a share of the strongest colour: 0 if certain, 1 from 8 nats."""
    return "0" if log_prob is None else f"{math.sqrt(min(-log_prob, 8.0) / 8.0):.2f}"
