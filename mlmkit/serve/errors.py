"""The server's errors. All have one JSON body: `{"error": "one line", "error_type": "a_name"}`.

`error` is the key that the clients of Hugging Face and of the Open Inference Protocol read the message from.
"""

import json
import math

from starlette.responses import Response

LONGEST_RETRY_SECONDS = 60


class ApiError(Exception):
    """An error answer: HTTP status, fixed name, one line that says what to do, and seconds until a retry makes sense.

    Headers of the answer may be added to `headers`.
    """

    def __init__(self, status: int, error_type: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.error_type, self.message = status, error_type, message
        self.headers: dict[str, str] = {}
        if retry_after is not None:
            self.headers["Retry-After"] = str(min(max(math.ceil(retry_after), 1), LONGEST_RETRY_SECONDS))

    @property
    def body(self) -> bytes:
        """The JSON body in UTF-8. Half surrogate pairs, which UTF-8 cannot hold, are replaced."""
        body = {"error": self.message, "error_type": self.error_type}
        return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")

    def response(self) -> Response:
        """The error as an HTTP response."""
        return Response(self.body, self.status, self.headers, media_type="application/json")


def overloaded(reason: str, retry_after: float) -> ApiError:
    """429: the request is fine, but the server has too much to do."""
    return ApiError(429, "overloaded", f"{reason}: retry after the seconds in Retry-After", retry_after)


def shutting_down() -> ApiError:
    """503: the client should ask another server."""
    return ApiError(503, "shutting_down", "the server is shutting down", 1)
