"""The server's answers, against transformers' pipeline, huggingface_hub's client and mlmkit's own API."""

import contextlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import numpy as np
import pytest
import schemathesis
from conftest import PORTUGUESE
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from serving import Server, tensors

from mlmkit.backends import Batch, load
from mlmkit.eval.score_texts import pseudo_log_likelihood
from mlmkit.fill import fill
from mlmkit.serve.examples import CARD_BYTES, read_example


@pytest.fixture(scope="module")
def server(served: Callable[..., Server]) -> Server:
    return served("bert")


UNCHECKED = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
TEXTS = ["The {} is", "A {} b {} c", "{}", f"{PORTUGUESE[0]} {{}}", "é {} ü, \u200b 😀 {} x"]
PARAMETERS = [{}, {"top_k": 3}, {"targets": ["the", "is", "the", "of"]}, {"targets": ["the", "is"], "top_k": 1}]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_fill_mask_equals_the_pipeline(kind, checkpoint, served):
    from transformers import pipeline

    pipe: Any = pipeline("fill-mask", model=str(checkpoint(kind)))
    texts = [text.replace("{}", pipe.tokenizer.mask_token) for text in TEXTS]
    for inputs, parameters in product([*texts, texts, texts[:1]], PARAMETERS):
        given: Any = served(kind).ask("/fill-mask", {"inputs": inputs, "parameters": parameters}).json
        expected = pipe(inputs, **parameters)
        assert strip(given) == strip(expected), (inputs, parameters)
        np.testing.assert_allclose(scores(given), scores(expected), atol=1e-4)


def strip(value: Any) -> Any:
    """Everything but the scores."""
    if isinstance(value, list):
        return [strip(item) for item in value]
    return {key: value[key] for key in ("token", "token_str", "sequence")}


def scores(value: Any) -> list[float]:
    return [score for item in value for score in scores(item)] if isinstance(value, list) else [value["score"]]


def test_fill_mask_answers_the_inference_client(server, monkeypatch):
    from huggingface_hub import InferenceClient, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    parameters = {"targets": ["the", "is"], "top_k": 2}
    expected = server.ask("/fill-mask", {"inputs": "The [MASK] is", "parameters": parameters}).json
    for client in (InferenceClient(base_url=server.url), InferenceClient(model=f"{server.url}/fill-mask")):
        candidates = client.fill_mask("The [MASK] is", **parameters)
        assert [item.token_str for item in candidates] == [item["token_str"] for item in expected]
        assert isinstance(candidates[0].score, float)


def test_a_target_of_several_tokens_is_ranked_by_its_first_and_counted_in_a_header(server, served):
    parameters = {"targets": ["thezzq", " of", ","]}
    answer = server.ask("/fill-mask", {"inputs": "A [MASK].", "parameters": parameters})
    assert {item["token_str"] for item in answer.json} == {"the", "of", ","}
    assert answer.headers["x-targets-replaced"] == "1"
    answer = served("roberta").ask("/fill-mask", {"inputs": "A <mask>.", "parameters": {"targets": " the"}})
    assert [item["token_str"] for item in answer.json] == [" the"]
    assert "x-targets-replaced" not in answer.headers


OPTIONS: list[dict[str, Any]] = [
    {"joint": True, "top_k": 3},
    {"targets": ["the", "exceptions raised", ",", "an"], "whole_targets": True},
    {"tokenizer_kwargs": {"truncation": True, "max_length": 24}},
    {"tokenizer_kwargs": {"truncation": True}, "joint": True, "top_k": 20},
]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_options_of_fill_are_those_of_the_library(kind, artifact, served):
    """Also when many clients ask at once, so that rounds of some requests share calls with rounds of others."""
    backend, server = load(str(artifact(kind))), served(kind)
    texts = [text.replace("{}", backend.tokenizer.mask_token) for text in (*TEXTS, f"a {{}} b {{}} {'c ' * 70}")]
    asked, expected = [], []
    for options in OPTIONS:
        own = texts if "tokenizer_kwargs" in options else texts[:-1]
        library = {name: value for name, value in options.items() if name != "tokenizer_kwargs"}
        library |= options.get("tokenizer_kwargs", {})
        lists = [fill(backend, text, **library) for text in own]
        answers = [masks[0] if len(masks) == 1 else masks for masks in lists]
        asked += [{"inputs": inputs, "parameters": options} for inputs in [*own, own]]
        expected += [*answers, answers]
    with ThreadPoolExecutor(16) as clients:
        given = list(clients.map(lambda body: server.ask("/fill-mask", body), asked * 3))
    for answer, wanted in zip(given, expected * 3, strict=True):
        assert answer.status == 200, answer.json
        assert comparable(answer.json) == comparable(wanted)
        np.testing.assert_allclose(scores(answer.json), scores(wanted), rtol=1e-4)


def comparable(value: Any) -> Any:
    """Everything but the scores and their logarithms."""
    if isinstance(value, list):
        return [comparable(item) for item in value]
    return {key: item for key, item in value.items() if key not in ("score", "log_prob")}


def test_truncated_texts_are_counted_in_a_header(server):
    long, cut = "a [MASK] " + "b " * 70, {"tokenizer_kwargs": {"truncation": True}}
    answer = server.ask("/fill-mask", {"inputs": [long, "a [MASK]", long], "parameters": cut})
    assert (answer.status, answer.headers["x-texts-truncated"]) == (200, "2")
    assert "x-texts-truncated" not in server.ask("/fill-mask", {"inputs": "a [MASK]", "parameters": cut}).headers
    refused = server.ask("/fill-mask", {"inputs": long})
    assert (refused.error, "allow truncation" in refused.json["error"]) == ((422, "text_too_long"), True)


@pytest.mark.parametrize("variant", ["original", "within-word"])
def test_score_equals_the_library(variant, artifact, served):
    server = served("roberta")
    texts = ["The statement raises an exception.", "x", *PORTUGUESE, "a < b && <b>😀</b> [MASK]", ""]
    expected = pseudo_log_likelihood(load(str(artifact("roberta"))), texts, variant=variant)
    parameters = {"pll": variant, "per_token": True}
    answers = server.ask("/score", {"inputs": texts, "parameters": parameters}).json
    for text, answer, wanted in zip(texts[:-1], answers[:-1], expected[:-1], strict=True):
        assert answer["pseudo_log_likelihood"] == pytest.approx(wanted.pseudo_log_likelihood, abs=1e-4)
        assert [token["token"] for token in answer["per_token"]] == wanted.token_ids.tolist()
        np.testing.assert_allclose([token["log_prob"] for token in answer["per_token"]], wanted.log_prob, atol=1e-5)
        perplexity = float(np.exp(-np.mean(wanted.log_prob, dtype=np.float64)))
        assert answer["pseudo_perplexity"] == pytest.approx(perplexity, rel=1e-4)
        assert all(0 <= token["start"] < token["end"] <= len(text) for token in answer["per_token"])
    # no token, so no score
    assert {answers[-1][name] for name in ("pseudo_log_likelihood", "pseudo_perplexity")} == {None}
    assert (answers[-1]["per_token"], expected[-1].log_prob.size) == ([], 0)
    single = server.ask("/score", {"inputs": texts[0], "parameters": parameters}).json
    assert single["tokens"] == len(expected[0].token_ids)
    assert "per_token" not in server.ask("/score", {"inputs": "a"}).json


@pytest.mark.parametrize(
    ("kind", "text"),
    [("bert", "The  statement, (a value) of it."), ("roberta", " The  rat’s café, naïve 😀👍🏽 rato\n")],
)
def test_spans_cover_the_text(kind, text, served):
    tokens = served(kind).ask("/score", {"inputs": text, "parameters": {"per_token": True}}).json["per_token"]
    end = 0
    for token in tokens:
        assert token["start"] >= end or token["end"] == end  # pieces of one character share its span
        assert not text[end : token["start"]].strip()
        end = token["end"]
    assert not text[end:].strip()


# ---------------------------------------------------------------- the raw graph


@pytest.fixture
def graph_batch() -> Batch:
    ids = np.array([[2, 4, 90, 3, 0], [2, 17, 4, 33, 3]])
    mask = (np.arange(5) < [[4], [5]]).astype(np.int64)
    return Batch(ids, mask, np.array([7, 1, 2]), np.array([5, 6, 90]))  # rows out of order


def test_infer_equals_the_backend(artifact, server, graph_batch):
    expected = load(str(artifact("bert"))).score(graph_batch)
    for path in ("/v2/models/bert/infer", "/v2/models/bert/versions/1/infer"):
        answer = server.ask(path, {"id": "7", "inputs": tensors(*graph_batch)}).json
        assert (answer["model_name"], answer["id"]) == ("bert", "7")
        for output in answer["outputs"]:
            wanted = getattr(expected, output["name"])
            values = np.array(output["data"]).reshape(output["shape"])
            assert values.shape == wanted.shape
            np.testing.assert_allclose(values, wanted, atol=1e-5)


def test_infer_speaks_binary_tensors(artifact, server, graph_batch):
    expected = load(str(artifact("bert"))).score(graph_batch)
    described, blob = tensors(*graph_batch), b""
    for tensor, values in zip(described, graph_batch, strict=True):
        raw = values.astype("<i8").tobytes()
        del tensor["data"]
        tensor["parameters"] = {"binary_data_size": len(raw)}
        blob += raw
    outputs = [{"name": "top_id"}, {"name": "log_prob", "parameters": {"binary_data": False}}]
    head = json.dumps({"inputs": described, "outputs": outputs, "parameters": {"binary_data_output": True}}).encode()
    length = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    answer = server.ask("/v2/models/bert/infer", head + blob, **length)
    size = int(answer.headers["inference-header-content-length"])
    top, log_prob = json.loads(answer.body[:size])["outputs"]
    assert top["parameters"]["binary_data_size"] == len(answer.body) - size
    values = np.frombuffer(answer.body[size:], "<i8").reshape(top["shape"])
    np.testing.assert_array_equal(values, expected.top_id)
    np.testing.assert_allclose(log_prob["data"], expected.log_prob, atol=1e-5)


def test_infer_needs_json_or_the_protocols_header(server, graph_batch):
    body = json.dumps({"inputs": tensors(*graph_batch)}).encode()
    for kind in ("text/plain", "application/octet-stream"):
        answer = server.ask("/v2/models/bert/infer", body, **{"Content-Type": kind})
        assert answer.error == (415, "unsupported_media_type")
    length = {"Inference-Header-Content-Length": str(len(body)), "Content-Type": "application/octet-stream"}
    assert server.ask("/v2/models/bert/infer", body, **length).status == 200
    assert "bytes follow" in server.ask("/v2/models/bert/infer", body + b"12345678", **length).json["error"]


def test_the_model_is_described(server):
    assert server.ask("/v2").json["name"] == "mlmkit"
    assert server.ask("/v2/health/live").json == {"live": True}
    assert server.ask("/v2/models/bert/ready").json == {"name": "bert", "ready": True}
    described = server.ask("/v2/models/bert").json
    assert {item["name"]: item["shape"] for item in described["outputs"]}["top_id"] == [-1, 100]
    assert server.ask("/v2/models/other").json["error_type"] == "no_such_model"


def change(name: str, /, **values: Any) -> Callable[[list[dict[str, Any]]], None]:
    def apply(inputs: list[dict[str, Any]]) -> None:
        next(item for item in inputs if item["name"] == name).update(values)

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("input_ids", data=[600] * 10), "input_ids must be from 0 to 599"),
        (change("targets", data=[-1, 0, 0]), "targets must be from 0 to 599"),
        (change("positions", data=[0, 1, 10]), "positions must be from 0 to 9"),
        (change("positions", shape=[4]), "positions has 3 values, which do not fit the shape [4]"),
        (change("positions", data=[0.5, 1, 2]), "Input should be a valid integer"),
        (change("positions", data=[[1], [2, 3]]), "must be whole numbers"),
        (change("input_ids", shape=[2, 5], data=[2**80] * 10), "must be whole numbers"),
        (change("positions", data=["1" * 900_000] + ["1"] * 9_000), "Input should be a valid integer"),
        (change("input_ids", shape=[0, 1 << 62], data=[]), "Input should be less than"),
        (change("targets", shape=[3, 1]), "targets has 1 axes, not 2"),
        (change("targets", parameters={"binary_data_size": 80}), "binary_data_size is 80, but 0 bytes are left"),
        (change("targets", parameters={"binary_data_size": 12}), "binary_data_size: Input should be a multiple of 8"),
        (change("targets", name="words"), "inputs.3.name: Input should be 'input_ids', 'attention_mask'"),
        (change("input_ids", datatype="FP32"), "Input should be 'INT64'"),
        (lambda inputs: inputs.pop(), "each once, not input_ids, attention_mask, positions"),
        (lambda inputs: inputs.append(inputs[0]), "each once"),
    ],
)
def test_infer_refuses_invalid_tensors(damage, message, server, graph_batch):
    inputs = tensors(*graph_batch)
    damage(inputs)
    answer = server.ask("/v2/models/bert/infer", {"inputs": inputs})
    assert (answer.status, message in answer.json["error"]) == (422, True), answer.json


def test_infer_refuses_an_output_named_twice(server, graph_batch):
    outputs = [{"name": "top_id"}] * 2
    answer = server.ask("/v2/models/bert/infer", {"inputs": tensors(*graph_batch), "outputs": outputs})
    assert answer.error == (422, "invalid_tensor")


# ---------------------------------------------------------------- information about the server


def test_info_metrics_and_documentation(artifact, server):
    info = server.ask("/info").json
    manifest = json.loads((artifact("bert") / "mlmkit.json").read_text())
    assert (info["fingerprint"], info["files"]) == (manifest["fingerprint"], manifest["files"])
    assert (info["backend"], info["device"], info["mask_token"]) == ("onnx", "cpu", "[MASK]")
    assert info["limits"]["text_tokens"] == 64
    before = {name: server.metric(name) for name in ("mlmkit_tokens_total", "mlmkit_batch_rows_count")}
    server.ask("/fill-mask", {"inputs": "The [MASK]"})
    assert server.metric("mlmkit_tokens_total") == before["mlmkit_tokens_total"] + 4
    assert server.metric("mlmkit_batch_rows_count") == before["mlmkit_batch_rows_count"] + 1
    page = server.ask("/metrics").body.decode()
    assert 'mlmkit_requests_total{endpoint="/fill-mask",status="200"}' in page
    assert "mlmkit_queue_tokens 0.0" in page
    pages = {"/docs": b"swagger-ui", "/static/swagger-ui-bundle.js": b"SwaggerUI", "/openapi.json": b"/fill-mask"}
    assert all(content in server.ask(path).body for path, content in pages.items())


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_the_document_describes_everything_and_its_requests_work(kind, served):
    server = served(kind)
    document = server.ask("/openapi.json").json
    assert f"**{kind}**" in document["info"]["description"]
    assert "securitySchemes" not in document["components"]
    asked = 0
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["summary"].endswith(".") and "security" not in operation
            values = {each["name"]: each["example"] for each in operation.get("parameters", [])}
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example")
            assert server.ask(path.format(**values), body).status == 200
            asked += body is not None
    assert asked == 4
    for name, schema in document["components"]["schemas"].items():
        undescribed = [field for field, it in schema["properties"].items() if "description" not in it]
        assert (schema["description"].endswith("."), undescribed) == (True, []), name


CARDS = {
    "": ("", ""),
    "---\nlanguage: [pt, en]\nwidget:\n- text: a [MASK]\n---\n": ("a [MASK]", ""),
    "---\nlanguage: pt\nwidget: [{src: a.png}, b, {text: [c]}]\n---\n": ("", "pt"),
    "---\nlanguage: no\nwidget: {text: 'd [MASK]'}\n---\n": ("d [MASK]", ""),  # YAML reads no as false
    '---\nlanguage: "\\uD800"\nwidget: [{text: "\\uD800 [MASK]"}, {text: "e\\nf [MASK]"}]\n---\n': ("e\nf [MASK]", ""),
    f"---\nlanguage: pt-BR\nwidget: {{text: '{'g' * 1000} [MASK]'}}\n---\n": ("", "pt-BR"),
    "---\nlanguage: [\n---\n": ("", ""),
    "---\n- a\n---\n": ("", ""),
    f"---\nlanguage: pt\n---\n{'a' * CARD_BYTES}": ("", ""),
}


@pytest.mark.parametrize("card", CARDS, ids=range(len(CARDS)))
def test_a_card_of_any_form_gives_an_example_or_none(card, tmp_path, caplog):
    (tmp_path / "README.md").write_text(card)
    example = read_example(tmp_path, "[MASK]")
    assert (example.text, example.language) == CARDS[card]
    assert ("cannot be read" in caplog.text) == card.endswith(("[\n---\n", "- a\n---\n", "aaa"))


def test_answers_carry_security_headers(server):
    for path in ("/", "/docs", "/health", "/nothing"):
        headers = server.ask(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
    policy = server.ask("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_to_a_documented_path_fails_the_server(mode, server):
    """For valid and invalid requests: no 5xx, and only documented statuses and forms of answers."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    asked = 0

    for result in schema.get_all_operations():
        operation: Any = result.ok()  # pyright: ignore[reportAttributeAccessIssue]
        try:
            strategy = operation.as_strategy(generation_mode=mode)
        except Unsatisfiable:  # a GET without parameters cannot be asked in a wrong way
            continue

        @given(case=strategy)
        @settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=UNCHECKED)
        def check(case: Any) -> None:
            nonlocal asked
            asked += 1
            checks = [not_a_server_error, status_code_conformance, response_schema_conformance]
            case.call_and_validate(checks=checks)

        with contextlib.suppress(Unsatisfiable):
            check()
    assert asked >= 100
