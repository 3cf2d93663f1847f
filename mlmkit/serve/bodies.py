"""Request bodies: read from the connection, inflated, and parsed by pydantic, each within its limits."""

import asyncio
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.types import Receive, Scope

from mlmkit.serve.errors import ApiError

Model = TypeVar("Model", bound=BaseModel)

DISCARDED_BYTES = 32 << 20  # of a body that is too large, still read: a client that is cut off would not see the 413
# pydantic holds the interpreter's lock while it parses: 2 MB of lists or strings stopped the event loop for a second.
MOST_VALUES = 10_000  # strings, lists and objects in a body, and other values beside them; about 5 ms
JSON_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes | None:
    """The request's body, inflated, of at most `limit` bytes before and after. None if the client left.

    Raises `ApiError` for a body that is too large or wrongly encoded.
    """
    parts, size, has_more = [], 0, True
    while has_more and size <= DISCARDED_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        size += len(message.get("body", b""))
        if size <= limit:
            parts.append(message.get("body", b""))
        has_more = message.get("more_body")
    body = b"".join(parts)
    encodings = [value.strip().lower() for name, value in scope["headers"] if name == b"content-encoding"]
    if size <= limit and encodings not in ([], [b"identity"]):
        body = await asyncio.to_thread(_inflate, body, encodings, limit)
    if max(size, len(body)) > limit:
        raise ApiError(413, "body_too_large", f"the body is larger than {limit} bytes: send fewer texts per request")
    return body


def _inflate(body: bytes, encodings: list[bytes], limit: int) -> bytes:
    """The content of a gzip file with one member; the first `limit` + 1 bytes of a larger one."""
    if encodings not in ([b"gzip"], [b"x-gzip"]):
        raise ApiError(415, "unsupported_media_type", "send the body as it is or with Content-Encoding: gzip")
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        content = inflater.decompress(body, limit + 1)
    except zlib.error:
        content = b""
    if len(content) <= limit and (not inflater.eof or inflater.unused_data):
        raise ApiError(400, "malformed_gzip", "Content-Encoding is gzip, but the body is not one complete gzip file")
    return content


async def json_body(request: Request) -> bytes:
    """The body of a request whose Content-Type is JSON or missing (Triton's client sends none).

    Raises `ApiError` for another type.
    """
    kind = request.headers.get("content-type", "application/json")
    kind = kind.partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, "unsupported_media_type", "send JSON with the header Content-Type: application/json")
    return await request.body()


def parse_body(model: type[Model], body: bytes, numbers: int = 0) -> Model:
    """Parse a JSON body. It may hold `MOST_VALUES` strings, lists and objects, and `numbers` + `MOST_VALUES` others.

    Raises `ApiError` that names the first invalid field. Its message does not repeat the body's texts.
    """
    if _may_have_too_many_values(body, numbers):
        pieces = JSON_STRING.split(body, MOST_VALUES)  # brackets and commas inside strings do not count
        if len(pieces) > MOST_VALUES or _may_have_too_many_values(b"".join(pieces), numbers):
            message = f"the body has more than {MOST_VALUES + numbers} values: send fewer per request"
            raise ApiError(413, "too_many_values", message)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False)) from None


def _may_have_too_many_values(body: bytes, numbers: int) -> bool:
    return sum(map(body.count, (b'"', b"[", b"{"))) > 2 * MOST_VALUES or body.count(b",") > MOST_VALUES + numbers


def _invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    if errors[0]["type"] == "json_invalid":
        reason = errors[0].get("ctx", {}).get("error", "it cannot be parsed")
        return ApiError(400, "malformed_json", f"the body is not JSON in UTF-8, or nested too deeply: {reason}")
    field = _field(errors[0])
    # pydantic reports one error for each type that the value could have had.
    reasons = dict.fromkeys(str(error["msg"]) for error in errors if _field(error) == field)
    return ApiError(422, "invalid_request", f"{field}: {', or: '.join(reasons)}")


def _field(error: Mapping[str, Any]) -> str:
    """The path of the field, without the types that pydantic tried there."""
    parts = [str(part) for part in error["loc"] if part not in ("body", "str") and "[" not in str(part)]
    return ".".join(parts) or "the body"
