"""uvicorn's HTTP protocol: bounds on a head and its time, no upgrades, answers for clients that half-close."""

import asyncio
import logging
import socket

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from mlmkit.serve.errors import ApiError, error_body

log = logging.getLogger(__name__)

HEAD_SECONDS = 10.0
HEAD_BYTES = 1 << 16
UNENDING_BYTES = 4 * HEAD_BYTES  # a larger head is read to its end so far, so that its client hears why it is refused
WATCH_SECONDS = 0.05


class Protocol(HttpToolsProtocol):
    """Closes a connection whose next request line and headers do not arrive whole in time.

    uvicorn has a timeout for connections that are idle between requests, and none for those that send a byte a minute.
    """

    _timer: asyncio.TimerHandle | None = None
    _is_in_head = _is_in_message = _is_over = False
    _received = 0  # bytes of a head

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._is_in_head:
            self._received += len(data)
        while not self._is_over:
            try:
                self.parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as offer:
                # This parser takes what follows for another protocol. A new one reads the head without the offer.
                data = self._head_without_offer() + data[offer.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn sets it
            except httptools.HttpParserError as error:
                self._refuse(error.__context__)
        if self._received > UNENDING_BYTES:
            self.transport.close()
        elif self._is_in_message and self.is_waiting and self._timer is None:
            self._arm()  # also for the rest of a body whose answer has been given

    def eof_received(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Keep the connection for the answers that are due: the client may have closed its sending side alone.

        One that has left looks the same, but resets the connection upon whatever it is sent. Other clients of HTTP/1.1
        skip an interim answer (RFC 9110, 15.2).
        """
        is_partial = self._is_in_message and not self._is_in_head
        if self.is_waiting or is_partial or self.cycle.scope["http_version"] != "1.1":
            return False
        self.cycle.keep_alive = False
        if not (self.pipeline or self.cycle.response_started):
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._watch()
        return True

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = self._is_in_message = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # not the fields behind a chunked body
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A request has begun: from here on the gate watches over it."""
        if len(self.url) + sum(len(name) + len(value) + len(":\r\n") for name, value in self.headers) > HEAD_BYTES:
            raise ApiError(431, "head_too_large", f"the request line and headers are larger than {HEAD_BYTES} bytes")
        if self.parser.get_method() == b"CONNECT":
            raise ApiError(405, "method_not_allowed", "this server is no proxy")
        if self.parser.should_upgrade():
            return
        super().on_headers_complete()
        self._is_in_head = False
        self._disarm()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
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

    def _head_without_offer(self) -> bytes:
        first = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        headers = [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([first, *headers, b"", b""])

    def _refuse(self, reason: BaseException | None) -> None:
        """Answer what cannot be read, unless other answers come first, and read no further."""
        malformed = ApiError(400, "malformed_http", "this is no HTTP/1.1 request")
        error = reason if isinstance(reason, ApiError) else malformed
        log.info("%d %s", error.status, error.error_type)
        self._is_over = True
        is_next = self.is_waiting if self._is_in_head else not (self.pipeline or self.cycle.response_started)
        if is_next:
            body = error_body(error)
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[error.status] + head + body)
        if is_next or self.is_waiting:
            self.transport.close()
        else:
            self.cycle.keep_alive = False

    def _watch(self) -> None:
        """Notice that a client that has half-closed leaves: nothing more is read that would say so."""
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
