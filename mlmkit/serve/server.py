"""Runs the application in one process, from its socket to its drain. Several processes are the orchestrator's task.

On SIGTERM: not ready -> 0.5 s for clients to notice -> no more connections -> every accepted request is answered, or
refused when the time to drain is over -> exit 0.
"""

import asyncio
import contextlib
import ctypes
import ipaddress
import logging
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any

import uvicorn

from mlmkit.backends import Backend, load
from mlmkit.errors import CheckError, UserError
from mlmkit.serve.app import build_app
from mlmkit.serve.limits import BATCH_TOKENS, QUEUE_TOKENS, Limits
from mlmkit.serve.metrics import Metrics
from mlmkit.serve.middleware import AllowedHosts, RequestMiddleware
from mlmkit.serve.protocol import Protocol
from mlmkit.serve.service import Service

log = logging.getLogger(__name__)

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75  # more than load balancers' 60: they must be the ones to close an idle connection
NOTICE_SECONDS = 0.5  # between SIGTERM and the closed socket: probes and open connections learn of it
FIRST_READ_SECONDS = 1.0  # for the first request of connections that were accepted last
M_MMAP_THRESHOLD, MMAP_BYTES = -3, 1 << 20  # larger blocks go back to the system when freed; glibc alone kept 300 MiB
SWITCH_INTERVAL_SECONDS = 0.0005  # a tenth of Python's: how long a text thread may keep the event loop waiting


@dataclass(frozen=True)
class ServeOptions:
    """The options of `mlmkit serve`. `limits` has the fields of `Limits` that the user set."""

    model: str
    backend: str
    device: str
    host: str
    port: int
    token: str | None
    allowed_hosts: tuple[str, ...]
    log_texts: bool
    limits: dict[str, Any]


def serve(options: ServeOptions) -> None:
    """Serve until SIGTERM or SIGINT, answer the accepted requests, and return.

    Raises `UserError` for an address that is not available, a model that cannot be loaded, or limits that do not fit
    it, and `CheckError` if the batcher dies.
    """
    _raise_file_limit()
    with _listen(options.host, options.port) as listener:
        host, port = listener.getsockname()[:2]
        is_loopback = ipaddress.ip_address(host.partition("%")[0]).is_loopback
        if options.token is None and not is_loopback:
            log.warning("anyone who reaches this port can use the model: set a token (MLMKIT_TOKEN)")
        backend = load(options.model, options.backend, options.device)
        service = Service(backend, limits_for(backend, options.limits), Metrics(), options.log_texts)
        app = build_app(service, options.token, AllowedHosts(options.allowed_hosts, is_loopback=is_loopback))
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
        with contextlib.suppress(AttributeError, TypeError):  # not glibc
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        server = _Server(service, app, f"serving {options.model} on {url}")
        server.run([listener])
    if not server.started or service.has_failed:
        raise CheckError("the server did not start, or its batcher died: see the messages above")


def limits_for(backend: Backend, user_limits: dict[str, Any]) -> Limits:
    """The defaults for this model and device, with the user's limits. Raises `UserError` for impossible ones."""
    model_tokens, device = backend.info.max_length, backend.device
    defaults = {
        "text_tokens": model_tokens,
        "batch_tokens": BATCH_TOKENS[device],
        "queue_tokens": QUEUE_TOKENS[device],
    }
    limits = Limits(**defaults | user_limits)
    if limits.text_tokens > model_tokens:
        raise UserError(f"--max-tokens {limits.text_tokens}: the model takes at most {model_tokens}")
    if limits.queue_tokens < limits.text_tokens:
        tokens = limits.text_tokens
        raise UserError(f"--max-queue-tokens {limits.queue_tokens} is too small for one text of {tokens} tokens")
    return limits


class _Server(uvicorn.Server):
    """uvicorn's server, except that at its end it loses no request which a client was able to send."""

    def __init__(self, service: Service, app: RequestMiddleware, ready_message: str) -> None:
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,  # the middleware's log has no texts, and the time that each request took
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(service.limits.drain_seconds) + 1,
        )
        super().__init__(config)
        self._service, self._app, self._ready_message = service, app, ready_message

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        log.info(self._ready_message)

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop; uvicorn asks ten times per second. A dead batcher ends the process, to be restarted."""
        return await super().on_tick(counter) or self._service.has_failed

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Start to drain. Unlike uvicorn, do not raise the signal again at the end: the exit code is 0."""
        if not self.should_exit:
            log.info("shutting down: answering the accepted requests")
        self._service.is_accepting = False
        self._app.is_draining = True
        self.force_exit |= self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        drain_seconds = self._service.limits.drain_seconds
        deadline = time.monotonic() + drain_seconds
        await asyncio.sleep(min(NOTICE_SECONDS, drain_seconds / 2))
        for listener in sockets or []:
            await self._stop_listening(listener)
        first_reads_end = time.monotonic() + min(FIRST_READ_SECONDS, drain_seconds / 2)
        while time.monotonic() < first_reads_end and any(
            isinstance(connection, Protocol) and connection.cycle is None
            for connection in self.server_state.connections
        ):
            await asyncio.sleep(0.01)
        refusal = asyncio.create_task(self._refuse_rest(deadline - time.monotonic()))
        await super().shutdown(sockets)
        refusal.cancel()

    async def _stop_listening(self, listener: socket.socket) -> None:
        """Accept every connection that the kernel has completed, then close: it would reset those that remain.

        There is no await between the last accept and the close, or answered clients would connect again meanwhile.
        asyncio closes its socket with the server, so the connections are accepted from a copy.
        """
        copy, connections = listener.dup(), []
        copy.setblocking(False)
        for server in self.servers:
            server.close()
        with contextlib.suppress(BlockingIOError):
            while True:
                connections.append(copy.accept()[0])
        copy.close()
        listener.close()
        for connection in connections:
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> Protocol:
        return Protocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    async def _refuse_rest(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        log.warning("the time to drain is over: refusing the requests in the queue")
        await self._service.batcher.close(answer=False)


def _listen(host: str, port: int) -> socket.socket:
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = addresses[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise UserError(f"cannot listen on {host}, port {port}: {reason}") from None


def _raise_file_limit() -> None:
    """Allow as many open files as the system does: each connection is one, and the default is often 1,024."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such module
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
