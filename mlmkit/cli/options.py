"""Options that several commands share. A command receives its arguments and options as one dataclass."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from mlmkit.backends import Backend

Options = TypeVar("Options")
Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model a command runs, and on what: the argument MODEL and `model_options`."""

    model: str
    backend: str
    device: str

    def load(self) -> "Backend":
        """Load the model. Raises `UserError` for a model that cannot be loaded, or not on this backend or device."""
        from mlmkit.backends import load

        return load(self.model, self.backend, self.device)


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How texts are read from a file: `text_options`."""

    text_field: str
    blank_line: bool


def receives(kind: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Decorate a command's function that takes one `kind`, a dataclass with a field per argument and option."""

    def decorate(function: Callable[[Options], None]) -> Callable[..., None]:
        @wraps(function)
        def command(**values: Any) -> None:
            function(kind(**values))

        return command

    return decorate


def model_options(command: Command) -> Command:
    """Add --backend and --device."""
    command = click.option(
        "--device", default="auto", show_default=True, metavar="auto|cpu|cuda", help="Where to run the model."
    )(command)
    return click.option(
        "--backend", default="auto", show_default=True, metavar="auto|torch|onnx|tensorrt", help="What runs the model."
    )(command)


def text_options(command: Command) -> Command:
    """Add --text-field and --blank-line."""
    command = click.option("--blank-line", is_flag=True, help="In a text file, blank lines separate documents.")(
        command
    )
    return click.option(
        "--text-field", default="text", show_default=True, help="The key or column that holds the text."
    )(command)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing result or artifact.")
