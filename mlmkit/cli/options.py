"""Options that several commands share."""

from collections.abc import Callable

import click


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
