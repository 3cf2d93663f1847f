"""The commands that use a model: fill, serve."""

import math
import re
from typing import Any

import click

from mlmkit.cli.options import JsonOption, ModelOptions, argument, command, model_options, option, option_class
from mlmkit.console import print_json, say
from mlmkit.errors import UserError, require
from mlmkit.serve.limits import BATCH_TOKENS, QUEUE_TOKENS, Limits


@option_class
class FillOptions(JsonOption, ModelOptions):
    """The arguments and options of `mlmkit fill`."""

    text: str = argument()
    top_k: int = option("--top-k", "Candidates per mask.", default=5)
    targets: tuple[str, ...] = option(
        "--targets", "Rank only this, exactly as written. Repeatable.", multiple=True, metavar="TEXT"
    )


@command(FillOptions)
def fill(options: FillOptions) -> None:
    """Fill each mask in TEXT.

    For example: mlmkit fill MODEL "O rato [MASK] a roupa do rei de Roma."

    Write the mask as the model's tokenizer does: [MASK] for BERT, <mask> for RoBERTa. For tokenizers that spell bytes,
    such as RoBERTa's, a target inside a text begins with its space: --targets " rei".
    """
    from mlmkit.fill import fill as run_fill

    masks = run_fill(options.load(), options.text, top_k=options.top_k, targets=options.targets)
    if options.as_json:
        print_json({"text": options.text, "masks": masks})
        return
    for number, candidates in enumerate(masks, start=1):
        if len(masks) > 1:
            say(f"mask {number}")
        for candidate in candidates:
            say(f"{candidate['score']:8.4f}  {candidate['token_str']:16}  {candidate['sequence']}")


AT_LEAST_1 = click.IntRange(min=1)
# The field of `Limits`, the option, its type, what it bounds.
BOUNDS: tuple[tuple[str, str, Any, str], ...] = (
    ("body_bytes", "--max-body-bytes", AT_LEAST_1, "Bytes of a request."),
    ("texts", "--max-texts", AT_LEAST_1, "Texts of a request."),
    ("text_tokens", "--max-tokens", AT_LEAST_1, "Tokens of a text."),
    ("text_masks", "--max-masks", AT_LEAST_1, "Masks of a text."),
    ("targets", "--max-targets", AT_LEAST_1, "Targets of a request."),
    ("candidates", "--max-candidates", AT_LEAST_1, "Candidates that a request asks for."),
    ("requests", "--max-requests", AT_LEAST_1, "Requests under way at once."),
    ("queue_tokens", "--max-queue-tokens", AT_LEAST_1, "Tokens that wait."),
    ("batch_tokens", "--batch-tokens", AT_LEAST_1, "Tokens of an engine call."),
    ("wait_seconds", "--max-wait", click.FloatRange(min=0), "Seconds to wait for company."),
    ("deadline_seconds", "--deadline", click.FloatRange(min=0.01), "Seconds for an answer."),
    ("drain_seconds", "--drain", click.FloatRange(min=0), "Seconds to answer the rest when stopped."),
)


def limit_options(command: Any) -> Any:
    """An option for each bound."""
    for field, name, kind, help in reversed(BOUNDS):
        command = click.option(name, field, type=kind, help=f"{help} Default: {_default(field)}.")(command)
    return command


def _default(field: str) -> str:
    if by_device := {"batch_tokens": BATCH_TOKENS, "queue_tokens": QUEUE_TOKENS}.get(field):
        return f"{by_device['cpu']}, on CUDA {by_device['cuda']}"
    value = getattr(Limits, field, "the model's maximum")
    return f"{value:g}" if isinstance(value, float) else str(value)


@click.command()
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--workers", type=AT_LEAST_1, default=1, show_default=True, help="Processes, each with its own model.")
@click.option("--token", envvar="MLMKIT_TOKEN", help="Ask for this bearer token. Default: $MLMKIT_TOKEN.")
@click.option(
    "--allow-host",
    "names",
    metavar="NAME",
    multiple=True,
    help="Another name that clients may use for this server. Repeatable.",
)
@limit_options
@click.option("--log-texts", is_flag=True, help="Write texts to the log.")
@model_options
def serve(
    model: str,
    host: str,
    port: int,
    workers: str | None,
    token: str | None,
    names: tuple[str, ...],
    log_texts: bool,
    backend: str,
    device: str,
    **bounds: float | None,
) -> None:
    """Serve MODEL over HTTP: fill-mask, scoring, and a page to play with.

    The API is Hugging Face's: huggingface_hub.InferenceClient("http://127.0.0.1:8000").fill_mask(...). See /docs of the
    running server. SIGTERM ends it once what it has accepted is answered.
    """
    require("serve", "fastapi", "fastapi_offline", "httptools", "prometheus_client", "uvicorn")
    from mlmkit.serve.server import ServeOptions, serve

    limits = {name: value for name, value in bounds.items() if value is not None}
    for field, name, _, _ in BOUNDS:
        if not math.isfinite(limits.get(field, 0)):
            raise UserError(f"{name} must be a number, not {limits[field]}")
    if token is not None and not token.strip():
        raise UserError("the token is blank: set one, or unset MLMKIT_TOKEN")
    for name in names:
        if not re.fullmatch(r"[\w.-]+|\[[\da-fA-F:]+\]", name):
            raise UserError(f"--allow-host {name}: a host's name is wanted, without https:// and port")
    token = token and token.strip()  # a secret from a file may end in a newline
    serve(Serving(model, backend, device, host, port, token, names, workers, log_texts, limits))
