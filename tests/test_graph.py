"""The ONNX graph, read and cut without the onnx package."""

import random

import pytest

from mlmkit.backends.graph import NESTED, drop_outputs, read_graph


def test_scoring_graph_has_lost_the_top_k(artifact):
    import onnx

    path = artifact("bert") / "model.onnx"
    whole = onnx.load(path)
    pruned = onnx.load_from_string(drop_outputs(path.read_bytes(), {"top_log_prob", "top_id"}))
    onnx.checker.check_model(pruned)
    assert [output.name for output in pruned.graph.output] == ["log_prob", "rank"]
    operators = {node.op_type for node in pruned.graph.node}
    assert "TopK" not in operators
    assert "TopK" in {node.op_type for node in whole.graph.node}
    kept = {node.name for node in pruned.graph.node}
    assert [node for node in whole.graph.node if node.name in kept] == list(pruned.graph.node)
    assert [i.name for i in pruned.graph.input] == ["input_ids", "attention_mask", "positions", "targets"]
    assert drop_outputs(path.read_bytes(), set()) == path.read_bytes()


def test_pruning_keeps_what_a_subgraph_reads():
    from onnx import TensorProto, helper

    def value(name, kind=TensorProto.FLOAT):
        return helper.make_tensor_value_info(name, kind, [1])

    branch = helper.make_graph([helper.make_node("Neg", ["inner"], ["y"])], "branch", [], [value("y")])
    nodes = [
        helper.make_node("Abs", ["x"], ["inner"]),
        helper.make_node("Exp", ["x"], ["unused"]),
        helper.make_node("If", ["condition"], ["kept"], then_branch=branch, else_branch=branch),
        helper.make_node("Sqrt", ["unused"], ["dropped"]),
    ]
    inputs = [value("x"), value("condition", TensorProto.BOOL)]
    graph = helper.make_graph(nodes, "graph", inputs, [value("kept"), value("dropped")])
    import onnx

    pruned = onnx.load_from_string(drop_outputs(helper.make_model(graph).SerializeToString(), {"dropped"}))
    assert [node.op_type for node in pruned.graph.node] == ["Abs", "If"]


@pytest.mark.parametrize("junk", [b"\x07", b"\x3a\xff", b"\xff" * 12])
def test_what_is_no_protobuf_is_refused(junk):
    with pytest.raises(ValueError, match="not a protobuf"):
        drop_outputs(junk, set())


def test_the_table_of_nested_messages_is_that_of_onnx():
    import onnx

    messages, waiting = {}, [onnx.ModelProto.DESCRIPTOR]
    while waiting:
        message = waiting.pop()
        if message.name not in messages:
            messages[message.name] = message
            waiting += [field.message_type for field in message.fields if field.message_type]
    holders = {"TensorProto"}
    while True:
        more = {
            name
            for name, message in messages.items()
            if any(field.message_type and field.message_type.name in holders for field in message.fields)
        }
        if more <= holders:
            break
        holders |= more
    assert {
        name: {
            field.number: field.message_type.name
            for field in messages[name].fields
            if field.message_type and field.message_type.name in holders
        }
        for name in holders
    } == NESTED


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_a_graph_reads_as_onnx_reads_it(kind, artifact):
    import onnx

    path = artifact(kind) / "model.onnx"
    expected, found = onnx.load(path), read_graph(path.read_bytes())
    assert found.opset == expected.opset_import[0].version == 20
    assert sum(found.operators.values()) == len(expected.graph.node)
    assert set(found.operators) == {node.op_type for node in expected.graph.node}
    for values, theirs in ((found.inputs, expected.graph.input), (found.outputs, expected.graph.output)):
        assert {name: value.shape for name, value in values.items()} == {
            value.name: tuple(axis.dim_value or None for axis in value.type.tensor_type.shape.dim) for value in theirs
        }
    assert found.inputs["targets"].type == found.outputs["rank"].type == "int64"
    assert found.outputs["top_log_prob"].type == "float32"
    assert found.external == set()


def test_mutated_bytes_raise_nothing_but_value_errors(artifact):
    original = (artifact("bert") / "model.onnx").read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(300):
        content = bytearray(original[: generator.choice([len(original), generator.randrange(len(original))])])
        for _ in range(generator.choice([1, 3, 30])):
            content[generator.randrange(len(content))] = generator.randrange(256)
        try:
            read_graph(bytes(content))
            drop_outputs(bytes(content), {"top_log_prob", "top_id"})
        except ValueError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("junk", [b"", b"\x3a\x00\x3a\x00", b"\xff" * 11 + b"\x01"])
def test_what_is_no_model_is_refused(junk):
    with pytest.raises(ValueError, match=r"not a.* (model|protobuf)"):
        read_graph(junk)


def test_endless_nesting_is_refused():
    def field(number: int, content: bytes) -> bytes:
        length = len(content)
        return bytes([number << 3 | 2, length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14]) + content

    graph = b""
    for _ in range(200):  # graph → node → attribute → graph
        graph = field(1, field(5, field(6, graph)))
    with pytest.raises(ValueError, match="nested too deeply"):
        read_graph(field(7, graph))
