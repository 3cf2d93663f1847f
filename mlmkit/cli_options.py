"""Options that several commands share."""

import json
import re
from collections.abc import Callable
from typing import Any

import click

# Control characters but the tab, line separators, overrides of the direction of writing, half surrogates, invisible
# tags. What scripts need stays: joiners (Persian, Hindi), marks of direction, soft hyphens, spaces of any kind.
STEERING = re.compile(
    "[\0-\x08\n-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u206f\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def print_json(value: Any) -> None:
    """One line on standard output."""
    click.echo(STEERING.sub(lambda found: json.dumps(found[0])[1:-1], json.dumps(value, ensure_ascii=False)))


def say(line: object) -> None:
    """A line for people on standard output, `printable`."""
    click.echo(printable(str(line)))


def printable(text: str) -> str:
    """The text with every character that could steer a terminal written as an escape."""
    return STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """What runs the model, and where."""
    command = click.option(
        "--device", default="auto", show_default=True, metavar="auto|cpu|cuda", help="Where to run it."
    )(command)
    return click.option(
        "--backend", default="auto", show_default=True, metavar="auto|torch|onnx|tensorrt", help="What runs the model."
    )(command)


def text_options(command: Callable[..., None]) -> Callable[..., None]:
    """How a file's texts are found."""
    command = click.option(
        "--blank-line", is_flag=True, help="In a text file, a document is a block of lines, not a line."
    )(command)
    return click.option(
        "--text-field", default="text", show_default=True, help="The key or column that holds the text."
    )(command)


def json_option(command: Callable[..., None]) -> Callable[..., None]:
    """For programs."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")(command)


overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what is there already.")
