"""The server's errors and logs: invalid and large requests, tokens, and options of the command."""

import socket
from collections.abc import Callable
from typing import Any

import pytest
from conftest import process, refusal
from pydantic import ValidationError
from serving import Server, forked, running, tensors

from mlmkit.serve.kserve import InferRequest
from mlmkit.serve.schemas import FillMaskRequest, ScoreRequest

FILL, INFER = "/fill-mask", "/v2/models/bert/infer"


@pytest.fixture(scope="module")
def server(served: Callable[..., Server]) -> Server:
    options = "--max-texts 3 --max-tokens 30 --max-masks 4 --max-targets 2 --max-queue-tokens 500 "
    options += "--max-body-bytes 20000 --max-candidates 500"
    return served("bert", *options.split())


def deep(depth: int) -> bytes:
    return b'{"inputs": ' + b"[" * depth + b"]" * depth + b"}"


def masked(**parameters: Any) -> dict[str, Any]:
    return {"inputs": "[MASK]", "parameters": parameters}


@pytest.mark.parametrize(
    ("path", "body", "status", "error_type"),
    [
        *[(FILL, body, 400, "malformed_json") for body in (b"", b"{", b"nonsense", deep(5000))],
        (FILL, b'{"inputs": "\xff\xfe [MASK]"}', 400, "malformed_json"),
        (FILL, b'{"inputs": "a \\ud800 [MASK]"}', 400, "malformed_json"),
        *[(FILL, body, 422, "invalid_request") for body in (deep(50), b'{"inputs": NaN}', [], {})],
        *[(FILL, {"inputs": value}, 422, "invalid_request") for value in (None, 3, ["[MASK]", 3], {"a": 1})],
        *[(FILL, {"inputs": value}, 422, "no_mask") for value in ("no mask", "", ["[MASK]", "no mask"])],
        *[(FILL, masked(top_k=value), 422, "invalid_request") for value in (0, -1, 101, 10**30, "5", True)],
        (FILL, masked(topk=5), 422, "invalid_request"),
        (FILL, {"inputs": "[MASK]", "parameters": []}, 422, "invalid_request"),
        (FILL, masked(targets=[3]), 422, "invalid_request"),
        (FILL, masked(targets=["😀"]), 422, "unknown_target"),
        (FILL, masked(targets=[""]), 422, "unknown_target"),
        (FILL, masked(targets=["a", "b", "c"]), 422, "too_many_targets"),
        (FILL, {"inputs": ["[MASK]"] * 4}, 413, "too_many_texts"),
        (FILL, {"inputs": ["[MASK] [MASK]"] * 3, "parameters": {"top_k": 100}}, 413, "too_many_candidates"),
        (FILL, {"inputs": "[MASK] " + "a " * 40}, 422, "text_too_long"),
        (FILL, {"inputs": "[MASK] " * 5}, 422, "too_many_masks"),
        (FILL, {"inputs": "[MASK] " + "a " * 20_000}, 413, "body_too_large"),
        (FILL, {"inputs": "[MASK] " + "a " * 5_000_000}, 413, "body_too_large"),
        (FILL, masked(tokenizer_kwargs={"max_length": 8}), 422, "invalid_request"),
        (FILL, masked(tokenizer_kwargs={"truncation": True, "max_length": 31}), 422, "invalid_request"),
        (FILL, masked(tokenizer_kwargs={"truncation": "longest_first"}), 422, "invalid_request"),
        (FILL, masked(tokenizer_kwargs={"padding": True}), 422, "invalid_request"),
        (FILL, masked(whole_targets=True), 422, "invalid_request"),
        (FILL, masked(whole_targets=True, targets="the [MASK]"), 422, "unknown_target"),
        (FILL, masked(whole_targets=True, targets="a " * 29), 422, "text_too_long"),
        (FILL, masked(joint=True, targets="a"), 422, "invalid_request"),
        (FILL, {"inputs": "[MASK] " * 4, "parameters": {"joint": True, "top_k": 30}}, 413, "too_much_work"),
        (
            FILL,
            {"inputs": "[MASK] " * 4, "parameters": {"whole_targets": True, "targets": ["a " * 20]}},
            413,
            "too_much_work",
        ),
        (
            FILL,
            {"inputs": ["[MASK] [MASK]"] * 3, "parameters": {"joint": True, "top_k": 99}},
            413,
            "too_many_candidates",
        ),
        ("/score", {"inputs": []}, 422, "invalid_request"),
        ("/score", {"inputs": "a", "parameters": {"pll": "other"}}, 422, "invalid_request"),
        ("/score", {"inputs": "a", "parameters": {"per_token": "yes"}}, 422, "invalid_request"),
        ("/score", {"inputs": "a " * 40}, 422, "text_too_long"),
        ("/score", {"inputs": "a " * 28}, 413, "too_much_work"),
        ("/score", {"inputs": ["a"] * 4}, 413, "too_many_texts"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_request_gets_one_clear_line(path: str, body: Any, status: int, error_type: str, server: Server) -> None:
    assert server.ask(path, body).error == (status, error_type)


def test_characters_are_bounded_before_a_text_is_tokenised(server):
    """30 tokens of 100 characters each: no text of words and some spaces is refused."""
    long, target = "1.!" * 1001, {"targets": ["1.!" * 1001]}
    for path, body in (
        (FILL, {"inputs": long}),
        ("/score", {"inputs": long}),
        (FILL, {"inputs": "[MASK]", "parameters": target}),
    ):
        answer = server.ask(path, body)
        assert answer.error == (422, "text_too_long")
        assert "has 3003 characters, and at most 3000 are taken" in answer.json["error"]
    unknown = "ж" * 99
    for text in ("[MASK]" + " " * 2994, "[MASK] " + " ".join([unknown] * 27)):
        assert server.ask(FILL, {"inputs": text}).status == 200


def test_candidates_are_bounded_also_when_only_looked_up(served):
    server = served("bert", "--max-candidates", "100")
    body = {"inputs": "[MASK] " * 60, "parameters": {"top_k": 1, "targets": ["a", "b"]}}
    assert server.ask(FILL, body).error == (413, "too_many_candidates")
    inputs = tensors([[0]], [[0]], [0] * 101, [0] * 101)
    assert server.ask(INFER, {"inputs": inputs}).error == (413, "too_many_candidates")


def test_values_are_bounded_before_a_body_is_parsed(served):
    """Parsing makes an object of each while nothing else runs: 2 MB of lists stopped the server for a second."""
    server = served("bert", "--max-candidates", "5000")
    for value in ("[]", '""', '{"a": 0}', "0", "[0]"):
        many = f"[{f'{value},' * 40_000}{value}]"
        tensor = f'{{"name": "input_ids", "shape": [1, 1], "datatype": "INT64", "data": {many}}}'
        for path, body in (
            (FILL, f'{{"inputs": "[MASK]", "options": {{"a": {many}}}}}'),
            (FILL, f'{{"inputs": {many}}}'),
            (FILL, f'{{"inputs": "a", "x": {many}}}'),
            ("/score", f'{{"inputs": {many}}}'),
            (INFER, f'{{"inputs": [{tensor}]}}'),
        ):
            assert server.ask(path, body.encode()).error == (413, "too_many_values"), (path, value)
        texts = [(f'\\"{value},' * 6000)[:6000]] * 40  # values inside a text do not count
        assert server.ask("/score", {"inputs": texts}).error == (422, "text_too_long")


def test_messages_name_the_field_and_do_not_repeat_the_body(server):
    body = {"inputs": ["secret", 3], "parameters": {"top_k": "secret"}}
    message = server.ask(FILL, body).json["error"]
    assert message.startswith("inputs")
    assert "secret" not in message
    assert server.ask(FILL, {"inputs": 3}).json["error"] == (
        "inputs: Input should be a valid string, or: Input should be a valid array"
    )
    assert server.ask(FILL, b"{").json["error"].startswith("the body is not JSON in UTF-8, or nested too deeply: EOF")
    assert "[MASK]" in server.ask(FILL, {"inputs": "a"}).json["error"]


@pytest.mark.parametrize("read", [FillMaskRequest, ScoreRequest, InferRequest])
def test_validation_stops_at_the_first_errors(read):
    """A body of 2 MB with a million errors stopped the event loop for seconds and took a gigabyte."""
    body = b'{"inputs": [' + b"1," * 100_000 + b"1]}"
    with pytest.raises(ValidationError) as raised:
        read.model_validate_json(body)
    assert raised.value.error_count() < 10


def test_other_paths_methods_and_types(server):
    for path in ("/nothing", "/info/", "/static/../app.py", "/static/%2e%2e%2fapp.py"):
        assert server.ask(path).error == (404, "not_found")
    assert server.ask(FILL).error == (405, "method_not_allowed")
    assert server.ask("/info", {}).error == (405, "method_not_allowed")
    for kind in ("application/x-www-form-urlencoded", "text/plain", ""):
        answer = server.ask(FILL, b'{"inputs": "[MASK]"}', **{"Content-Type": kind})
        assert answer.error == (415, "unsupported_media_type")
    assert server.ask(FILL, {"inputs": "[MASK]"}, **{"Content-Type": "application/json; charset=utf-8"}).status == 200


def test_no_text_and_null_parameters_are_the_defaults(server):
    assert server.ask(FILL, {"inputs": []}).json == []
    plain = server.ask(FILL, {"inputs": "a [MASK]"}).json
    nulls = {"inputs": "a [MASK]", "parameters": {"top_k": None, "targets": None}, "options": {"use_cache": False}}
    assert server.ask(FILL, nulls).json == plain
    assert len(plain) == 5


def test_metrics_show_no_server_error_and_no_request_left(server):
    assert server.ask(FILL, {"inputs": "a [MASK]"}).status == 200
    page = server.ask("/metrics").body.decode()
    assert 'status="5' not in page
    assert server.metric("mlmkit_requests_in_flight") == 0
    assert server.metric("mlmkit_queue_tokens") == 0
    assert 'mlmkit_errors_total{endpoint="/fill-mask",error_type="no_mask"}' in page


# ---------------------------------------------------------------- token and logs


def test_with_a_token_only_probes_and_pages_are_open(artifact):
    with running(artifact("bert"), environment={"MLMKIT_TOKEN": "s3crét\n"}) as server:
        for path in ("/health", "/ready", "/docs", "/openapi.json", "/v2/health/ready"):
            assert server.ask(path).status == 200
        body = {"inputs": "a [MASK]"}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cr"}, {"Authorization": ""}):
            for path in ("/info", "/metrics", "/v2/models/bert"):
                assert server.ask(path, **headers).error == (401, "unauthorized")
            answer = server.ask(FILL, body, **headers)
            assert answer.error == (401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
            assert server.ask("/", body, **headers).status == 401
        right = {"Authorization": "bearer s3crét".encode().decode("latin-1")}
        assert server.ask(FILL, body, **right).status == 200
        assert "s3cr" not in server.log


def test_logs_hold_no_texts_unless_asked(server, served):
    body = {"inputs": "confidential [MASK]", "parameters": {"targets": ["confidentialzz"]}}
    for each, is_logged in ((server, False), (served("bert", "--log-texts"), True)):
        each.ask(FILL, body)
        each.ask(f"{FILL}?text=confidential", body)
        each.ask("/confidential")
        each.ask(FILL, b'{"inputs": "confidential')
        assert "POST /fill-mask 200" in each.log
        assert ("confidential" in each.log) == is_logged


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-tokens", "65"], "--max-tokens 65: the model takes at most 64"),
        (["--max-queue-tokens", "63"], "--max-queue-tokens 63 is too small for one text of 64 tokens"),
        (["--host", "256.1.1.1"], "cannot listen on 256.1.1.1, port 0"),
        (["--workers", "2"], "--workers no longer exists: start several servers"),
        (["--deadline", "nan"], "--deadline must be a number, not nan"),
        (["--drain", "inf"], "--drain must be a number, not inf"),
        (["--token", " "], "the token is blank"),
        (["--allow-host", "https://a"], "--allow-host https://a: give a host name without https:// and port"),
        (["--backend", "torch"], "is an artifact, which torch cannot run"),
    ],
    ids=str,
)
def test_wrong_options_end_in_one_line(options, message, artifact, capsys, monkeypatch):
    monkeypatch.setattr("mlmkit.serve.server._Server.run", lambda *_: pytest.fail("the server started"))
    assert message in refusal(capsys, "serve", artifact("bert"), "--port", "0", *options)


def test_a_taken_port_is_named(artifact):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        run = process("serve", artifact("bert"), "--port", port)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == f"mlmkit: cannot listen on 127.0.0.1, port {port}: Address already in use\n"


def test_a_checkpoint_is_served_with_torch(checkpoint, tmp_path):
    with forked(checkpoint("bert"), tmp_path) as server:
        info = server.ask("/info").json
        assert (info["backend"], info["files"]) == ("torch", None)
        assert len(server.ask(FILL, {"inputs": "The [MASK]"}).json) == 5
        assert server.ask("/score", {"inputs": "The"}).json["tokens"] == 1
