"""The commands that use a model: fill, serve."""

import math
import re
from typing import Any

import click

from mlmkit.cli.options import json_option, model_options
from mlmkit.console import print_json, say
from mlmkit.errors import UserError, require
from mlmkit.serve.limits import BATCH_TOKENS, QUEUE_TOKENS, Limits

AT_LEAST_1 = click.IntRange(min=1)
# Field of `Limits`, option, type, help.
BOUNDS: tuple[tuple[str, str, Any, str], ...] = (
    ("body_bytes", "--max-body-bytes", AT_LEAST_1, "Bytes per request."),
    ("texts", "--max-texts", AT_LEAST_1, "Texts per request."),
    ("text_tokens", "--max-tokens", AT_LEAST_1, "Tokens per text."),
    ("text_masks", "--max-masks", AT_LEAST_1, "Masks per text."),
    ("targets", "--max-targets", AT_LEAST_1, "Targets per request."),
    ("candidates", "--max-candidates", AT_LEAST_1, "Candidates per request, over all its masks."),
    ("requests", "--max-requests", AT_LEAST_1, "Requests at once."),
    ("queue_tokens", "--max-queue-tokens", AT_LEAST_1, "Tokens in the queue."),
    ("batch_tokens", "--batch-tokens", AT_LEAST_1, "Tokens per engine call."),
    ("wait_seconds", "--max-wait", click.FloatRange(min=0), "Seconds that a call waits for more requests."),
    ("deadline_seconds", "--deadline", click.FloatRange(min=0.01), "Seconds until an answer."),
    ("drain_seconds", "--drain", click.FloatRange(min=0), "Seconds to answer accepted requests after SIGTERM."),
)


def limit_options(command: Any) -> Any:
    """Add one option per limit."""
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
    """Serve MODEL over HTTP: fill-mask, scoring, and a web page.

    The API is Hugging Face's: huggingface_hub.InferenceClient("http://127.0.0.1:8000").fill_mask(...). The running
    server documents it at /docs. On SIGTERM the server answers the requests that it has accepted, then exits.
    """
    require("serve", "fastapi", "fastapi_offline", "httptools", "prometheus_client", "uvicorn")
    from mlmkit.serve.server import ServeOptions, serve

    if workers is not None:
        raise UserError("--workers no longer exists: start several servers, each on its own port, behind a proxy")
    limits = {name: value for name, value in bounds.items() if value is not None}
    for field, name, _, _ in BOUNDS:
        if not math.isfinite(limits.get(field, 0)):
            raise UserError(f"{name} must be a number, not {limits[field]}")
    if token is not None and not token.strip():
        raise UserError("the token is blank: set one, or unset MLMKIT_TOKEN")
    for name in names:
        if not re.fullmatch(r"[\w.-]+|\[[\da-fA-F:]+\]", name):
            raise UserError(f"--allow-host {name}: give a host name without https:// and port")
    token = token and token.strip()  # a secret from a file may end in a newline
    serve(ServeOptions(model, backend, device, host, port, token, names, log_texts, limits))
