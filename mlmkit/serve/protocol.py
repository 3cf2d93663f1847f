"""uvicorn's HTTP protocol: bounds on a head and its time, no upgrades, and answers for clients that half-close."""

import asyncio
import logging
import socket
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from mlmkit.serve.errors import ApiError, error_body

log = logging.getLogger(__name__)

HEAD_SECONDS = 10.0
HEAD_BYTES = 1 << 16
HEAD_FIELDS = 100  # as many as Apache takes; 10,900 in 64 KiB took the event loop 12 ms
WATCH_SECONDS = 0.05


class Protocol(HttpToolsProtocol):
    """Closes a connection whose next request line and headers do not arrive whole in time.

    uvicorn has a timeout for connections that are idle between requests, and none for those that send a byte a minute.
    """

    _timer: asyncio.TimerHandle | None = None
    _is_in_head = _is_in_message = _is_over = False
    _received = 0  # bytes of a head

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # What came at once is handed on as one: 40,000 chunks of a byte would be copied 40,000 times.
        self._pieces: list[bytes] = []
        self.on_body = self._pieces.append  # pyright: ignore[reportAttributeAccessIssue]
        super().__init__(*arguments, **options)

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._is_in_head or not self._is_in_message:  # or the next head begins with this
            self._received += len(data)
        while not self._is_over:
            try:
                self.parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as offer:
                # The parser takes what follows for another protocol: a new one reads the head again without the offer.
                line = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
                kept = [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
                data = b"\r\n".join([line, *kept, b"", data[offer.args[0] :]])
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn sets it
            except httptools.HttpParserError as error:
                self._refuse(error.__context__)
        self._flush()
        if self._received > 4 * HEAD_BYTES:  # up to here a large head is read to its end, to say why it is refused
            self.transport.close()
        elif self._is_in_message and self.is_waiting and self._timer is None:
            self._arm()  # also for the rest of a body whose answer has been given

    def eof_received(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Keep the connection for the answers that are due: the client may have closed its sending side alone.

        One that has left looks the same until it is sent something, such as an interim answer (RFC 9110, 15.2).
        """
        if self.is_waiting or (self._is_in_message and not self._is_in_head):
            return False
        self.cycle.keep_alive = False
        if self.cycle.scope["http_version"] == "1.1" and not (self.pipeline or self.cycle.response_started):
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._watch()
        return True

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = self._is_in_message = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # the fields after a chunked body are no part of what the gate has checked
            super().on_header(name, value)
            if len(self.headers) > HEAD_FIELDS:
                raise ApiError(431, "head_too_large", f"the request has more than {HEAD_FIELDS} header fields")

    def _flush(self) -> None:
        if self._pieces:
            super().on_body(b"".join(self._pieces))
            self._pieces.clear()

    def on_headers_complete(self) -> None:
        """A request has begun: from here on the gate watches over it."""
        if len(self.url) + sum(len(name) + len(value) + len(": \r\n") for name, value in self.headers) > HEAD_BYTES:
            raise ApiError(431, "head_too_large", f"the request line and headers are larger than {HEAD_BYTES} bytes")
        if self.parser.get_method() == b"CONNECT":
            raise ApiError(405, "method_not_allowed", "this server is not a proxy")
        if self.parser.should_upgrade():
            return
        super().on_headers_complete()
        self._is_in_head = False
        self._disarm()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._flush()
        super().on_message_complete()
        self._is_in_message = False
        self._disarm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    @property
    def is_waiting(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def _refuse(self, reason: BaseException | None) -> None:
        """Read no further, and say why, unless other answers come first."""
        error = reason if isinstance(reason, ApiError) else ApiError(400, "malformed_http", "not an HTTP/1.1 request")
        log.info("%d %s", error.status, error.error_type)
        self._is_over = True
        if self.is_waiting and not self._is_in_head:  # in a body whose answer has been given
            self.transport.close()
        elif self.is_waiting or not (self._is_in_head or self.pipeline or self.cycle.response_started):
            body = error_body(error)
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[error.status] + head + body)
            self.transport.close()
        else:
            self.cycle.keep_alive = False

    def _watch(self) -> None:
        """Notice that a half-closed client has left: nothing more is read that would say so."""
        if self.is_waiting or self.transport.is_closing():
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
        self.loop.call_later(WATCH_SECONDS, self._watch)

    def _arm(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self._close)

    def _disarm(self) -> None:
        self._received = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        if self.is_waiting and not self.transport.is_closing():
            self.transport.close()
