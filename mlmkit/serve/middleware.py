"""ASGI middleware around the application: who may ask, how much, how many at once, and for how long.

A request passes: Host and Origin (403) -> token (401) -> free slot (429) -> body (408, 413) -> application -> headers
that all answers have. It is then counted and logged, without its texts.
"""

import asyncio
import hmac
import logging
import re
import time
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlmkit.serve.bodies import read_body
from mlmkit.serve.errors import ApiError, overloaded
from mlmkit.serve.limits import Limits
from mlmkit.serve.metrics import Metrics

log = logging.getLogger(__name__)

PROBES = ("/health", "/ready", "/v2/health/live", "/v2/health/ready")
PAGES = ("/", "/docs", "/openapi.json", "/favicon.ico")
ENDPOINTS = (*PROBES, *PAGES, "/fill-mask", "/score", "/info", "/metrics")
STARTS_PER_TURN = 16  # requests begun per turn of the event loop, about 5 ms; probes wait for no more than that
LOOPBACK_NAMES = r"([\w-]+\.)*localhost|127(\.\d+){3}|\[::1\]"
CLIENT_LEFT = 499  # nginx's status for it
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-store"),
)


class AllowedHosts:
    """The names that a request may have as its Host: loopback names and `names`, or elsewhere than on loopback any.

    Without this, a web page whose owner points its name at 127.0.0.1 could use a server there (DNS rebinding). An
    Origin must be the request's own Host, or one of `names`.
    """

    def __init__(self, names: Sequence[str], *, is_loopback: bool) -> None:
        known = "|".join(map(re.escape, names)).lower() or "(?!)"
        self._host = re.compile(rf"({LOOPBACK_NAMES}|{known})\.?(:\d*)?" if is_loopback else ".*")
        self._origin = re.compile(rf"https?://({known})\.?(:\d*)?")

    def check(self, scope: Scope) -> None:
        """Raise `ApiError` for a Host or Origin that is not allowed, and for a missing or repeated Host."""
        hosts, origins = (
            [value.decode("latin-1").lower() for name, value in scope["headers"] if name == wanted]
            for wanted in (b"host", b"origin")
        )
        if len(hosts) != 1 and (hosts or scope["http_version"] == "1.1"):
            raise ApiError(400, "malformed_http", "an HTTP/1.1 request must have the header Host exactly once")
        own = [f"{scheme}://{host}" for host in hosts for scheme in ("http", "https")]
        refused = [host for host in hosts if not self._host.fullmatch(host)]
        refused += [origin for origin in origins if origin not in own and not self._origin.fullmatch(origin)]
        if refused:
            message = f"{refused[0][:100]!a} may not use this server: to allow it, start with --allow-host NAME"
            raise ApiError(403, "host_not_allowed", message)


class RequestMiddleware:
    """Wraps the application. It reads a POST's body completely before the application runs.

    It cancels the application's task when the client leaves or the deadline passes, so endpoints need not check.
    `is_draining` makes every answer ask its client to close the connection.
    """

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, token: str | None, hosts: AllowedHosts) -> None:
        self.app, self.limits, self.metrics, self.hosts = app, limits, metrics, hosts
        self.is_draining = False
        self._token = token.encode() if token else None
        self._slots = asyncio.Semaphore(limits.requests)
        self._started_this_turn = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # some monitors use it; uvicorn leaves out the body
            scope = {**scope, "method": "GET"}
        answer = _Answer(send, self)
        state = scope.setdefault("state", {})
        state["error_type"] = ""
        endpoint = endpoint_of(scope["path"])
        start = time.perf_counter()
        try:
            self.hosts.check(scope)
            self._check_token(scope)
            if endpoint not in PROBES:
                await self._wait_for_turn()
            if scope["method"] in ("POST", "PUT", "PATCH"):
                await self._answer_post(scope, receive, answer)
            else:
                await self.app(scope, receive, answer.send)
        except ApiError as error:
            state["error_type"] = error.error_type
            await answer.send_error(error)
        except TimeoutError:  # from `_Answer.send`; uvicorn closes a connection whose answer is incomplete
            log.info("a client does not read its answer")
        finally:
            seconds = time.perf_counter() - start
            self.metrics.count_request(endpoint, answer.status, seconds, state["error_type"])
            level = logging.DEBUG if endpoint in (*PROBES, "/metrics") else logging.INFO
            method = scope["method"][:10] if scope["method"].isalpha() else "?"
            log.log(level, "%s %s %d %.1f ms %s", method, endpoint, answer.status, seconds * 1e3, state["error_type"])

    def _check_token(self, scope: Scope) -> None:
        path = scope["path"]
        is_page = scope["method"] == "GET" and (path in PAGES or path.startswith("/static/"))
        if self._token is None or path in PROBES or is_page:
            return
        authorization = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, token = authorization.partition(b" ")
        if not (hmac.compare_digest(token.strip(), self._token) and scheme.lower() == b"bearer"):
            error = ApiError(401, "unauthorized", "send the server's token as Authorization: Bearer TOKEN")
            error.headers["WWW-Authenticate"] = "Bearer"
            raise error

    async def _wait_for_turn(self) -> None:
        while self._started_this_turn >= STARTS_PER_TURN:
            await asyncio.sleep(0)
        if not self._started_this_turn:
            asyncio.get_running_loop().call_soon(setattr, self, "_started_this_turn", 0)
        self._started_this_turn += 1

    async def _answer_post(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        if self._slots.locked():
            raise overloaded(f"the limit of {self.limits.requests} requests at once is reached", 1)
        seconds, body = self.limits.deadline_seconds, None
        async with self._slots:
            try:
                with self.metrics.in_flight.track_inprogress():
                    async with asyncio.timeout(seconds) as answer.deadline:
                        body = await read_body(scope, receive, self.limits.body_bytes)
                        if body is None or await self._client_leaves(scope, receive, body, answer):
                            answer.status = CLIENT_LEFT
            except TimeoutError:
                if answer.status:
                    raise
                if body is None:
                    message = f"the body did not arrive within {seconds:g} seconds"
                    raise ApiError(408, "body_too_slow", message) from None
                message = f"no answer within {seconds:g} seconds: send less, or retry later"
                raise ApiError(503, "deadline_exceeded", message, 1) from None
            finally:
                answer.deadline = None

    async def _client_leaves(self, scope: Scope, receive: Receive, body: bytes, answer: "_Answer") -> bool:
        """Run the application; cancel it and return True if the client leaves before the answer begins."""
        task, has_left = asyncio.current_task(), False
        assert task is not None

        def cancel(disconnect: asyncio.Future[Message]) -> None:
            nonlocal has_left
            if not disconnect.cancelled() and answer.status == 0:
                has_left = True
                task.cancel()

        disconnect = asyncio.ensure_future(receive())  # the body is complete: the next message can be nothing else
        disconnect.add_done_callback(cancel)
        try:
            await self.app(scope, _replay(body), answer.send)
        except asyncio.CancelledError:
            if not has_left:
                raise
            task.uncancel()
        finally:
            disconnect.cancel()
        return has_left


class _Answer:
    """The way back: adds the headers that every answer has and remembers the status, 0 before there is one."""

    def __init__(self, send: Send, middleware: RequestMiddleware) -> None:
        self._send, self._middleware, self.status = send, middleware, 0
        self.deadline: asyncio.Timeout | None = None  # of the whole answer, until its first message

    async def send(self, message: Message) -> None:
        """ASGI's send. Raises `TimeoutError` if the client does not read."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.deadline is not None and not self.deadline.expired():
                self.deadline.reschedule(None)  # from here on, each message has a deadline of its own
            present = {name.lower() for name, _ in message["headers"]}
            added = [header for header in HEADERS if header[0] not in present]
            if self._middleware.is_draining:
                added.append((b"connection", b"close"))
            message = {**message, "headers": [*message["headers"], *added]}
        async with asyncio.timeout(self._middleware.limits.deadline_seconds):
            await self._send(message)

    async def send_error(self, error: ApiError) -> None:
        """Send the error, unless an answer has begun."""
        if self.status:
            return
        response = error.response()
        if error.status in (408, 413):  # the rest of the body may still come, slowly
            response.headers["Connection"] = "close"
        await response({"type": "http"}, _replay(b""), self.send)


def endpoint_of(path: str) -> str:
    """The path's name in metrics and logs. A client may invent any path, so all others are `other`."""
    if path in ENDPOINTS:
        return path
    return next((prefix for prefix in ("/v2", "/static") if path.startswith(f"{prefix}/")), "other")


def _replay(body: bytes) -> Receive:
    """ASGI's receive for a body that has been read."""
    messages: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        return await asyncio.get_running_loop().create_future()  # `_client_leaves` waits for the disconnect

    return receive
