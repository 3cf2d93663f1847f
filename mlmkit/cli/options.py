"""Commands declare their options as a dataclass: one field per argument or option, which `command` turns into click's.

For example:

    @option_class
    class FillOptions(ModelOptions):
        text: str = argument("A text with masks.")
        top_k: int = option("--top-k", "Candidates per mask.", default=5, metavar="N")

    @command(FillOptions)
    def fill(options: FillOptions) -> None: ...

In the help, inherited options come last, under the `heading` of their class. A metavar tells shell completion what to
offer: `cpu|cuda` those values, `FILE` files (`mlmkit.cli.completion`).
"""

import logging
import os
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform

import click

from mlmkit.console import MessageFormatter, MessageHandler

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from mlmkit.backends import Backend
    from mlmkit.locations import Source

Options = TypeVar("Options")
PATH = click.Path(path_type=Path)
MODEL = "Checkpoint (a folder or a Hugging Face Hub name), folder of a training run, or artifact."
BATCH_COUPLING = "Accept a dynamically quantized model, whose scores depend on how texts share batches."
CONFIG = "Training configuration, a TOML file. mlmkit train --print-config prints one."
OPTIONS, GENERAL = "Options", "General"  # headings: of the command's own options, and of those that many commands have
WIDEST = 26  # columns for the names of options in the help; longer ones have a line of their own
SHORT = 12  # a command with at most so many options lists them under one heading


def argument(help: str = "", **settings: Any) -> Any:
    """Declare a field as a positional argument. `settings` are click's."""
    return field(metadata={"argument": {"help": help, **settings}})


def option(flag: str, help: str, *, shown_default: object = None, **settings: Any) -> Any:
    """Declare a field as an option. `shown_default` describes a default that the code behind the command chooses.

    Other `settings` are click's.
    """
    shown = settings.get("default") if shown_default is None else shown_default
    note = "required" if settings.get("required") else None if shown is None else f"default: {shown}"
    return field(metadata={"option": {"flag": flag, "help": f"{help}  [{note}]" if note else help, **settings}})


def switch(flag: str, help: str) -> Any:
    """Declare a bool field as an option without a value."""
    return option(flag, help, is_flag=True)


@dataclass_transform(kw_only_default=True, field_specifiers=(argument, option, switch))
def option_class(kind: type[Options]) -> type[Options]:
    """Make a dataclass without generated methods: `mlmkit --help` creates every class, and they took 5 of its 89 ms."""
    kind.__doc__ = kind.__doc__ or kind.__name__  # or `dataclass` would generate one, with a signature
    return dataclass(init=False, repr=False, eq=False, match_args=False)(kind)


class _Option(click.Option):
    heading = GENERAL

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Leave out what click adds, such as the range `[x>=1]`: `option` has added the default."""
        record = super().get_help_record(ctx)
        return record and (record[0], self.help or "")


class _Command(click.Command):
    """A command whose help describes its arguments, and lists its options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        params = self.get_params(ctx)
        arguments = [(each.human_readable_name, about) for each in params if (about := getattr(each, "about", ""))]
        sections = {"Arguments": arguments} if arguments else {}
        options = [each for each in params if isinstance(each, click.Option)]
        for each in options:
            heading = getattr(each, "heading", GENERAL) if len(options) > SHORT else OPTIONS
            if record := each.get_help_record(ctx):
                sections.setdefault(heading, []).append(record)
        width = min(WIDEST, max(len(term) for rows in sections.values() for term, _ in rows))
        for heading, rows in sections.items():
            with formatter.section(heading):
                formatter.write_dl([(term.ljust(width), text) for term, text in rows], col_max=width)


def command(kind: type[Options], name: str | None = None) -> Callable[[Callable[[Options], None]], click.Command]:
    """Turn a function of one `kind` into a command. Every command gets `-v`, like `mlmkit` itself."""

    def decorate(function: Callable[[Options], None]) -> click.Command:
        @wraps(function)
        def callback(**values: Any) -> None:
            context = click.get_current_context()
            show_messages(values.pop("verbose") or context.find_root().params["verbose"])
            options = kind()
            vars(options).update(values)
            if values.get("verify"):
                from mlmkit.files import verifying

                context.with_resource(verifying())
            function(options)

        declared: Any = fields(kind)  # pyright: ignore[reportArgumentType]
        params = [_param(kind, each) for each in sorted(declared, key=rank)]
        verbose = _Option(["-v", "--verbose"], is_flag=True, help="Show more messages, and tracebacks.")
        return _Command(name or function.__name__, params=[*params, verbose], callback=callback, help=function.__doc__)

    def rank(declared: Field) -> int:
        return -1 if "argument" in declared.metadata else kind.__mro__.index(_declarer(kind, declared.name))

    return decorate


def _declarer(kind: type, name: str) -> type:
    return next(each for each in kind.__mro__ if name in each.__annotations__)


def _param(kind: type, declared: Field) -> click.Parameter:
    if "argument" in declared.metadata:
        settings = dict(declared.metadata["argument"])
        about = settings.pop("help")
        made = click.Argument([declared.name], shell_complete=_complete, **settings)
        made.about = about  # pyright: ignore[reportAttributeAccessIssue]
        return made
    settings = dict(declared.metadata["option"])
    made = _Option([settings.pop("flag"), declared.name], shell_complete=_complete, **settings)
    source = _declarer(kind, declared.name)
    made.heading = OPTIONS if source is kind else getattr(source, "heading", OPTIONS)
    return made


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    from mlmkit.cli.completion import offers

    return offers(param.metavar or param.human_readable_name, incomplete)


def show_messages(verbose: bool) -> None:
    """Send messages to standard error: those of mlmkit, and with `verbose` those of every library."""
    handler = MessageHandler()
    handler.setFormatter(MessageFormatter())
    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, handlers=[handler])
    logging.getLogger("mlmkit").setLevel(logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # 30 lines at each check for a dead rank


@option_class
class ModelOptions:
    """Which model to run, and on what."""

    heading = "Model"
    model: str = argument(MODEL)
    backend: str = option(
        "--backend", "Engine that runs the model.", default="auto", metavar="auto|torch|onnx|tensorrt"
    )
    device: str = option("--device", "Device that runs the model.", default="auto", metavar="auto|cpu|cuda")


@option_class
class TrustOption:
    """Whether code that comes with a checkpoint may run."""

    heading = "Model"
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

    heading = "Text files"
    text_field: str = option(
        "--text-field", "Key or column that holds the text; not for plain text files.", default="text", metavar="NAME"
    )
    blank_line: bool = switch("--blank-line", "In a text file, documents end at blank lines, not at every line.")

    def source(self, file: str) -> "Source":
        """The texts of a file; `-` is standard input."""
        from mlmkit.locations import Source

        return Source("/dev/stdin" if file == "-" else file, self.text_field, self.blank_line)


@option_class
class VerifyOption:
    """Whether to trust what is remembered of files."""

    heading = GENERAL
    verify: bool = switch(
        "--verify", "Hash every file of texts and tokens again, even if its size and time are unchanged."
    )


@option_class
class JsonOption:
    """Whether to print for programs."""

    heading = GENERAL
    as_json: bool = switch("--json", "Print JSON and nothing else.")
