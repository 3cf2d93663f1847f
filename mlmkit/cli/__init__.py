"""The command line: one module per group of commands. Each parses, calls and prints.

Commands import heavy modules inside their functions, so that `mlmkit --help` answers at once.
"""

import atexit
import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from mlmkit import __version__
from mlmkit.console import printable
from mlmkit.distributed import RESUME
from mlmkit.errors import CheckError, EndedElsewhereError, StoppedError, UserError

COMPLETE = "_MLMKIT_COMPLETE"  # set by the shell when it asks for completions
INTERRUPTED, TERMINATED = 130, 143
MODULES = {  # of each command, in the order in which they are used
    "demo": "train",
    "tokenize": "tokenize",
    "train": "train",
    "average": "train",
    "export": "export",
    "inspect": "inspect",
    "card": "card",
    "eval": "evaluate",
    "compare": "results",
    "report": "results",
    "score": "score",
    "fill": "inference",
    "serve": "inference",
}


class _Commands(click.Group):
    """Imports the module of a command when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(MODULES)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if not ctx.resilient_parsing and args[0] not in MODULES and not args[0].startswith("-"):
            from difflib import get_close_matches

            guess = get_close_matches(args[0], MODULES, n=1)
            hint = f" Did you mean '{guess[0]}'?" if guess else ""
            raise click.UsageError(f"No such command '{args[0]}'.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in MODULES:
            return None
        declared = vars(import_module(f"mlmkit.cli.{MODULES[cmd_name]}")).values()
        return next(each for each in declared if isinstance(each, click.Command) and each.name == cmd_name)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="mlmkit")
@click.option("-v", "--verbose", is_flag=True, help="Show more messages, and tracebacks.")
def cli(verbose: bool) -> None:
    """Train, export, evaluate and serve masked language models.

    Start with mlmkit demo. Use mlmkit COMMAND --help for the options of a command.

    MODEL is a Hugging Face checkpoint (a folder or a Hub name), the folder of a finished training run, or an artifact,
    the folder that mlmkit export wrote. Results go to standard output; progress and messages go to standard error.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Every error that the user can fix is one line on standard error."""
    # Otherwise Python searches a million objects of torch and transformers for garbage, several times, as it ends.
    atexit.register(gc.freeze)
    # An exception, as Ctrl-C raises one, so that half-written files are removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        if COMPLETE in os.environ:
            import_module("mlmkit.cli.completion")
        code = cli.main(args=arguments, prog_name="mlmkit", complete_var=COMPLETE, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        code = 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "mlmkit"
        code = _fail(f"{error.format_message()} See {command} --help.", 2)
    except EndedElsewhereError as error:
        code = error.exit_code
    except (UserError, CheckError, StoppedError) as error:
        if logging.getLogger("mlmkit").level == logging.DEBUG:
            raise
        code = _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        code = _fail("interrupted", INTERRUPTED)
    except RuntimeError as error:
        if "/gloo/" not in str(error):
            raise
        code = _fail(f"another rank does not answer. {RESUME}", 1)
    except OSError as error:  # a full disk, a name too long, a folder that vanished
        if isinstance(error, BrokenPipeError):  # nobody reads our output any more: `mlmkit ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        else:
            code = _fail(f"{error.strerror or error}: {str(error.filename or '')[:200]}".rstrip(": "), 2)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> int:
    click.echo(printable(f"mlmkit: {' '.join(message.split())}"), err=True)
    return code
