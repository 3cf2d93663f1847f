"""The commands that use a model: fill, serve."""

import logging
import math
import re
from dataclasses import fields
from typing import Any

import click

from mlmkit.cli.options import (
    InferenceOptions,
    JsonOption,
    ModelOptions,
    TextOptions,
    argument,
    command,
    option,
    option_class,
    switch,
)
from mlmkit.console import MessageFormatter, print_json, say
from mlmkit.errors import UserError, require
from mlmkit.serve.limits import BATCH_TOKENS, QUEUE_TOKENS, Limits


@option_class
class FillOptions(JsonOption, InferenceOptions, TextOptions):
    text: str | None = argument(required=False)
    file: str | None = option("--file", "Fill each text of this file instead, - for standard input.", metavar="FILE")
    top_k: int = option("--top-k", "Candidates per mask.", default=5)
    targets: tuple[str, ...] = option(
        "--targets", "Rank only this, exactly as written. Repeatable.", multiple=True, metavar="TEXT"
    )
    whole_targets: bool = switch("--whole-targets", "Rank --targets by all of their tokens, not by the first.")
    joint: bool = switch("--joint", "Rank fillings of all masks of a text together. Not with --targets.")
    as_json: bool = switch("--json", "Print one JSON object per text and nothing else.")
    truncation: bool = switch("--truncation", "Cut a text that is too long to a window around its masks.")
    max_length: int | None = option("--max-length", "Tokens of that window.  [default: the model's maximum]", type=int)


@command(FillOptions)
def fill(options: FillOptions) -> None:
    """Fill the masks in TEXT, or in the texts of a file.

    For example: mlmkit fill MODEL "O rato [MASK] a roupa do rei de Roma."

    Write the mask as the model's tokenizer does: [MASK] for BERT, <mask> for RoBERTa. For tokenizers that spell bytes,
    such as RoBERTa's, a target inside a text begins with its space: --targets " rei".
    """
    from mlmkit.fill import answer_all
    from mlmkit.questions import ask_all

    if (options.text is None) == (options.file is None):
        raise click.UsageError("Give either TEXT or --file FILE.")
    if options.text is not None and (options.blank_line or options.text_field != "text"):
        raise click.UsageError("--text-field and --blank-line say how --file is read: leave them out.")
    texts = {"": options.text} if options.text is not None else _file_texts(options)
    backend = options.load()
    questions = ask_all(
        backend.tokenizer,
        backend.info,
        list(texts.values()),
        top_k=options.top_k,
        targets=options.targets,
        whole_targets=options.whole_targets,
        joint=options.joint,
        truncation=options.truncation,
        max_length=options.max_length,
        names=[] if options.file is None else list(texts),
    )
    for text, question, masks in zip(texts.values(), questions, answer_all(backend, questions), strict=True):
        if options.as_json:
            filled = {"fillings": masks[0]} if options.joint else {"masks": masks}
            print_json({"text": text, **filled} | ({"truncated": True} if question.is_truncated else {}))
            continue
        if options.file is not None:
            say(text)
        for number, candidates in enumerate(masks, start=1):
            if len(masks) > 1:
                say(f"mask {number}")
            for candidate in candidates:
                string = " | ".join(candidate["token_strs"]) if "token_strs" in candidate else candidate["token_str"]
                say(f"{candidate['score']:8.4f}  {string:16}  {candidate['sequence']}")


def _file_texts(options: FillOptions) -> dict[str, str]:
    """The texts of `--file` that are not blank, by what messages call them."""
    from mlmkit.documents import read_texts
    from mlmkit.lines import is_blank

    texts = enumerate(read_texts(options.source(str(options.file))), start=1)
    named = {f"{options.file}: text {number}, {text[:40]!r}": text for number, text in texts if not is_blank(text)}
    if not named:
        raise UserError(f"{options.file}: there is no text to fill")
    return named


def _limit(flag: str, name: str, help: str, least: float = 1) -> Any:
    """Declare an option that sets the field `name` of `Limits`; `least` 1 means a count, less means seconds."""
    kind = click.IntRange(min=1) if least == 1 else click.FloatRange(min=least)
    if by_device := {"batch_tokens": BATCH_TOKENS, "queue_tokens": QUEUE_TOKENS}.get(name):
        default = f"{by_device['cpu']}, on CUDA {by_device['cuda']}"
    else:
        value = getattr(Limits, name, "the model's maximum")
        default = f"{value:g}" if isinstance(value, float) else str(value)
    return option(flag, f"{help} Default: {default}.", type=kind)


@option_class
class LimitOptions:
    """A field per field of `Limits`; None takes the default."""

    body_bytes: int | None = _limit("--max-body-bytes", "body_bytes", "Bytes per request.")
    texts: int | None = _limit("--max-texts", "texts", "Texts per request.")
    text_tokens: int | None = _limit("--max-tokens", "text_tokens", "Tokens per text.")
    text_masks: int | None = _limit("--max-masks", "text_masks", "Masks per text.")
    targets: int | None = _limit("--max-targets", "targets", "Targets per request.")
    candidates: int | None = _limit("--max-candidates", "candidates", "Candidates per request, over all its masks.")
    requests: int | None = _limit("--max-requests", "requests", "Requests at once.")
    queue_tokens: int | None = _limit("--max-queue-tokens", "queue_tokens", "Tokens in the queue.")
    batch_tokens: int | None = _limit("--batch-tokens", "batch_tokens", "Tokens per engine call.")
    wait_seconds: float | None = _limit("--max-wait", "wait_seconds", "Seconds that a call waits for more requests.", 0)
    deadline_seconds: float | None = _limit("--deadline", "deadline_seconds", "Seconds until an answer.", 0.01)
    drain_seconds: float | None = _limit(
        "--drain", "drain_seconds", "Seconds to answer accepted requests after SIGTERM.", 0
    )

    def given(self) -> dict[str, float]:
        """The limits that the user set. Raises `UserError` for infinity and NaN, which click accepts."""
        limits = {each: getattr(self, each.name) for each in fields(LimitOptions)}
        for each, value in limits.items():
            if value is not None and not math.isfinite(value):
                raise UserError(f"{each.metadata['option']['flag']} must be a number, not {value}")
        return {each.name: value for each, value in limits.items() if value is not None}


@option_class
class ServeArguments(ModelOptions, LimitOptions):
    host: str = option("--host", "Address to listen on.", default="127.0.0.1")
    port: int = option("--port", "0 picks a free one.", type=click.IntRange(0, 65535), default=8000)
    workers: str | None = option("--workers", "", hidden=True)
    token: str | None = option("--token", "Require this bearer token. Default: $MLMKIT_TOKEN.", envvar="MLMKIT_TOKEN")
    names: tuple[str, ...] = option(
        "--allow-host",
        "Another name that clients may use for this server. Repeatable.",
        metavar="NAME",
        multiple=True,
    )
    log_texts: bool = switch("--log-texts", "Write texts to the log.")


@command(ServeArguments)
def serve(options: ServeArguments) -> None:
    """Serve MODEL over HTTP: fill-mask, scoring, and a web page.

    The API is Hugging Face's: huggingface_hub.InferenceClient("http://127.0.0.1:8000").fill_mask(...). The running
    server documents it at /docs. On SIGTERM the server answers the requests that it has accepted, then exits.
    """
    require("serve", "fastapi", "fastapi_offline", "httptools", "prometheus_client", "uvicorn")
    from mlmkit.serve.server import ServeOptions
    from mlmkit.serve.server import serve as run_server

    if options.workers is not None:
        raise UserError("--workers no longer exists: start several servers, each on its own port, behind a proxy")
    limits = options.given()
    token = options.token
    if token is not None and not token.strip():
        raise UserError("the token is blank: set one, or unset MLMKIT_TOKEN")
    for name in options.names:
        if not re.fullmatch(r"[\w.-]+|\[[\da-fA-F:]+\]", name):
            raise UserError(f"--allow-host {name}: give a host name without https:// and port")
    token = token and token.strip()  # a secret read from a file may end in a newline
    for handler in logging.getLogger().handlers:
        handler.setFormatter(MessageFormatter("%(asctime)s  %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    run_server(
        ServeOptions(
            model=options.model,
            backend=options.backend,
            device=options.device,
            host=options.host,
            port=options.port,
            token=token,
            allowed_hosts=options.names,
            log_texts=options.log_texts,
            limits=limits,
        )
    )
