"""HTTP as clients speak it, over raw sockets: upgrades, heads and bodies of all sizes, clients that half-close."""

import gzip
import json
import time
import zlib
from collections.abc import Callable

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
def server(served: Callable[..., Server]) -> Server:
    return served("bert", "--max-body-bytes", "20000")


def post(body: bytes = BODY, *, path: str = "/fill-mask", more: bytes = b"", kind: bytes = JSON) -> bytes:
    """A request with `more` headers; an empty `kind` leaves out the Content-Type."""
    kind = b"Content-Type: %s\r\n" % kind if kind else b""
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\n%s%s" % (path.encode(), kind, more)
    return b"%sContent-Length: %d\r\n\r\n%s" % (head, len(body), body)


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def chunked(body: bytes, *, size: int = 20, more: bytes = b"") -> bytes:
    """A request whose body comes in chunks of `size` bytes."""
    head = b"POST /fill-mask HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" + more
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*pieces(body, size), b""])
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks


# ---------------------------------------------------------------- upgrades


@pytest.mark.parametrize("offer", [H2C, WEBSOCKET], ids=["h2c", "websocket"])
@pytest.mark.parametrize("frame", ["whole", "chunked"])
@pytest.mark.parametrize("piece", [10_000, 7])
def test_an_offer_to_upgrade_is_ignored_and_a_body_is_never_a_second_request(offer, frame, piece, server):
    """RFC 9110, 7.8; CWE-444."""
    [expected] = server.exchange(post())
    for body in (BODY, SMUGGLED):
        then = HEALTH.replace(b"\r\n\r\n", b"\r\n" + offer + b"\r\n")
        sent = (post if frame == "whole" else chunked)(body, more=offer) + then
        first, second = server.exchange(*pieces(sent, piece), count=2)
        assert first.error == (400, "malformed_json") if body == SMUGGLED else first.json == expected.json
        assert (second.status, second.json) == (200, {"status": "ok"})


def test_a_tunnel_is_refused_and_nothing_in_it_is_read(server):
    [answer] = server.exchange(b"CONNECT x:80 HTTP/1.1\r\nHost: localhost\r\n\r\n" + SMUGGLED)
    assert answer.error == (405, "method_not_allowed")


@pytest.mark.parametrize("rest", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n"])
def test_an_error_is_not_sent_in_place_of_a_pending_answer(rest, server):
    slow = post(json.dumps({"inputs": "a " * 60}).encode(), path="/score")
    [answer] = server.exchange(slow + rest)
    assert (answer.status, answer.json["tokens"]) == (200, 60)


def test_trailer_fields_after_a_chunked_body_are_ignored(server):
    trailer = b"0\r\nAuthorization: x\r\nContent-Encoding: gzip\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n"
    sent = chunked(BODY).removesuffix(b"0\r\n\r\n") + trailer
    for parts in ([sent], [sent[:-40], sent[-40:]]):
        assert [answer.status for answer in server.exchange(*parts)] == [200]


def test_malformed_http_gets_a_json_error(server):
    [answer] = server.exchange(b"\x16\x03\x01 nonsense\r\n\r\n")
    assert answer.error == (400, "malformed_http")


def test_monitors_may_ask_with_head(server):
    for path in (b"/", b"/health", b"/ready", b"/metrics"):
        [answer] = server.exchange(HEALTH.replace(b"GET /health", b"HEAD " + path), half_closes=True)
        assert (answer.status, answer.body) == (200, b"")


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
    [answer] = server.exchange(*parts)
    assert answer.status == 200 if expected == 200 else answer.error == (expected, "head_too_large")


def test_a_head_that_does_not_end_is_closed_before_its_10_seconds(server):
    """After 256 KiB."""
    with server.connect() as client, pytest.raises(OSError, match=r"reset|pipe"):
        client.settimeout(5)
        for _ in range(2):
            client.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * 150_000)
            time.sleep(0.3)
        client.sendall(b"a")
        client.sendall(b"a") if client.recv(1) == b"" else pytest.fail("the head is still read")


@pytest.mark.parametrize("size", [1, 3])
def test_a_body_in_chunks_of_a_byte_is_read(size, server):
    """Passed on one by one, each copied all before it: 40,000 stopped the event loop for 0.2 s."""
    answers = server.exchange(chunked(BODY + b" " * 15_000, size=size) + HEALTH, count=2)
    assert [answer.status for answer in answers] == [200, 200]


# ---------------------------------------------------------------- Host and Origin


LOCAL = ("localhost", "LocalHost:8000", "a.localhost", "localhost.", "127.0.0.1", "127.1.2.3:1", "[::1]", "[::1]:8000")
OTHERS = ("rebound.example", "rebound.example:8000", "localhost.example", "127.0.0.1.example", "10.0.0.1", "[::2]")
OTHERS += ("0.0.0.0", "x@localhost", "")


def statuses(server: Server, *lines: str, method: str = "GET", version: str = "1.1") -> tuple[int, str | None]:
    head = "".join(f"{line}\r\n" for line in (f"{method} /health HTTP/{version}", *lines, ""))
    [answer] = server.exchange(head.encode())
    return (200, None) if answer.status == 200 else answer.error


def test_on_loopback_only_its_own_names_are_answered(server):
    """Otherwise a web page whose owner points its name at 127.0.0.1 could use the server (DNS rebinding)."""
    for host in LOCAL:
        assert statuses(server, f"Host: {host}") == (200, None), host
    for host in OTHERS:
        assert statuses(server, f"Host: {host}") == (403, "host_not_allowed"), host
    [answer] = server.exchange(HEALTH.replace(b"localhost", b"rebound.example"))
    assert answer.json["error"].startswith(
        "'rebound.example' may not use this server: to allow it, start with --allow-host"
    )


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
    [answer] = server.exchange(post(path="/v2/models/bert/infer", more=header))
    assert answer.error in [(400, "bad_header_length"), (400, "malformed_json")]
    if digits.strip("0"):
        sent = post().replace(b"Content-Length: %d" % len(BODY), f"Content-Length: {digits}".encode())
        [answer] = server.exchange(sent)
        assert answer.error == (400, "malformed_http")


# ---------------------------------------------------------------- bodies


@pytest.mark.parametrize("path", ["/fill-mask", "/", "/v2/models/bert/infer"])
def test_a_body_without_a_type_is_json_unless_it_comes_from_another_page(path, server):
    """Triton's own client sends no type with JSON tensors."""
    inputs = {"inputs": tensors([[0]], [[0]], [0], [0])}
    body = json.dumps(inputs if path.startswith("/v2") else FILL).encode()
    assert [answer.status for answer in server.exchange(post(body, path=path, kind=b""))] == [200]
    for more, refused in ((b"Origin: https://other.example\r\n", 403), (b"Origin: null\r\n", 403), (b"", 415)):
        [answer] = server.exchange(post(body, path=path, more=more, kind=b"" if more else b"text/plain"))
        assert answer.status == refused


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
    [answer] = server.exchange(post(body, more=b"Content-Encoding: %s\r\n" % encoding))
    if status == 200:
        assert answer.json == server.ask("/fill-mask", FILL).json
    else:
        assert answer.error == (status, error_type)
        assert status != 415 or "gzip" in answer.json["error"]


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
    answers = server.exchange(b"".join(requests), count=len(requests), half_closes=True)
    assert [answer.status for answer in answers] == [200] * sum(b"\r\n\r\n" in request for request in requests)


def test_a_chunked_body_is_bounded_too(server):
    [answer] = server.exchange(chunked(b"a" * 30_000, size=1024))
    assert answer.error == (413, "body_too_large")


def test_an_incomplete_body_gets_no_answer(server):
    assert server.exchange(post()[:-1], half_closes=True) == []


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
