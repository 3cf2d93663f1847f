"""What a server meets in production: SIGTERM under load, clients that are slow, that leave, or that come at once."""

import asyncio
import json
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import paragraphs
from serving import Answer, Server, read_answer, running, tensors

from benchmarks.load import encode, run
from mlmkit.export.export import export
from mlmkit.export.parity import ProofText
from mlmkit.tokenizer import FILES

FILL = "/fill-mask"
SHORT = encode(FILL, {"inputs": "The [MASK] is"})
# 620 rows of 64 tokens: most of a second, even for a tiny model
LONG = encode("/score", {"inputs": ["a " * 62] * 10})
ROUNDS = {"inputs": "[MASK] " * 60, "parameters": {"joint": True}}  # 60 rounds of ten rows


@pytest.fixture(scope="module")
def server(served: Callable[..., Server]) -> Server:
    return served("bert")


def read(client: socket.socket) -> Answer:
    answer = read_answer(client.makefile("rb"))
    assert answer
    return answer


def send_and_wait(server: Server, client: socket.socket) -> None:
    """Send a request of many rows, and wait until they are in the queue."""
    client.sendall(LONG)
    wait_until(lambda: server.metric("mlmkit_queue_tokens") > 0)


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


# ---------------------------------------------------------------- the end


def test_requests_accepted_before_sigterm_are_answered(artifact):
    """Every request that a kept or a new connection took gets its answer."""
    with running(artifact("bert")) as server:
        stopping = threading.Timer(1.0, server.process.send_signal, (signal.SIGTERM,))
        stopping.start()
        requests = [SHORT, encode("/score", {"inputs": "The rat."})]
        seen = asyncio.run(run(server.port, requests, 32, 4.0, patience=0.1))
        assert server.process.wait(30) == 0
        statuses = seen["statuses"]
        assert statuses.pop("200") > 100
        assert statuses.pop("no connection") > 0
        assert not statuses, seen
        assert "Traceback" not in server.log


def test_a_request_of_many_rounds_is_answered_after_sigterm(artifact):
    with running(artifact("bert")) as server, server.connect() as client:
        client.sendall(encode(FILL, ROUNDS))
        wait_until(lambda: server.metric("mlmkit_batch_rows_count") > 2)
        server.process.send_signal(signal.SIGTERM)
        answer = read(client)
        assert (answer.status, len(answer.json), len(answer.json[0]["tokens"])) == (200, 5, 60)
        assert server.process.wait(30) == 0


def test_sigterm_makes_it_unready_and_ends_it_within_the_deadline(artifact):
    with running(artifact("bert"), "--drain", "3") as server, server.connect() as busy, server.connect() as late:
        send_and_wait(server, busy)
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert server.ask("/ready").status == 503  # the socket is still open
        assert server.ask("/v2/health/ready").status == 503
        late.sendall(SHORT)
        assert read(late).status == 200
        assert server.process.wait(30) == 0
        assert time.monotonic() - start < 6
        assert read(busy).status in (200, 503)  # depends on the machine's speed
        with pytest.raises(ConnectionRefusedError):
            server.connect()


def test_work_beyond_the_drain_deadline_is_refused_and_the_exit_code_is_0(artifact):
    slow = (
        "import mlmkit.serve.batcher as b, time; score = b.score_together; "
        "b.score_together = lambda *a: (time.sleep(0.5), score(*a))[1]"
    )
    with running(artifact("bert"), "--drain", "1", before=slow) as server, server.connect() as client:
        send_and_wait(server, client)
        assert server.stop() == 0
        answer = read(client)
        assert (answer.error, "retry-after" in answer.headers) == ((503, "shutting_down"), True)


def test_ctrl_c_ends_it_too(artifact):
    with running(artifact("bert")) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0


# ---------------------------------------------------------------- clients


def test_a_client_that_leaves_takes_its_rows_with_it(server):
    left = 'mlmkit_requests_total{endpoint="/score",status="499"}'
    before = server.metric("mlmkit_batch_rows_sum"), server.metric(left)
    for _ in range(5):
        with server.connect() as client:
            send_and_wait(server, client)
    wait_until(lambda: server.metric("mlmkit_queue_tokens") == 0)
    assert server.metric("mlmkit_batch_rows_sum") - before[0] < 5 * 620
    wait_until(lambda: server.metric("mlmkit_requests_in_flight") == 0)
    assert server.metric(left) - before[1] == 5


def test_clients_that_stall_block_nobody(server):
    with server.connect() as head, server.connect() as body, server.connect() as deaf:
        head.sendall(b"POST /fill-mask HT")
        body.sendall(SHORT[:-5])
        texts = ["The [MASK] is " + "a " * 50 + "[MASK] " * 8] * 64
        deaf.sendall(encode(FILL, {"inputs": texts, "parameters": {"top_k": 100}}))  # megabytes, never read
        for _ in range(20):
            start = time.monotonic()
            assert server.ask(FILL, {"inputs": "The [MASK]"}).status == 200
            assert time.monotonic() - start < 10


def test_slow_heads_are_closed_and_slow_bodies_get_408(artifact):
    patient = "import mlmkit.serve.protocol as p; p.HEAD_SECONDS = 0.5"
    with running(artifact("bert"), "--deadline", "1", before=patient) as server:
        clients = [server.connect() for _ in range(50)]
        for client in clients[:25]:
            client.sendall(b"POST /fill-mask HTTP/1.1\r\nHost: localhost\r\n")
        body = server.connect()
        body.sendall(SHORT[:-5])
        for _ in range(12):  # single bytes do not extend the deadline
            time.sleep(0.1)
            for client in clients[:25]:
                try:
                    client.sendall(b"X")
                except OSError:
                    break
        assert all(_is_closed(client) for client in clients)
        assert read(body).error == (408, "body_too_slow")
        with server.connect() as large:
            large.sendall(b"GET / HTTP/1.1\r\n")
            with pytest.raises(OSError):
                for _ in range(100):
                    large.sendall(b"X-Filler: " + b"a" * 4000 + b"\r\n")
                    time.sleep(0.001)
        assert server.ask("/health").status == 200


def test_a_head_behind_a_request_that_waits_is_bounded_too(server):
    with server.connect() as client:
        send_and_wait(server, client)
        with pytest.raises(OSError):
            client.sendall(b"GET / HTTP/1.1\r\n" + b"X-Filler: " + b"a" * 50_000_000)


def test_the_client_of_a_large_body_gets_the_error(server):
    """The rest of the body arrives after the answer; closing the connection then would discard the answer."""
    body = b'{"inputs": "' + b"a" * 1_900_000 + b'"}'
    request = encode(FILL, {}).replace(b"Content-Length: 2", b"Content-Length: %d" % len(body))[:-2]
    for _ in range(10):
        with server.connect() as client:
            client.sendall(request.replace(b"127.0.0.1", b"rebound.example"))
            assert read(client).status == 403
            client.sendall(body)
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert client.makefile("rb").read().count(b"HTTP/1.1 200") == 1


def _is_closed(client: socket.socket) -> bool:
    client.settimeout(5)
    try:
        return client.recv(1) == b""
    except ConnectionError:
        return True


def test_a_request_past_its_deadline_gets_503_and_leaves_the_queue(artifact):
    with running(artifact("bert"), "--deadline", "0.05") as server:
        answer = server.ask("/score", {"inputs": ["a " * 62] * 16})
        assert (answer.error, answer.headers["retry-after"]) == ((503, "deadline_exceeded"), "1")
        wait_until(lambda: server.metric("mlmkit_queue_tokens") == 0)
        assert server.ask(FILL, ROUNDS).error == (503, "deadline_exceeded")
        wait_until(lambda: server.metric("mlmkit_queue_tokens") == 0)
        assert server.ask(FILL, {"inputs": "The [MASK]"}).status == 200


def test_text_threads_stop_when_their_request_is_abandoned(artifact):
    # 390,400 candidates take many seconds to write
    body = {"inputs": ["[MASK] " * 61] * 64, "parameters": {"top_k": 100}}
    options = ["--deadline", "2", "--drain", "1", "--max-candidates", "1000000"]
    with running(artifact("bert"), *options) as server, server.connect() as other:
        other.sendall(encode(FILL, body))  # it occupies one of the two threads
        assert server.ask(FILL, body).json["error_type"] == "deadline_exceeded"
        assert server.ask("/score", {"inputs": "The"}).status == 200
        start = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - start < 6


def test_a_thousand_connections_at_once_are_answered_or_refused(server):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))

    async def one() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(SHORT)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        body = await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r\n", 1)[0]))
        if head.split()[1] == b"429":
            assert json.loads(body)["error_type"] == "overloaded"
            assert b"retry-after: " in head
        writer.close()
        return int(head.split()[1])

    async def burst() -> list[int]:
        return await asyncio.gather(*(one() for _ in range(1000)))

    try:
        statuses = asyncio.run(burst())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 512
    assert server.ask("/ready").status == 200


def test_overload_gives_only_429_and_memory_does_not_grow(artifact):
    """A short form of `benchmarks/serve_load.py --mixed`."""
    requests = [SHORT, LONG, encode(FILL, {"inputs": ["The [MASK] is " + "a " * 50] * 8})]
    with running(artifact("bert"), "--max-requests", "12", "--max-queue-tokens", "70000") as server:
        asyncio.run(run(server.port, requests, 24, 1.0, patience=0.02))
        before = _resident(server)
        seen = asyncio.run(run(server.port, requests, 24, 2.5, patience=0.02))
        assert set(seen["statuses"]) == {"200", "429"}, seen
        assert _resident(server) < before + 64
        assert server.metric("mlmkit_queue_tokens") == 0


def test_memory_is_bounded_for_any_lengths_and_number_of_scores(checkpoint, tmp_path):
    """Logits take the most memory of a call: a request here asks for 2,000 x 30,000 of them, 229 MiB."""
    from transformers import AutoModelForMaskedLM

    large = tmp_path / "large"
    network = AutoModelForMaskedLM.from_pretrained(checkpoint("bert"))
    network.resize_token_embeddings(30_000)
    network.save_pretrained(large)
    for name in FILES:
        (large / name).write_bytes((checkpoint("bert") / name).read_bytes())
    export(str(large), tmp_path / "artifact", text=ProofText("a few paragraphs", paragraphs()[:10]))
    with running(tmp_path / "artifact") as server:
        before = _resident(server)
        for length in (7, 18, 41, 64):
            row, positions = np.ones((1, length), int), np.ones(2000, int)
            inputs = tensors(row, row, positions, positions)
            outputs = [{"name": "log_prob"}]
            assert server.ask("/v2/models/artifact/infer", {"inputs": inputs, "outputs": outputs}).status == 200
        assert _resident(server) < before + 256  # MiB


def test_memory_is_returned_when_all_requests_are_answered(artifact):
    """After answers of 63 MB, glibc, ONNX Runtime and the batcher together once kept 400 MiB."""
    rows, positions = np.ones((64, 64), int), np.ones(25_000, int)
    body = {"inputs": tensors(rows, rows, positions, positions)}
    with running(artifact("bert"), before="import mlmkit.serve.service as s; s.TRIM_INTERVAL_SECONDS = 0.5") as server:
        server.ask(FILL, {"inputs": "The [MASK]"})
        before = _resident(server)
        for _ in range(2):
            assert len(server.ask("/v2/models/bert/infer", body).body) > 50_000_000
        wait_until(lambda: _resident(server) < before + 64)


def _resident(server: Server) -> float:
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


BROKEN = (
    "import mlmkit.serve.batcher as b; take, calls = b.Batcher._take_rows, [0, 1]; "
    "b.Batcher._take_rows = lambda self: (take(self), 1 / len(calls), calls.pop())[0]"
)  # the third call divides by zero; the first is made at the start


def test_a_dead_batcher_ends_the_process(artifact):
    with running(artifact("bert"), before=BROKEN) as server:
        assert server.ask(FILL, {"inputs": "The [MASK]"}).status == 200
        assert server.ask(FILL, {"inputs": "The [MASK]"}).json["error_type"] == "internal_error"
        assert server.process.wait(30) == 1
        assert "the batcher died" in server.log
        assert server.log.splitlines()[-1].startswith("mlmkit: the server did not start, or its batcher died")
