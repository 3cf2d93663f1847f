"""What every request passes before the application sees it: who, how large, how many, how long."""

import asyncio
import contextlib
import hmac
import logging
import re
import time
import zlib
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlmkit.serve.errors import ApiError, error_response, overloaded
from mlmkit.serve.limits import Limits
from mlmkit.serve.metrics import Metrics

log = logging.getLogger(__name__)

PROBES = ("/health", "/ready", "/v2/health/live", "/v2/health/ready")
PAGES = ("/", "/docs", "/openapi.json", "/favicon.ico")
COUNTED = (*PROBES, *PAGES, "/fill-mask", "/score", "/info", "/metrics")
ROUND = 16  # requests begun in one turn of the event loop, some 5 ms: probes wait for no more of them
LOCAL = r"([\w-]+\.)*localhost|127(\.\d+){3}|\[::1\]"
CLIENT_LEFT = 499  # as nginx writes it
DISCARDED = 32 << 20  # bytes of a body that are read and dropped, so that the client hears why
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-store"),
)


@dataclass(frozen=True)
class Hosts:
    """Whom a request may name as its Host and its Origin: `names`, and where `is_local` this machine's own alone.

    Otherwise a web page whose owner points its name at 127.0.0.1 is one of this server's own, to a browser.
    """

    names: tuple[str, ...]
    is_local: bool

    def check(self, scope: Scope) -> None:
        """Raise `ApiError` for other ones."""
        hosts, origins = (
            [value.decode("latin-1").lower() for name, value in scope["headers"] if name == wanted]
            for wanted in (b"host", b"origin")
        )
        if len(hosts) != 1 and (hosts or scope["http_version"] == "1.1"):
            raise ApiError(400, "malformed_http", "a request of HTTP/1.1 has the header Host once")
        named = "|".join(map(re.escape, self.names)).lower() or "(?!)"
        own, known = [f"{scheme}://{host}" for host in hosts for scheme in ("http", "https")], f"{LOCAL}|{named}"
        refused = [host for host in hosts if self.is_local and not re.fullmatch(rf"({known})\.?(:\d*)?", host)]
        refused += [it for it in origins if it not in own and not re.fullmatch(rf"https?://({named})\.?(:\d*)?", it)]
        if refused:
            message = f"{refused[0][:100]!a} may not use this server: if it may, start it with --allow-host NAME"
            raise ApiError(403, "host_not_allowed", message)


class Gate:
    """ASGI middleware. A POST's body is read here, whole, before the application runs.

    The application's task is cancelled when its client leaves or the deadline passes, so endpoints need not look.
    """

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, token: str | None, hosts: Hosts) -> None:
        self.app, self.limits, self.metrics, self.hosts = app, limits, metrics, hosts
        self.token = token.encode() if token else None
        self.in_flight = self._begun = 0
        self.is_draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # some monitors ask so; uvicorn leaves out the body
            scope = {**scope, "method": "GET"}
        answer = _Answer(send, self)
        state = scope.setdefault("state", {})
        state["error_type"] = ""
        endpoint = endpoint_of(scope["path"])
        begun = time.perf_counter()
        try:
            self.hosts.check(scope)
            self._check_token(scope)
            if endpoint not in PROBES:
                await self._turn()
            if scope["method"] in ("POST", "PUT", "PATCH"):
                async with self._place():
                    await self._answer_in_time(scope, receive, answer)
            else:
                await self.app(scope, receive, answer.send)
        except ApiError as error:
            state["error_type"] = error.error_type
            await answer.refuse(error)
        except TimeoutError:  # of `_Answer.send`: uvicorn closes the connection of an answer that is not complete
            log.info("a client does not read its answer")
        finally:
            seconds = time.perf_counter() - begun
            self.metrics.saw_request(endpoint, answer.status, seconds, state["error_type"])
            level = logging.DEBUG if endpoint in (*PROBES, "/metrics") else logging.INFO
            method = scope["method"][:10] if scope["method"].isalpha() else "?"
            log.log(level, "%s %s %d %.1f ms %s", method, endpoint, answer.status, seconds * 1e3, state["error_type"])

    async def _turn(self) -> None:
        while self._begun >= ROUND:
            await asyncio.sleep(0)
        if not self._begun:
            asyncio.get_running_loop().call_soon(setattr, self, "_begun", 0)
        self._begun += 1

    def _check_token(self, scope: Scope) -> None:
        path = scope["path"]
        if self.token is None or path in PROBES or (scope["method"] == "GET" and _is_page(path)):
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, token = given.partition(b" ")
        if not (hmac.compare_digest(token.strip(), self.token) and scheme.lower() == b"bearer"):
            error = ApiError(401, "unauthorized", "send the server's token as Authorization: Bearer TOKEN")
            error.headers["WWW-Authenticate"] = "Bearer"
            raise error

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        if self.in_flight >= self.limits.requests:
            raise overloaded(f"{self.in_flight} requests are under way", 1)
        self.in_flight += 1
        self.metrics.in_flight.inc()
        try:
            yield
        finally:
            self.in_flight -= 1
            self.metrics.in_flight.dec()

    async def _answer_in_time(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        seconds, body = self.limits.deadline_seconds, None
        try:
            async with asyncio.timeout(seconds) as answer.deadline:
                body = await self._read(scope, receive)
                if body is None or await self._has_left(receive, self.app(scope, _replay(body), answer.send), answer):
                    answer.status = CLIENT_LEFT
        except TimeoutError:
            if answer.status:
                raise
            if body is None:
                raise ApiError(408, "body_too_slow", f"the body did not arrive within {seconds:g} seconds") from None
            message = f"no answer within {seconds:g} seconds: send less, or later"
            raise ApiError(503, "deadline_exceeded", message, 1) from None
        finally:
            answer.deadline = None

    async def _has_left(self, receive: Receive, application: Awaitable[None], answer: "_Answer") -> bool:
        """Run the application, unless its client leaves before there is an answer; say whether it has."""
        task, left = asyncio.current_task(), False
        assert task is not None

        def leave(farewell: asyncio.Future[Message]) -> None:
            nonlocal left
            if not farewell.cancelled() and answer.status == 0:
                left = True
                task.cancel()

        farewell = asyncio.ensure_future(receive())  # the body is read: nothing else can come
        farewell.add_done_callback(leave)
        try:
            await application
        except asyncio.CancelledError:
            if not left:
                raise
            task.uncancel()
        finally:
            farewell.cancel()
        return left

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body, inflated; None if the client left while it sent it. Raises `ApiError` for what is refused."""
        limit = self.limits.body_bytes
        parts, size, has_more = [], 0, True
        while has_more and size <= DISCARDED:
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
            raise ApiError(413, "body_too_large", f"the body is larger than {limit} bytes: send fewer texts at once")
        return body


class _Answer:
    """The way back: adds the headers that every answer has, and remembers the status, 0 until there is one."""

    def __init__(self, send: Send, gate: Gate) -> None:
        self._send, self._gate, self.status = send, gate, 0
        self.deadline: asyncio.Timeout | None = None  # until there is an answer

    async def send(self, message: Message) -> None:
        """ASGI's send. Raises `TimeoutError` when the client does not read."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.deadline is not None and not self.deadline.expired():
                self.deadline.reschedule(None)  # from here on, each message has a time of its own
            given = {name.lower() for name, _ in message["headers"]}
            own = [header for header in HEADERS if header[0] not in given]
            if self._gate.is_draining:
                own.append((b"connection", b"close"))
            message = {**message, "headers": [*message["headers"], *own]}
        async with asyncio.timeout(self._gate.limits.deadline_seconds):
            await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        """Answer with a refusal, unless another answer has begun."""
        if self.status:
            return
        response = error_response(error)
        if error.status in (408, 413):  # more of its body may come, and come slowly
            response.headers["Connection"] = "close"
        await response({"type": "http"}, _replay(b""), self.send)


def _inflate(body: bytes, encodings: list[bytes], limit: int) -> bytes:
    """The content of a gzip file of one member; of one that is larger, the first `limit` + 1 bytes."""
    if encodings not in ([b"gzip"], [b"x-gzip"]):
        raise ApiError(415, "unsupported_media_type", "send the body as it is, or with Content-Encoding: gzip")
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        content = inflater.decompress(body, limit + 1)
    except zlib.error:
        content = b""
    if len(content) <= limit and (not inflater.eof or inflater.unused_data):
        raise ApiError(400, "malformed_gzip", "the body is not one whole gzip file, as its Content-Encoding says")
    return content


async def json_body(request: Request) -> bytes:
    """The body of a request that says it is JSON, or that names no type, as Triton's client."""
    kind = request.headers.get("content-type", "application/json")
    kind = kind.partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, "unsupported_media_type", "send JSON, and the header Content-Type: application/json")
    return await request.body()


def endpoint_of(path: str) -> str:
    """A path as figures and logs name it: what a client may invent is `other`."""
    if path in COUNTED:
        return path
    return next((prefix for prefix in ("/v2", "/static") if path.startswith(f"{prefix}/")), "other")


def _is_page(path: str) -> bool:
    return path in PAGES or path.startswith("/static/")


def _replay(body: bytes) -> Receive:
    messages: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        return await asyncio.get_running_loop().create_future()  # the gate itself watches for a farewell

    return receive
