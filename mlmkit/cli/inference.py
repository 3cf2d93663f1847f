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
class FillOptions(InferenceOptions, TextOptions, JsonOption):
    text: str | None = argument("Text with at least one mask.", required=False)
    file: str | None = option("--file", "Fill each text of this file instead; - is standard input.", metavar="FILE")
    top_k: int = option("--top-k", "Candidates per mask.", default=5, metavar="N")
    targets: tuple[str, ...] = option(
        "--targets", "Rank only this candidate, exactly as written. Repeatable.", multiple=True, metavar="WORD"
    )
    whole_targets: bool = switch("--whole-targets", "Rank --targets by all of their tokens, not by the first alone.")
    joint: bool = switch("--joint", "Rank fillings of all masks of a text together. Not with --targets.")
    truncation: bool = switch("--truncation", "Cut a text that is too long to a window around its masks.")
    max_length: int | None = option(
        "--max-length", "Tokens of that window.", shown_default="the model's maximum", type=int, metavar="N"
    )


@command(FillOptions)
def fill(options: FillOptions) -> None:
    """Fill the masks in TEXT or in a file's texts.

    \b
    For example:
      mlmkit fill MODEL "O rato [MASK] a roupa do rei de Roma."

    Write the mask as the model's tokenizer does: [MASK] for BERT, <mask> for RoBERTa. For byte-level tokenizers, such
    as RoBERTa's, a target inside a text begins with its space: --targets " rei".

    With --json, each line is the JSON object of one text.
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
    return option(flag, help, shown_default=default, type=kind, metavar="N" if least == 1 else "SECONDS")


@option_class
class LimitOptions:
    """A field per field of `Limits`; None takes the default."""

    heading = "Limits"
    body_bytes: int | None = _limit("--max-body-bytes", "body_bytes", "Bytes per request.")
    texts: int | None = _limit("--max-texts", "texts", "Texts per request.")
    text_tokens: int | None = _limit("--max-tokens", "text_tokens", "Tokens per text.")
    text_masks: int | None = _limit("--max-masks", "text_masks", "Masks per text.")
    targets: int | None = _limit("--max-targets", "targets", "Targets per request.")
    candidates: int | None = _limit("--max-candidates", "candidates", "Candidates per request, over all its masks.")
    requests: int | None = _limit("--max-requests", "requests", "Requests at the same time.")
    queue_tokens: int | None = _limit("--max-queue-tokens", "queue_tokens", "Tokens waiting in the queue.")
    batch_tokens: int | None = _limit("--batch-tokens", "batch_tokens", "Tokens per run of the model.")
    wait_seconds: float | None = _limit(
        "--max-wait", "wait_seconds", "Longest wait for more requests before a run of the model.", 0
    )
    deadline_seconds: float | None = _limit("--deadline", "deadline_seconds", "Longest time until an answer.", 0.01)
    drain_seconds: float | None = _limit(
        "--drain", "drain_seconds", "Time to answer accepted requests after SIGTERM.", 0
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
    host: str = option("--host", "Address to listen on.", default="127.0.0.1", metavar="ADDRESS")
    port: int = option(
        "--port", "Port to listen on; 0 picks a free one.", type=click.IntRange(0, 65535), default=8000, metavar="N"
    )
    workers: str | None = option("--workers", "", hidden=True)
    token: str | None = option(
        "--token",
        "Answer only requests with this bearer token.",
        shown_default="$MLMKIT_TOKEN",
        envvar="MLMKIT_TOKEN",
        metavar="TOKEN",
    )
    names: tuple[str, ...] = option(
        "--allow-host",
        "Another host name that clients may use for this server. Repeatable.",
        metavar="NAME",
        multiple=True,
    )
    log_texts: bool = switch("--log-texts", "Write texts to the log.")


@command(ServeArguments)
def serve(options: ServeArguments) -> None:
    """Serve MODEL over HTTP and as a web page.

    \b
    For example:
      mlmkit serve artifact
      MLMKIT_TOKEN=secret mlmkit serve artifact --host 0.0.0.0

    The API fills masks and scores texts. Hugging Face's client works with it: huggingface_hub.InferenceClient("http://127.0.0.1:8000").
    The running server documents the API at /docs. On SIGTERM the server answers the requests that it has accepted,
    then exits.
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
