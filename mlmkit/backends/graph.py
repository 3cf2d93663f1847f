"""Taking outputs off an ONNX graph, without the onnx package.

ONNX Runtime computes every output that a graph declares, whether or not `run` asks for it (measured: top-k costs the
same either way), and the base install has no onnx. So this walks the protobuf wire format for the few fields it needs
and copies the rest as it stands. Field numbers: onnx.proto, https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

from collections.abc import Iterator

MODEL_GRAPH = 7
GRAPH_NODE, GRAPH_OUTPUT = 1, 12
NODE_INPUT, NODE_OUTPUT, NODE_ATTRIBUTE = 1, 2, 5
ATTRIBUTE_GRAPH, ATTRIBUTE_GRAPHS = 6, 11
VALUE_NAME = 1

VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5


def drop_outputs(model: bytes, names: set[str]) -> bytes:
    """The serialized ModelProto without these graph outputs and without the nodes that only they needed.

    Raises `ValueError` for bytes that are no protobuf message.
    """
    parts: list[bytes | memoryview] = []
    for number, whole, content in _fields(memoryview(model)):
        parts.append(_field(MODEL_GRAPH, _prune(content, names)) if number == MODEL_GRAPH else whole)
    return b"".join(parts)


def _prune(graph: memoryview, names: set[str]) -> bytes:
    fields = [
        field
        for field in _fields(graph)
        if not (field[0] == GRAPH_OUTPUT and _strings(field[2], VALUE_NAME)[0] in names)
    ]
    needed = {_strings(content, VALUE_NAME)[0] for number, _, content in fields if number == GRAPH_OUTPUT}
    kept: list[memoryview] = []
    # Nodes are in topological order, so one pass from the last finds all that is still needed.
    for number, whole, content in reversed(fields):
        if number == GRAPH_NODE:
            if needed.isdisjoint(_strings(content, NODE_OUTPUT)) and not _has_subgraph(content):
                continue
            needed.update(_strings(content, NODE_INPUT))
            needed.update(_names_in_subgraphs(content))
        kept.append(whole)
    return b"".join(reversed(kept))


def _names_in_subgraphs(node: memoryview) -> Iterator[str]:
    """What the nodes inside an If or Loop read, which may come from the graph around it."""
    for graph in _subgraphs(node):
        for number, _, content in _fields(graph):
            if number == GRAPH_NODE:
                yield from _strings(content, NODE_INPUT)
                yield from _names_in_subgraphs(content)
            elif number == GRAPH_OUTPUT:
                yield from _strings(content, VALUE_NAME)


def _has_subgraph(node: memoryview) -> bool:
    return next(_subgraphs(node), None) is not None


def _subgraphs(node: memoryview) -> Iterator[memoryview]:
    for number, _, attribute in _fields(node):
        if number == NODE_ATTRIBUTE:
            for inner, _, content in _fields(attribute):
                if inner in (ATTRIBUTE_GRAPH, ATTRIBUTE_GRAPHS):
                    yield content


def _strings(message: memoryview, wanted: int) -> list[str]:
    return [str(content, "utf-8") for number, _, content in _fields(message) if number == wanted]


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """(field number, the field with its tag, its content) of each field; the content of a number is empty."""
    position = 0
    while position < len(message):
        begin = position
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        content = message[:0]
        if wire == VARINT:
            _, position = _varint(message, position)
        elif wire == LENGTH_DELIMITED:
            length, position = _varint(message, position)
            content, position = message[position : position + length], position + length
        elif wire in (FIXED64, FIXED32):
            position += 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"not a protobuf message: wire type {wire}")
        if position > len(message):
            raise ValueError("not a protobuf message: a field goes beyond its end")
        yield number, message[begin:position], content


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value, shift = 0, 0
    while position < len(data):
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
    raise ValueError("not a protobuf message: it ends inside a number")


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    encoded = bytearray()
    for value in (number << 3 | LENGTH_DELIMITED, len(content)):
        while value > 0x7F:
            encoded.append(value & 0x7F | 0x80)
            value >>= 7
        encoded.append(value)
    return bytes(encoded) + content
