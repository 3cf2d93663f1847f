"""Commands declare their options as a dataclass: one field per argument or option, which `command` turns into click's.

For example:

    @option_class
    class FillOptions(ModelOptions):
        text: str = argument()
        top_k: int = option("--top-k", "Candidates per mask.", default=5)

    @command(FillOptions)
    def fill(options: FillOptions) -> None: ...
"""

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform

import click

if TYPE_CHECKING:
    from mlmkit.backends import Backend
    from mlmkit.locations import Source

Options = TypeVar("Options")
PATH = click.Path(path_type=Path)


def argument(**settings: Any) -> Any:
    """Declare a field as a positional argument."""
    return field(metadata={"argument": settings})


def option(flag: str, help: str, **settings: Any) -> Any:
    """Declare a field as an option; the help shows its `default`, if it has one. Other `settings` are click's."""
    shown = {"show_default": True} if "default" in settings else {}
    return field(metadata={"option": {"flag": flag, "help": help, **shown, **settings}})


def switch(flag: str, help: str) -> Any:
    """Declare a bool field as an option without a value."""
    return option(flag, help, is_flag=True)


@dataclass_transform(kw_only_default=True, field_specifiers=(argument, option, switch))
def option_class(kind: type[Options]) -> type[Options]:
    """Make a dataclass without generated methods: `mlmkit --help` creates every class, and they took 5 of its 89 ms."""
    kind.__doc__ = kind.__doc__ or kind.__name__  # or `dataclass` would generate one, with a signature
    return dataclass(init=False, repr=False, eq=False, match_args=False)(kind)


def command(kind: type[Options], name: str | None = None) -> Callable[[Callable[[Options], None]], click.Command]:
    """Turn a function of one `kind` into a command. In the help, inherited options come last."""

    def decorate(function: Callable[[Options], None]) -> click.Command:
        @wraps(function)
        def callback(**values: Any) -> None:
            options = kind()
            vars(options).update(values)
            if values.get("verify"):
                from mlmkit.files import verifying

                click.get_current_context().with_resource(verifying())
            function(options)

        declared: Any = fields(kind)  # pyright: ignore[reportArgumentType]
        params = [_param(each) for each in sorted(declared, key=rank)]
        return click.command(name or function.__name__, params=params)(callback)

    def rank(declared: Field) -> int:
        return 0 if "argument" in declared.metadata else 1 if declared.name in kind.__annotations__ else 2

    return decorate


def _param(declared: Field) -> click.Parameter:
    if "argument" in declared.metadata:
        return click.Argument([declared.name], **declared.metadata["argument"])
    settings = dict(declared.metadata["option"])
    return click.Option([settings.pop("flag"), declared.name], **settings)


@option_class
class ModelOptions:
    """Which model to run, and on what."""

    model: str = argument()
    backend: str = option("--backend", "What runs the model.", default="auto", metavar="auto|torch|onnx|tensorrt")
    device: str = option("--device", "Where to run the model.", default="auto", metavar="auto|cpu|cuda")


@option_class
class TrustOption:
    """Whether code that comes with a checkpoint may run."""

    trust_remote_code: bool = switch(
        "--trust-remote-code", "Run the checkpoint's own Python code, and read a pytorch_model.bin."
    )


@option_class
class InferenceOptions(ModelOptions, TrustOption):
    """Which model to run, on what, and whether its code is trusted."""

    def load(self) -> "Backend":
        """Load the model. Raises `UserError` if it cannot be loaded, or not on this backend or device."""
        from mlmkit.backends import load

        return load(self.model, self.backend, self.device, self.trust_remote_code)


@option_class
class TextOptions:
    """How texts are read from a file."""

    text_field: str = option("--text-field", "The key or column that holds the text.", default="text")
    blank_line: bool = switch("--blank-line", "In a text file, blank lines separate documents.")

    def source(self, file: str) -> "Source":
        """The texts of a file; `-` is standard input."""
        from mlmkit.locations import Source

        return Source("/dev/stdin" if file == "-" else file, self.text_field, self.blank_line)


@option_class
class VerifyOption:
    """Whether to trust what is remembered of files."""

    verify: bool = switch("--verify", "Hash all files of texts and tokens again, also those whose size and time match.")


@option_class
class JsonOption:
    """Whether to print for programs."""

    as_json: bool = switch("--json", "Print one JSON object and nothing else.")
