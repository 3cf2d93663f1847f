"""The Open Inference Protocol, version 2, over the raw scoring graph, with Triton's binary tensors.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

import json
import math
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, StrictInt, StrictStr

from mlmkit.backends import Batch, ModelInfo, Scored
from mlmkit.backends.graph import INPUTS, OUTPUTS
from mlmkit.serve.errors import ApiError, checked
from mlmkit.serve.limits import Limits

HEADER_LENGTH = "Inference-Header-Content-Length"
DATATYPES = {"int64": "INT64", "float32": "FP32"}
AXES = {name: axes for name, (_, axes) in INPUTS.items()}
VERSION = "1"  # the only one of the model
PIECE = 4096  # numbers written at once, some 5 ms: meanwhile nothing else runs, and an answer may hold 5 million


Integers = Annotated[list[StrictInt], Field(fail_fast=True)]


class InputTensor(BaseModel):
    """`data` is flat or nested, row-major; with `parameters.binary_data_size` it follows the JSON as bytes."""

    name: StrictStr
    shape: Annotated[list[Annotated[StrictInt, Field(ge=0, lt=1 << 31)]], Field(fail_fast=True)]
    datatype: Literal["INT64"]
    data: Integers | Annotated[list[Integers], Field(fail_fast=True)] | None = None
    parameters: dict[str, Any] | None = None


class OutputRequest(BaseModel):
    """An output that is wanted; `parameters.binary_data` asks for it as bytes."""

    name: StrictStr
    parameters: dict[str, Any] | None = None


class InferRequest(BaseModel):
    """An inference over the scoring graph's four inputs."""

    inputs: Annotated[list[InputTensor], Field(fail_fast=True)]
    id: StrictStr | None = None
    outputs: Annotated[list[OutputRequest], Field(fail_fast=True)] | None = None
    parameters: dict[str, Any] | None = None


class OutputTensor(BaseModel):
    """One output."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Any] | None = None
    parameters: dict[str, Any] | None = None


class InferAnswer(BaseModel):
    """What the graph computed."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


class TensorMetadata(BaseModel):
    """An input or output; -1 for an axis of any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """The scoring graph as the protocol describes a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


def metadata(name: str, info: ModelInfo, platform: str) -> ModelMetadata:
    """The description of the served model."""
    shapes = {"top_log_prob": [-1, info.top_k], "top_id": [-1, info.top_k]}
    tensors = [
        [TensorMetadata(name=key, datatype=DATATYPES[kind], shape=shapes.get(key, [-1] * axes))
         for key, (kind, axes) in table.items()]
        for table in (INPUTS, OUTPUTS)
    ]  # fmt: skip
    return ModelMetadata(name=name, versions=[VERSION], platform=platform, inputs=tensors[0], outputs=tensors[1])


def read_request(body: bytes, header_length: str | None, limits: Limits) -> tuple[InferRequest, Batch]:
    """The request and its batch. Raises `ApiError` for what is not one of the protocol."""
    size = len(body)
    if header_length is not None:
        size = int(header_length[:20]) if header_length.isascii() and header_length.isdigit() else -1
        if not 0 <= size <= len(body):
            raise ApiError(400, "bad_header_length", f"{HEADER_LENGTH} must say how many bytes of JSON the body has")
    numbers = 2 * (min(limits.texts * limits.text_tokens, limits.queue_tokens) + limits.candidates)
    request = checked(InferRequest, body[:size], numbers)
    arrays, rest = {}, body[size:]
    for tensor in request.inputs:
        if tensor.name not in AXES or tensor.name in arrays:
            raise _bad(f"the inputs are {', '.join(AXES)}, each once, not {tensor.name[:40]!r}")
        array, rest = _array(tensor, rest)
        arrays[tensor.name] = array
    if rest:
        raise _bad(f"{len(rest)} bytes follow the last tensor")
    if missing := [name for name in AXES if name not in arrays]:
        raise _bad(f"the input {missing[0]} is missing")
    wanted: set[str] = set()
    for output in request.outputs or []:
        if output.name not in OUTPUTS or output.name in wanted:
            raise _bad(f"the outputs are {', '.join(OUTPUTS)}, each once, not {output.name[:40]!r}")
        wanted.add(output.name)
    return request, Batch(**arrays)


def check_batch(batch: Batch, info: ModelInfo, limits: Limits) -> None:
    """Raise `ApiError` for what the graph cannot take: ONNX Runtime would fail, or read what it should not."""
    rows, seq = batch.input_ids.shape
    if batch.attention_mask.shape != batch.input_ids.shape or batch.targets.shape != batch.positions.shape:
        raise _bad("attention_mask must have the shape of input_ids, and targets that of positions")
    if rows > limits.texts:
        raise ApiError(413, "too_many_texts", f"{rows} rows are more than {limits.texts}: send several requests")
    if len(batch.positions) > limits.candidates:
        message = f"{len(batch.positions)} positions are more than {limits.candidates}: send several requests"
        raise ApiError(413, "too_many_candidates", message)
    if not 0 < seq <= limits.text_tokens:
        raise ApiError(422, "text_too_long", f"rows must have 1 to {limits.text_tokens} tokens, not {seq}")
    for name, values, end in (
        ("input_ids", batch.input_ids, info.vocabulary_size),
        ("targets", batch.targets, info.vocabulary_size),
        ("positions", batch.positions, rows * seq),
        ("attention_mask", batch.attention_mask, 2),
    ):
        if values.size and (values.min() < 0 or values.max() >= end):
            raise _bad(f"{name} must be from 0 to {end - 1}")


def gather(batch: Batch, predicted: dict[int, Scored], top_k: int) -> Scored:
    """The graph's outputs in the order of the request's positions, from those of its rows that have any."""
    rows = batch.positions // batch.input_ids.shape[1]
    order = np.argsort(np.argsort(rows, kind="stable"))
    if not predicted:
        nothing = np.zeros(0, np.float32), np.zeros(0, np.int64)
        return Scored(*nothing, np.zeros((0, top_k), np.float32), np.zeros((0, top_k), np.int64))
    parts = zip(*(predicted[row] for row in sorted(predicted)), strict=True)
    return Scored(*(np.concatenate(part)[order] for part in parts))


def write_answer(name: str, request: InferRequest, predicted: Scored) -> tuple[bytes, dict[str, str]]:
    """The body and its headers: JSON, or JSON and then bytes where the request asks for these."""
    found = predicted._asdict()
    all_binary = bool((request.parameters or {}).get("binary_data_output"))
    wanted = request.outputs or [OutputRequest(name=output) for output in OUTPUTS]
    tensors, blobs = [], []  # JSON, and the bytes behind it
    for output in wanted:
        values = np.ascontiguousarray(found[output.name])
        tensor: dict[str, Any] = {
            "name": output.name,
            "shape": list(values.shape),
            "datatype": DATATYPES[str(values.dtype)],
        }
        if (output.parameters or {}).get("binary_data", all_binary):
            blobs.append(values.astype(values.dtype.newbyteorder("<")).tobytes())
            tensor["parameters"] = {"binary_data_size": len(blobs[-1])}
        tensors.append(json.dumps(tensor).encode())
        if "parameters" not in tensor:
            pieces = np.array_split(values.ravel(), values.size // PIECE + 1)
            data = b", ".join(json.dumps(piece.tolist())[1:-1].encode() for piece in pieces)
            tensors[-1] = b'%s, "data": [%s]}' % (tensors[-1][:-1], data)
    answer = {"model_name": name, "model_version": VERSION} | ({} if request.id is None else {"id": request.id})
    head = b'%s, "outputs": [%s]}' % (json.dumps(answer).encode()[:-1], b", ".join(tensors))
    if not blobs:
        return head, {"Content-Type": "application/json"}
    return b"".join([head, *blobs]), {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(head))}


def _array(tensor: InputTensor, rest: bytes) -> tuple[NDArray[np.int64], bytes]:
    """A tensor's values, and the bytes behind them."""
    if len(tensor.shape) != AXES[tensor.name]:
        raise _bad(f"{tensor.name} has {AXES[tensor.name]} axes, not {len(tensor.shape)}")
    size = (tensor.parameters or {}).get("binary_data_size")
    if size is None:
        try:
            values = np.array(tensor.data or [])
        except (ValueError, OverflowError):
            values = np.array(["ragged"])
        if values.size and (values.dtype.kind not in "iu" or values.max() > np.iinfo(np.int64).max):
            raise _bad(f"the data of {tensor.name} must be whole numbers of 64 bits")
        values = values.astype(np.int64).ravel()
    else:
        if type(size) is not int or size % 8 or not 0 <= size <= len(rest):
            raise _bad(f"{tensor.name}: binary_data_size must be the bytes of its INT64 values")
        values, rest = np.frombuffer(rest[:size], dtype="<i8").astype(np.int64), rest[size:]
    if math.prod(tensor.shape) != values.size:
        raise _bad(f"{tensor.name} has {values.size} values, which are not of shape {tensor.shape[:4]}")
    return values.reshape(tensor.shape), rest


def _bad(message: str) -> ApiError:
    return ApiError(422, "invalid_tensor", message)
