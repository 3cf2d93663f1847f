"""uvicorn's HTTP protocol with a bound on how long, and how much, a client may send before its request begins."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mlmkit.serve.errors import ApiError, error_body

HEAD_SECONDS = 10.0
HEAD_BYTES = 1 << 16


class Protocol(HttpToolsProtocol):
    """Closes a connection whose next request line and headers do not arrive whole in time.

    uvicorn has a timeout for connections that are idle between requests, and none for those that send a byte a minute.
    """

    _timer: asyncio.TimerHandle | None = None
    _is_in_head = _is_in_message = False
    _received = 0  # bytes of a head

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See asyncio."""
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self._is_in_head:
            self._received += len(data)
        super().data_received(data)
        if self._received > HEAD_BYTES:
            self.transport.close()
        elif self._is_in_message and self.is_waiting and self._timer is None:
            self._arm()  # also for the rest of a body whose answer has been given

    def on_message_begin(self) -> None:
        """See httptools."""
        super().on_message_begin()
        self._is_in_head = self._is_in_message = True

    def on_headers_complete(self) -> None:
        """A request has begun: from here on the gate watches over it."""
        super().on_headers_complete()
        self._is_in_head = False
        self._disarm()

    def on_message_complete(self) -> None:
        """See httptools."""
        super().on_message_complete()
        self._is_in_message = False
        self._disarm()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is refused in the form of all refusals."""
        body = error_body(ApiError(400, "malformed_http", "this is no HTTP/1.1 request"))
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._disarm()
        super().connection_lost(exc)

    @property
    def is_waiting(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

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
