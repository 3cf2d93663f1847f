"""The command line: parse, call, print. Everything heavy is imported inside the command that needs it."""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from mlmkit import __version__
from mlmkit.cli_eval import compare, evaluate, report, score
from mlmkit.cli_export import export
from mlmkit.cli_inspect import inspect
from mlmkit.cli_options import json_option, model_options, print_json, printable, say
from mlmkit.cli_serve import serve
from mlmkit.cli_train import train
from mlmkit.distributed import RESUME
from mlmkit.errors import CheckError, EndedElsewhereError, StoppedError, UserError, require

INTERRUPTED, TERMINATED = 130, 143


class _Printable(logging.Formatter):
    """Messages quote names and texts of strangers. Tracebacks, which --verbose shows, keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))


class _HelpfulGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        # in the order in which they are used
        return ["demo", "train", "export", "inspect", "eval", "compare", "report", "score", "fill", "serve"]


@click.group(cls=_HelpfulGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="mlmkit")
@click.option("-v", "--verbose", is_flag=True, help="Say more, and show tracebacks.")
def cli(verbose: bool) -> None:
    """Masked language models the whole way: train, export, evaluate, fill, serve.

    MODEL is a Hugging Face checkpoint (a folder or a hub name), the folder of a finished training run, or an artifact
    that `mlmkit export` wrote. Results go to standard output; progress and messages go to standard error.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable())
    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, handlers=[handler])
    logging.getLogger("mlmkit").setLevel(logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # when a rank has died: 30 lines for each look at it


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every error that the user can mend is one line on standard error."""
    # As Ctrl-C does, so that what is half-written is removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        code = cli.main(args=arguments, prog_name="mlmkit", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        code = 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "mlmkit"
        code = _fail(f"{error.format_message()} (see {command} --help)", 2)
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
    except OSError as error:  # a full disk, a name too long, a folder that went away
        if isinstance(error, BrokenPipeError):  # the reader of our output has left: `mlmkit ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        else:
            code = _fail(f"{error.strerror or error}: {str(error.filename or '')[:200]}".rstrip(": "), 2)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> int:
    click.echo(printable(f"mlmkit: {' '.join(message.split())}"), err=True)
    return code


@cli.command()
@click.option("--text", type=click.Path(), help="Train on this text file (a document a line) instead.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("mlmkit-demo"), show_default=True)
def demo(text: str | None, output: Path) -> None:
    """Everything below, in minutes, on Python's own docs.

    Trains a tokenizer and a small BERT, exports it to ONNX with a parity check, evaluates both on held-out documents
    with the same masks, and fills a few. Run again, it goes on from what is already there.
    """
    require("train", "torch", "transformers", "onnx", "onnxscript", "safetensors")
    from mlmkit.demo import run_demo

    run_demo(output, text)


for _command in (train, export, inspect, evaluate, compare, report, score):
    cli.add_command(_command)


@cli.command()
@click.argument("model")
@click.argument("text")
@click.option("--top-k", default=5, show_default=True, help="Candidates a mask.")
@click.option("--targets", multiple=True, metavar="TEXT", help="Rank only this, exactly as written. Repeatable.")
@model_options
@json_option
def fill(model: str, text: str, top_k: int, targets: tuple[str, ...], backend: str, device: str, as_json: bool) -> None:
    """Fill each mask in TEXT.

    For example: mlmkit fill MODEL "O rato [MASK] a roupa do rei de Roma."

    The mask is written as the model's tokenizer writes it: [MASK] for BERT, <mask> for RoBERTa. A target inside a text
    begins with its space for RoBERTa and others that spell bytes: --targets " rei".
    """
    from mlmkit.backends import load
    from mlmkit.fill import fill as run_fill

    candidates = run_fill(load(model, backend, device), text, top_k=top_k, targets=targets)
    if as_json:
        print_json({"text": text, "masks": candidates})
        return
    for number, row in enumerate(candidates, start=1):
        if len(candidates) > 1:
            say(f"mask {number}")
        for candidate in row:
            say(f"{candidate['score']:8.4f}  {candidate['token_str']:16}  {candidate['sequence']}")


cli.add_command(serve)
