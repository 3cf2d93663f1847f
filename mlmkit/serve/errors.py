"""Every refusal of the server, in one form: `{"error": "one line", "error_type": "a_name"}`.

`error` is where Hugging Face's clients and those of the Open Inference Protocol look for the message.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.responses import Response

Model = TypeVar("Model", bound=BaseModel)

LONGEST_WAIT = 60  # seconds that a client is told to wait, at most
# pydantic holds the interpreter's lock while it parses: 2 MB of lists or strings stopped the event loop for a second.
MOST_VALUES = 10_000  # strings and lists and objects of a body, or commas between its values: some 5 ms
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)


class ApiError(Exception):
    """A refusal: its status, its name, one line that says what to do, and after how many seconds to ask again."""

    def __init__(self, status: int, error_type: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.error_type, self.message = status, error_type, message
        self.headers: dict[str, str] = {}
        if retry_after is not None:
            self.headers["Retry-After"] = str(min(max(math.ceil(retry_after), 1), LONGEST_WAIT))


def overloaded(reason: str, delay: float) -> ApiError:
    """429: nothing is wrong with the request but its moment."""
    return ApiError(429, "overloaded", f"{reason}: ask again later, as Retry-After says", delay)


def shutting_down() -> ApiError:
    """503: another server should be asked."""
    return ApiError(503, "shutting_down", "the server is shutting down", 1)


def error_response(error: ApiError) -> Response:
    """The refusal as HTTP."""
    return Response(error_body(error), error.status, error.headers, media_type="application/json")


def error_body(error: ApiError) -> bytes:
    """The refusal as JSON. Half surrogate pairs, which JSON may hold and UTF-8 cannot, are replaced."""
    body = {"error": error.message, "error_type": error.error_type}
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")


def parse_body(model: type[Model], body: bytes, numbers: int = 0) -> Model:
    """The request in a body of JSON, which may hold so many `numbers` beside `MOST_VALUES` other values.

    Raises `ApiError` for what is no such request, in one line that does not repeat its texts.
    """
    if _has_many_values(body, numbers):
        pieces = STRING.split(body, MOST_VALUES)  # what texts hold does not count
        if len(pieces) > MOST_VALUES or _has_many_values(b"".join(pieces), numbers):
            message = f"the body has more than {MOST_VALUES + numbers} values: send fewer at once"
            raise ApiError(413, "too_many_values", message)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False)) from None


def _has_many_values(body: bytes, numbers: int) -> bool:
    return sum(map(body.count, (b'"', b"[", b"{"))) > 2 * MOST_VALUES or body.count(b",") > MOST_VALUES + numbers


def _invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    if errors[0]["type"] == "json_invalid":
        reason = errors[0].get("ctx", {}).get("error", "it cannot be parsed")
        return ApiError(400, "malformed_json", f"the body is no JSON in UTF-8, or nested too deeply: {reason}")
    place = _place(errors[0])
    # A value that may be of several types has an error for each.
    reasons = dict.fromkeys(str(error["msg"]) for error in errors if _place(error) == place)
    return ApiError(422, "invalid_request", f"{place}: {', or: '.join(reasons)}")


def _place(error: Mapping[str, Any]) -> str:
    """Where in the body, without the types that pydantic tried there."""
    parts = [str(part) for part in error["loc"] if part not in ("body", "str") and "[" not in str(part)]
    return ".".join(parts) or "the body"
