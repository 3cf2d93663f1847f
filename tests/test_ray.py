"""examples/ray_serve.py for real: Ray on loopback, many requests at once over HTTP. Skipped without ray[serve]."""

import importlib
import json
import os
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from local_ray import local_ray

from mlmkit.backends import load
from mlmkit.fill import fill

EXAMPLES = Path(__file__).parent.parent / "examples"
TEXTS = ["Return a [MASK] object.", "If the argument is [MASK], an exception is raised.", "the [MASK] of the [MASK]"]


@pytest.fixture(scope="module")
def address(artifact) -> Iterator[str]:
    serve: Any = pytest.importorskip("ray.serve", reason="ray has no wheel for this Python or system")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, str(EXAMPLES))
    example = importlib.import_module("ray_serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with local_ray():
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(example.app({"artifact": str(artifact("bert"))}))
            yield f"http://127.0.0.1:{port}/"
        finally:
            serve.shutdown()
            sys.path.remove(str(EXAMPLES))


def post(address: str, body: Any) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(address, json.dumps(body).encode(), timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_requests_at_once_get_the_answers_of_fill(address, artifact):
    backend = load(str(artifact("bert")))
    with ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(lambda text: post(address, {"inputs": text}), TEXTS * 8))
    for text, (status, answer) in zip(TEXTS * 8, answers, strict=True):
        assert status == 200
        lists = answer if isinstance(answer[0], list) else [answer]
        for masks, expected in zip(lists, fill(backend, text), strict=True):
            for candidate, wanted in zip(masks, expected, strict=True):
                assert candidate == {**wanted, "score": pytest.approx(wanted["score"], abs=1e-5)}


def test_parameters_and_mistakes(address, artifact):
    status, answer = post(address, {"inputs": TEXTS[0], "parameters": {"top_k": 2, "targets": ["a", "the"]}})
    expected = fill(load(str(artifact("bert"))), TEXTS[0], top_k=2, targets=["a", "the"])[0]
    assert (status, [one["token"] for one in answer]) == (200, [one["token"] for one in expected])
    for wrong in ({"inputs": "no mask"}, {"inputs": 3}, [], {}, {"inputs": TEXTS[0], "parameters": {"beam": 3}}):
        status, answer = post(address, wrong)
        assert status == 422, wrong
        assert answer["error_type"] == "invalid_request"
