"""HTTP as clients speak it, over raw sockets: upgrades, heads and bodies of all sizes, clients that half-close."""

import gzip
import json
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from serving import Server, running, tensors

FILL = {"inputs": "The [MASK] is"}
JSON = b"application/json"
BODY = json.dumps(FILL).encode()
LONG = json.dumps({"inputs": ["a " * 62] * 4}).encode()  # 248 rows
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
SMUGGLED = b"GET /info HTTP/1.1\r\nHost: localhost\r\n\r\n"
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
WEBSOCKET = b"Connection: keep-alive, upgrade\r\nupgrade: websocket\r\nSec-WebSocket-Key: x\r\n"


@pytest.fixture(scope="module")
def server(artifact: Callable[[str], Path]) -> Iterator[Server]:
    with running(artifact("bert"), "--max-body-bytes", "20000") as server:
        yield server


def post(body: bytes = BODY, *, path: str = "/fill-mask", more: bytes = b"", kind: bytes = JSON) -> bytes:
    """A request with `more` headers; an empty `kind` leaves out the Content-Type."""
    kind = b"Content-Type: %s\r\n" % kind if kind else b""
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\n%s%s" % (path.encode(), kind, more)
    return b"%sContent-Length: %d\r\n\r\n%s" % (head, len(body), body)


def chunked(body: bytes, *, more: bytes = b"") -> bytes:
    head = b"POST /fill-mask HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" + more
    half = len(body) // 2
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:half], body[half:], b""))
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks


def exchange(server: Server, *parts: bytes, count: int = 1, half_closes: bool = False) -> list[tuple[int, Any]]:
    """Status and JSON of `count` answers, and of any more until the server closes or sends nothing for 0.1 s."""
    with socket.create_connection(("127.0.0.1", server.port), 30) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in parts:
            client.sendall(part)
            time.sleep(0.002 if len(parts) > 1 else 0)
        if half_closes:
            client.shutdown(socket.SHUT_WR)
        file, answers = client.makefile("rb"), []
        while True:
            answer = HTTPResponse(_Reader(file))  # pyright: ignore[reportArgumentType]
            try:
                answer.begin()
            except (ConnectionError, TimeoutError):
                return answers
            content = answer.read()
            is_json = answer.headers.get_content_type() == "application/json"
            answers.append((answer.status, json.loads(content) if is_json else content))
            if len(answers) == count:
                client.settimeout(0.1)


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


class _Reader:
    """What `HTTPResponse` needs of a socket. It closes its file; here the next answer is read from the same file."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def makefile(self, _: str) -> Any:
        return self

    def close(self) -> None: ...

    def flush(self) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


# ---------------------------------------------------------------- upgrades


@pytest.mark.parametrize("offer", [H2C, WEBSOCKET], ids=["h2c", "websocket"])
@pytest.mark.parametrize("frame", ["whole", "chunked"])
@pytest.mark.parametrize("piece", [10_000, 7])
def test_an_offer_to_upgrade_is_ignored_and_a_body_is_never_a_second_request(offer, frame, piece, server):
    """RFC 9110, 7.8; CWE-444."""
    [(_, expected)] = exchange(server, post())
    for body, first in ((BODY, (200, expected)), (SMUGGLED, (400, "malformed_json"))):
        second = HEALTH.replace(b"\r\n\r\n", b"\r\n" + offer + b"\r\n")
        sent = (post if frame == "whole" else chunked)(body, more=offer) + second
        (status, answer), *others = exchange(server, *pieces(sent, piece), count=2)
        assert (status, answer["error_type"] if status == 400 else answer) == first
        assert others == [(200, {"status": "ok"})]


def test_a_tunnel_is_refused_and_nothing_in_it_is_read(server):
    [(status, answer)] = exchange(server, b"CONNECT x:80 HTTP/1.1\r\nHost: localhost\r\n\r\n" + SMUGGLED)
    assert (status, answer["error_type"]) == (405, "method_not_allowed")


@pytest.mark.parametrize("rest", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n"])
def test_an_error_is_not_sent_in_place_of_a_pending_answer(rest, server):
    slow = post(json.dumps({"inputs": "a " * 60}).encode(), path="/score")
    [(status, answer)] = exchange(server, slow + rest)
    assert (status, answer["tokens"]) == (200, 60)


def test_trailer_fields_after_a_chunked_body_are_ignored(server):
    trailer = b"0\r\nAuthorization: x\r\nContent-Encoding: gzip\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n"
    sent = chunked(BODY).removesuffix(b"0\r\n\r\n") + trailer
    for parts in ([sent], [sent[:-40], sent[-40:]]):
        assert [status for status, _ in exchange(server, *parts)] == [200]


# ---------------------------------------------------------------- heads


@pytest.mark.parametrize(("size", "status"), [(65_000, 200), (65_600, 431), (120_000, 431), (200_000, 431)])
@pytest.mark.parametrize("piece", [1 << 20, 30_000])
@pytest.mark.parametrize("header", ["one", "several"])
def test_a_head_of_more_than_64_kib_is_refused_however_it_comes(size, status, piece, header, server):
    lines = b"X: " + b"a" * (size - 60) if header == "one" else b"\r\n".join([b"X: " + b"a" * (size // 90)] * 90)
    sent = post(more=lines + b"\r\n")
    check_head(server, status, *pieces(sent, piece))


def test_a_head_of_many_fields_is_refused(server):
    """10,900 of them fit into 64 KiB and stopped the event loop for 12 ms."""
    for count, status in ((90, 200), (101, 431), (10_900, 431)):
        check_head(server, status, post(more=b"a:\r\n" * count))


def check_head(server: Server, expected: int, *parts: bytes) -> None:
    [(status, answer)] = exchange(server, *parts)
    assert status == expected
    assert status == 200 or answer["error_type"] == "head_too_large"


def test_a_head_that_does_not_end_is_closed_before_its_10_seconds(server):
    """After 256 KiB."""
    with socket.create_connection(("127.0.0.1", server.port), 5) as client, pytest.raises(OSError, match=r"reset|pipe"):
        for _ in range(2):
            client.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * 150_000)
            time.sleep(0.3)
        client.sendall(b"a")
        client.sendall(b"a") if client.recv(1) == b"" else pytest.fail("the head is still read")


@pytest.mark.parametrize("size", [1, 3])
def test_a_body_in_chunks_of_a_byte_is_read(size, server):
    """Passed on one by one, each copied all before it: 40,000 stopped the event loop for 0.2 s."""
    body = BODY + b" " * 15_000
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in pieces(body, size))
    head = chunked(b"").partition(b"\r\n\r\n")[0]
    answers = exchange(server, head + b"\r\n\r\n" + chunks + b"0\r\n\r\n" + HEALTH, count=2)
    assert [status for status, _ in answers] == [200, 200]


# ---------------------------------------------------------------- Host and Origin


LOCAL = ("localhost", "LocalHost:8000", "a.localhost", "localhost.", "127.0.0.1", "127.1.2.3:1", "[::1]", "[::1]:8000")
OTHERS = ("rebound.example", "rebound.example:8000", "localhost.example", "127.0.0.1.example", "10.0.0.1", "[::2]")
OTHERS += ("0.0.0.0", "x@localhost", "")


def statuses(server: Server, *lines: str, method: str = "GET", version: str = "1.1") -> tuple[int, str | None]:
    head = "".join(f"{line}\r\n" for line in (f"{method} /health HTTP/{version}", *lines, ""))
    [(status, answer)] = exchange(server, head.encode())
    return status, answer.get("error_type")


def test_on_loopback_only_its_own_names_are_answered(server):
    """Otherwise a web page whose owner points its name at 127.0.0.1 could use the server (DNS rebinding)."""
    for host in LOCAL:
        assert statuses(server, f"Host: {host}") == (200, None), host
    for host in OTHERS:
        assert statuses(server, f"Host: {host}") == (403, "host_not_allowed"), host
    [(_, answer)] = exchange(server, HEALTH.replace(b"localhost", b"rebound.example"))
    assert answer["error"].startswith("'rebound.example' may not use this server: to allow it, start with --allow-host")


def test_a_request_has_one_host_unless_it_is_of_http_1_0(server):
    assert statuses(server) == statuses(server, "Host: localhost", "Host: localhost") == (400, "malformed_http")
    assert statuses(server, version="1.0") == (200, None)
    assert statuses(server, "Origin: http://localhost", version="1.0") == (403, "host_not_allowed")
    assert statuses(server, "Host: rebound.example", version="1.0") == (403, "host_not_allowed")


def test_an_origin_is_the_servers_own(server):
    for host in LOCAL:
        assert statuses(server, f"Host: {host}", f"Origin: http://{host}") == (200, None)
    hosts = ("http://localhost", "http://localhost:2", "http://127.0.0.1:1", "https://other.example")
    for origin in ("null", "", "localhost:1", *hosts):
        assert statuses(server, "Host: localhost:1", f"Origin: {origin}") == (403, "host_not_allowed"), origin
        assert statuses(server, "Host: localhost:1", "Origin: http://localhost:1", f"Origin: {origin}")[0] == 403


def test_allow_host_adds_names_and_other_addresses_take_any_host(artifact):
    with running(artifact("bert"), "--allow-host", "Proxy.example", "--allow-host", "other.example") as server:
        for host in ("proxy.example", "PROXY.example:443", "other.example", "localhost"):
            assert statuses(server, f"Host: {host}", f"Origin: https://{host}") == (200, None)
        assert statuses(server, "Host: localhost:8000", "Origin: https://proxy.example") == (200, None)
        assert statuses(server, "Host: a.proxy.example")[0] == 403
    with running(artifact("bert"), "--host", "0.0.0.0", "--token", "secret") as server:
        assert statuses(server, "Host: any.example", "Origin: http://any.example") == (200, None)
        assert statuses(server, "Host: any.example", "Origin: http://other.example")[0] == 403


@pytest.mark.parametrize("digits", ["9" * 4301, "0" * 4301, "9" * 20, "-1", "٣", "1_0"])
def test_odd_lengths_are_the_clients_mistake(digits, server):
    header = f"Inference-Header-Content-Length: {digits}\r\n".encode()
    [(status, answer)] = exchange(server, post(path="/v2/models/bert/infer", more=header))
    assert (status, answer["error_type"]) in [(400, "bad_header_length"), (400, "malformed_json")]
    if digits.strip("0"):
        sent = post().replace(b"Content-Length: %d" % len(BODY), f"Content-Length: {digits}".encode())
        [(status, answer)] = exchange(server, sent)
        assert (status, answer["error_type"]) == (400, "malformed_http")


# ---------------------------------------------------------------- bodies


@pytest.mark.parametrize("path", ["/fill-mask", "/", "/v2/models/bert/infer"])
def test_a_body_without_a_type_is_json_unless_it_comes_from_another_page(path, server):
    """Triton's own client sends no type with JSON tensors."""
    inputs = {"inputs": tensors([[0]], [[0]], [0], [0])}
    body = json.dumps(inputs if path.startswith("/v2") else FILL).encode()
    assert [status for status, _ in exchange(server, post(body, path=path, kind=b""))] == [200]
    for more, refused in ((b"Origin: https://other.example\r\n", 403), (b"Origin: null\r\n", 403), (b"", 415)):
        [(status, _)] = exchange(server, post(body, path=path, more=more, kind=b"" if more else b"text/plain"))
        assert status == refused


GZIPPED = gzip.compress(BODY, mtime=0)


@pytest.mark.parametrize(
    ("body", "encoding", "status", "error_type"),
    [
        (GZIPPED, b"gzip", 200, None),
        (GZIPPED, b"GZip ", 200, None),
        (BODY, b"identity", 200, None),
        (b" " * (20_000 - len(BODY)) + BODY, b"gzip", 200, None),
        (b" " * (20_001 - len(BODY)) + BODY, b"gzip", 413, "body_too_large"),
        (b" " * 50_000_000, b"gzip", 413, "body_too_large"),
        (GZIPPED[:-1], b"gzip", 400, "malformed_gzip"),
        (GZIPPED + b"x", b"gzip", 400, "malformed_gzip"),
        (GZIPPED + GZIPPED, b"gzip", 400, "malformed_gzip"),
        (GZIPPED[:-8] + bytes(8), b"gzip", 400, "malformed_gzip"),
        (BODY, b"gzip", 400, "malformed_gzip"),
        (b"", b"gzip", 400, "malformed_gzip"),
        (gzip.compress(b"{", mtime=0), b"gzip", 400, "malformed_json"),
        (zlib.compress(BODY), b"deflate", 415, "unsupported_media_type"),
        (gzip.compress(GZIPPED, mtime=0), b"gzip, gzip", 415, "unsupported_media_type"),
        (gzip.compress(GZIPPED, mtime=0), b"gzip\r\nContent-Encoding: gzip", 415, "unsupported_media_type"),
    ],
)  # fmt: skip
def test_gzip_is_read_and_its_content_is_limited(body, encoding, status, error_type, server):
    if len(body) > 1000:
        body = gzip.compress(body)
    [(answer_status, answer)] = exchange(server, post(body, more=b"Content-Encoding: %s\r\n" % encoding))
    assert (answer_status, None if answer_status == 200 else answer["error_type"]) == (status, error_type)
    if status == 200:
        assert answer == server.ask("/fill-mask", FILL).json
    elif status == 415:
        assert "gzip" in answer["error"]


# ---------------------------------------------------------------- half-closed connections


@pytest.mark.parametrize(
    "requests",
    [
        [post()],
        [HEALTH],
        [chunked(BODY)],
        [post(LONG, path="/score")],
        [post(LONG, path="/score").replace(b"HTTP/1.1", b"HTTP/1.0")],
        [post(LONG, path="/score"), post(), HEALTH],
        [post(LONG, path="/score", more=H2C)],
        [post(LONG, path="/score"), b"GET /hea"],
    ],
)  # fmt: skip
def test_a_client_that_half_closes_gets_its_answers(requests, server):
    answers = exchange(server, b"".join(requests), count=len(requests), half_closes=True)
    assert [status for status, _ in answers] == [200] * sum(b"\r\n\r\n" in request for request in requests)


def test_an_incomplete_body_gets_no_answer(server):
    assert exchange(server, post()[:-1], half_closes=True) == []


# ---------------------------------------------------------------- the OpenAPI document


def test_the_openapi_document_has_true_types_and_relative_addresses(server):
    document = server.ask("/openapi.json").json
    assert document["servers"] == [{"url": "./"}]
    for path, kinds in (("/metrics", {"text/plain"}), ("/info", {"application/json"})):
        assert set(document["paths"][path]["get"]["responses"]["200"]["content"]) == kinds
    infer = document["paths"]["/v2/models/{name}/infer"]["post"]
    assert set(infer["responses"]["200"]["content"]) == {"application/json", "application/octet-stream"}
    for page in ("/", "/docs", "/static/docs.js", "/static/api.js", "/static/model.js", "/static/app.js"):
        text = server.ask(page).body.decode()
        assert '"/' not in text.replace('"/>', "")
        assert "'/" not in text
