"""The OpenAPI document, which `/docs` shows: what the server is, its model, and requests that work for that model."""

import json
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from mlmkit.serve import schemas
from mlmkit.serve.kserve import VERSION, InferRequest
from mlmkit.serve.middleware import PROBES
from mlmkit.serve.service import Service

ERRORS = {
    400: "The HTTP message, its gzip or its JSON is malformed.",
    401: "The server's token is missing or wrong.",
    403: "The Host or Origin may not use this server.",
    404: "Nothing is at this path, or the model has another name.",
    408: "The body did not arrive in time.",
    413: "The request is larger than the server's limits.",
    415: "The body is not JSON.",
    422: "The request is invalid, or the model cannot answer it.",
    429: "The server is busy: retry after the seconds in `Retry-After`.",
    431: "The request line and headers are too large.",
    500: "The server failed on this request: see its log.",
    503: "The server is not ready, or the deadline has passed.",
}
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorBody, "description": description} for status, description in ERRORS.items()
}
POST_ERRORS = {"408", "413", "415", "422", "429"}
TAGS = {
    "Texts": "Fill masks in texts, and score texts.",
    "Server": "Whether the server is well, what it serves, and its metrics.",
    "Open Inference Protocol": "The scoring graph itself, on token ids, for the clients of KServe and Triton.",
}
DESCRIPTION = """This server fills masks in texts and scores texts. It runs one masked language model:

**{name}**: {architecture}, {precision}, {backend} on {device}; vocabulary of {vocabulary_size:,} tokens; texts of up to
{text_tokens:,} tokens. Its mask token is `{mask_token}`.

A request for `POST /fill-mask`:

```json
{request}
```

To send it, open the route below and choose *Try it out*, then *Execute*.{token} Every error has the same form:
`{{"error": "one line", "error_type": "a_name"}}`.
"""
TOKEN = " First choose *Authorize* and enter the server's token; clients send it as `Authorization: Bearer TOKEN`."


def fill_example(service: Service) -> dict[str, Any]:
    """The body of a fill-mask request with the text of the model's card; without one, a text in no language."""
    text = service.example.text or f"... {service.backend.tokenizer.mask_token} ..."
    return {"inputs": text, "parameters": {"top_k": min(5, service.backend.info.top_k)}}


def score_example(service: Service) -> dict[str, Any]:
    """The body of a score request with the longest part of `fill_example`'s text that has no mask."""
    parts = fill_example(service)["inputs"].split(service.backend.tokenizer.mask_token)
    return {"inputs": max(parts, key=len).strip() or "...", "parameters": {"per_token": True}}


def openapi(app: FastAPI, service: Service, *, has_token: bool) -> dict[str, Any]:
    """FastAPI's document, with what FastAPI cannot know: the bodies of `body_schema`, the model, and the token."""
    if app.openapi_schema is None:
        facts = service.info.model_dump() | {
            "text_tokens": service.limits.text_tokens,
            "token": TOKEN if has_token else "",
        }
        described = DESCRIPTION.format(**facts, request=json.dumps(fill_example(service), ensure_ascii=False))
        tags = [{"name": name, "description": description} for name, description in TAGS.items()]
        document = get_openapi(
            title=app.title, version=app.version, description=described, tags=tags, routes=app.routes
        )
        document["servers"] = [{"url": "./"}]  # relative to this document: a proxy may put all behind a prefix
        models = [(model, "validation") for model in (schemas.FillMaskRequest, schemas.ScoreRequest, InferRequest)]
        _, definitions = models_json_schema(models, ref_template=schemas.REFERENCE)  # pyright: ignore[reportArgumentType]
        document["components"]["schemas"] |= definitions["$defs"]
        if has_token:
            document["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                _complete(operation, path, method, service.name, asks_token=has_token and path not in PROBES)
        app.openapi_schema = document
    return app.openapi_schema


def _complete(operation: dict[str, Any], path: str, method: str, model: str, *, asks_token: bool) -> None:
    """Give a route its docstring as the summary, its parameters a description, and only errors that it can answer."""
    operation["summary"], _, operation["description"] = operation["description"].partition("\n\n")
    for parameter in operation.get("parameters", []):
        described = {"name": ("The model's name.", model), "version": ("The model's version.", VERSION)}
        parameter["description"], parameter["example"] = described[parameter["name"]]
    impossible = set() if method == "post" else set(POST_ERRORS)
    if "{name}" not in path:
        impossible.add("404")
    if asks_token:
        operation["security"] = [{"bearer": []}]
    else:
        impossible.add("401")
    for status in impossible:
        del operation["responses"][status]
