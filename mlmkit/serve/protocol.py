"""uvicorn's HTTP protocol, with what it lacks: limits on a request's head, errors in JSON, and half-closed clients.

It also ignores offers to upgrade, as RFC 9110, 7.8 allows; uvicorn would drop the body of such a request.
"""

import asyncio
import logging
import socket
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from mlmkit.serve.errors import ApiError

log = logging.getLogger(__name__)

HEAD_SECONDS = 10.0
HEAD_BYTES = 1 << 16
HEAD_FIELDS = 100  # Apache's limit; the 10,900 that fit into 64 KiB stopped the event loop for 12 ms
PROBE_SECONDS = 0.05


class Protocol(HttpToolsProtocol):
    """Closes a connection whose next request line and headers do not arrive completely within `HEAD_SECONDS`.

    uvicorn only has a timeout for connections that send nothing between requests.
    """

    _timer: asyncio.TimerHandle | None = None
    _is_in_head = _is_in_message = _has_refused = False
    _head_bytes = 0  # received of a head that is not complete

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # httptools calls `on_body` once per chunk, and uvicorn copies all of the body so far: slow for 40,000 chunks of
        # a byte. So chunks that arrive together are collected, and passed on as one.
        self._chunks: list[bytes] = []
        self.on_body = self._chunks.append  # pyright: ignore[reportAttributeAccessIssue]
        super().__init__(*arguments, **options)

    # ------------------------------------------------------------ asyncio's callbacks

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._is_in_head or not self._is_in_message:  # a head, or the start of the next one
            self._head_bytes += len(data)
        while not self._has_refused:
            try:
                self.parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as upgrade:
                data = self._without_upgrade(data[upgrade.args[0] :])
            except httptools.HttpParserError as error:
                self._refuse(error.__context__)
        self._pass_chunks_on()
        if self._head_bytes > 4 * HEAD_BYTES:  # a smaller head is read to its end, so that the client gets the 431
            self.transport.close()
        elif self._is_in_message and self.is_idle and self._timer is None:
            self._start_timer()  # for the rest of a body that has its answer already

    def eof_received(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Keep the connection open while an answer is due: the client may have closed only its sending side.

        A client that left looks the same until something is sent, so send an interim response (RFC 9110, 15.2).
        """
        if self.is_idle or (self._is_in_message and not self._is_in_head):
            return False
        self.cycle.keep_alive = False
        if self.cycle.scope["http_version"] == "1.1" and not (self.pipeline or self.cycle.response_started):
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._abort_if_client_left()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    # ------------------------------------------------------------ httptools' callbacks

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = self._is_in_message = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # trailer fields after a chunked body come here too, and are ignored
            super().on_header(name, value)
            if len(self.headers) > HEAD_FIELDS:
                raise ApiError(431, "head_too_large", f"the request has more than {HEAD_FIELDS} header fields")

    def on_headers_complete(self) -> None:
        if len(self.url) + sum(len(name) + len(value) + len(": \r\n") for name, value in self.headers) > HEAD_BYTES:
            raise ApiError(431, "head_too_large", f"the request line and headers are larger than {HEAD_BYTES} bytes")
        if self.parser.get_method() == b"CONNECT":
            raise ApiError(405, "method_not_allowed", "this server is not a proxy")
        if self.parser.should_upgrade():
            return
        super().on_headers_complete()
        self._is_in_head = False
        self._stop_timer()  # from here on the deadline of the middleware holds

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._pass_chunks_on()
        super().on_message_complete()
        self._is_in_message = False
        self._stop_timer()

    # ------------------------------------------------------------ helpers

    @property
    def is_idle(self) -> bool:
        """Whether every request so far has its answer."""
        return self.cycle is None or self.cycle.response_complete

    def _without_upgrade(self, rest: bytes) -> bytes:
        """The head without its offer, and the rest, for a new parser: this one takes the rest for another protocol."""
        line = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        fields = [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        return b"\r\n".join([line, *fields, b"", rest])

    def _pass_chunks_on(self) -> None:
        if self._chunks:
            super().on_body(b"".join(self._chunks))
            self._chunks.clear()

    def _refuse(self, reason: BaseException | None) -> None:
        """Read no more from this connection. Answer with an error if no other answers are due before it."""
        error = reason if isinstance(reason, ApiError) else ApiError(400, "malformed_http", "not an HTTP/1.1 request")
        log.info("%d %s", error.status, error.error_type)
        self._has_refused = True
        if self.is_idle and not self._is_in_head:  # in a body that has its answer already
            self.transport.close()
        elif self.is_idle or not (self._is_in_head or self.pipeline or self.cycle.response_started):
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
            self.transport.write(STATUS_LINE[error.status] + head % len(error.body) + error.body)
            self.transport.close()
        else:
            self.cycle.keep_alive = False

    def _abort_if_client_left(self) -> None:
        """Poll the socket's error: asyncio reads no more from a half-closed connection, so it would not notice."""
        if self.is_idle or self.transport.is_closing():
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
        self.loop.call_later(PROBE_SECONDS, self._abort_if_client_left)

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self._close_if_idle)

    def _stop_timer(self) -> None:
        self._head_bytes = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close_if_idle(self) -> None:
        if self.is_idle and not self.transport.is_closing():
            self.transport.close()
