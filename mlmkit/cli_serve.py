"""The command `serve`."""

import math
import re
from typing import Any

import click

from mlmkit.cli_options import model_options
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
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 picks a free one.")
@click.option("--workers", hidden=True)
@click.option("--token", envvar="MLMKIT_TOKEN", help="Require this bearer token. Default: $MLMKIT_TOKEN.")
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
