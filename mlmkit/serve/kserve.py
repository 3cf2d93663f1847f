"""The Open Inference Protocol, version 2: the scoring graph itself, with JSON tensors or Triton's binary ones.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md

An inference: body -> `read_request` -> `check_batch` -> one batch per row -> `Batcher.score` -> `in_request_order` ->
`write_answer` -> body.
"""

import json
import math
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, Field, StrictInt, StrictStr

from mlmkit import __version__
from mlmkit.backends.protocol import INPUTS, OUTPUTS, Batch, ModelInfo, Scored
from mlmkit.serve.batcher import split_rows
from mlmkit.serve.bodies import json_body, parse_body
from mlmkit.serve.errors import ApiError
from mlmkit.serve.limits import Limits
from mlmkit.serve.schemas import BINARY, body_schema
from mlmkit.serve.service import Service
from mlmkit.tokenizer import Tokenizer

HEADER_LENGTH = "Inference-Header-Content-Length"
OCTETS = "application/octet-stream"
DATATYPES = {"int64": "INT64", "float32": "FP32"}
VERSION = "1"  # a model here has one version
JSON_NUMBERS = 4096  # per json.dumps, which holds the interpreter's lock for 5 ms; an answer may have 5 million


Integers = Annotated[list[StrictInt], Field(fail_fast=True)]


class Parameters(BaseModel):
    """Triton's binary data: parameters of an input, of an output, or of the request."""

    binary_data_size: Annotated[StrictInt, Field(ge=0, multiple_of=8)] | None = Field(
        default=None, description="Of an input: how many of the bytes after the JSON are its data."
    )
    binary_data: bool | None = Field(default=None, description="Of an output: send it as bytes.")
    binary_data_output: bool = Field(
        default=False,
        description="Of the request: send every output as bytes, unless its own `binary_data` says otherwise.",
    )


OptionalParameters = Annotated[Parameters, BeforeValidator(lambda value: {} if value is None else value)]


class InputTensor(BaseModel):
    """An input of the scoring graph."""

    name: Literal["input_ids", "attention_mask", "positions", "targets"] = Field(description="Which input it is.")
    shape: Annotated[list[Annotated[StrictInt, Field(ge=0, lt=1 << 31)]], Field(fail_fast=True)] = Field(
        description="The size of each axis."
    )
    datatype: Literal["INT64"] = Field(description="Always `INT64`.")
    data: Integers | Annotated[list[Integers], Field(fail_fast=True)] | None = Field(
        default=None,
        description="The values in row-major order, flat or nested. Without it, they follow the JSON as little-endian "
        "bytes.",
    )
    parameters: OptionalParameters = Field(
        default=Parameters(), description="How many bytes after the JSON are its data."
    )


class RequestedOutput(BaseModel):
    """An output to send."""

    name: Literal["log_prob", "rank", "top_log_prob", "top_id"] = Field(description="Which output it is.")
    parameters: OptionalParameters = Field(default=Parameters(), description="Whether to send it as bytes.")


class InferRequest(BaseModel):
    """One batch for the scoring graph: all four inputs, each once."""

    inputs: Annotated[list[InputTensor], Field(fail_fast=True)] = Field(description="The four inputs, in any order.")
    id: StrictStr | None = Field(default=None, description="Any string; the answer repeats it.")
    outputs: Annotated[list[RequestedOutput], Field(fail_fast=True)] | None = Field(
        default=None, description="The outputs to send. Default: all."
    )
    parameters: OptionalParameters = Field(default=Parameters(), description="Whether to send all outputs as bytes.")


class Tensor(BaseModel):
    """A tensor, or the description of one."""

    name: str = Field(description="Its name in the scoring graph.")
    datatype: str = Field(description="`INT64` or `FP32`.")
    shape: list[int] = Field(description="The size of each axis; -1 in a description stands for any size.")
    data: list[Any] | None = Field(default=None, description="The values in row-major order, flat.")
    parameters: dict[str, Any] | None = Field(
        default=None, description="`binary_data_size`, if its data follow as bytes."
    )


class InferAnswer(BaseModel):
    """The outputs of the scoring graph for one batch."""

    model_name: str = Field(description="The model's name.")
    model_version: str = Field(description="The model's version, always `1`.")
    id: str | None = Field(default=None, description="The `id` of the request.")
    outputs: list[Tensor] = Field(description="The requested outputs.")


class ServerMetadata(BaseModel):
    """The server, in the form of the Open Inference Protocol."""

    name: str = Field(description="Always `mlmkit`.")
    version: str = Field(description="The version of mlmkit.")
    extensions: list[str] = Field(description="Extensions of the protocol that the server supports.")


class ModelMetadata(BaseModel):
    """The inputs and outputs of the scoring graph."""

    name: str = Field(description="The model's name.")
    versions: list[str] = Field(description="The model's versions, always `1` alone.")
    platform: str = Field(description="What computes, such as `mlmkit_onnx`.")
    inputs: list[Tensor] = Field(description="The inputs of the scoring graph.")
    outputs: list[Tensor] = Field(description="The outputs of the scoring graph.")


def kserve_router(service: Service) -> APIRouter:
    """The protocol's routes."""
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])
    extra = body_schema(InferRequest, _example(service.backend.tokenizer), OCTETS)
    extra |= {"responses": {"200": {"content": {OCTETS: BINARY}}}}
    infer_options: dict[str, Any] = {"response_model": InferAnswer, "openapi_extra": extra}

    def check_model(name: str, version: str) -> None:
        if name != service.name or version != VERSION:
            raise ApiError(404, "no_such_model", f"this server has the model {service.name}, version {VERSION}")

    @router.get("")
    async def server() -> ServerMetadata:
        """The server's name, version and extensions of the protocol."""
        return ServerMetadata(name="mlmkit", version=__version__, extensions=["binary_tensor_data"])

    @router.get("/health/live")
    async def live() -> Response:
        """Whether the server is alive. If not, restart it."""
        return JSONResponse({"live": service.is_alive}, 200 if service.is_alive else 503)

    @router.get("/health/ready")
    async def ready() -> Response:
        """Whether the server accepts requests."""
        return JSONResponse({"ready": service.is_ready}, 200 if service.is_ready else 503)

    @router.get("/models/{name}/ready")
    @router.get("/models/{name}/versions/{version}/ready")
    async def model_ready(name: str, version: str = VERSION) -> Response:
        """Whether the model accepts requests."""
        check_model(name, version)
        return JSONResponse({"name": name, "ready": service.is_ready}, 200 if service.is_ready else 503)

    @router.get("/models/{name}", response_model_exclude_none=True)
    @router.get("/models/{name}/versions/{version}", response_model_exclude_none=True)
    async def model(name: str, version: str = VERSION) -> ModelMetadata:
        """The scoring graph's inputs and outputs."""
        check_model(name, version)
        return metadata(name, service.backend.info, f"mlmkit_{service.backend.name}")

    @router.post("/models/{name}/infer", **infer_options)
    @router.post("/models/{name}/versions/{version}/infer", **infer_options)
    async def infer(request: Request, name: str, version: str = VERSION) -> Response:
        """Run the scoring graph on a batch of token ids. Its rows may share engine calls with other requests.

        If tensors follow the JSON as bytes, the header `Inference-Header-Content-Length` says how long the JSON is.
        """
        check_model(name, version)
        length = request.headers.get(HEADER_LENGTH)
        body = await json_body(request) if length is None else await request.body()
        infer_request, batch = await service.in_thread(read_request, body, length, service.limits)
        check_batch(batch, service.backend.info, service.limits)
        scored = await service.batcher.score([row for row in split_rows(batch) if len(row.positions)])
        outputs = await service.in_thread(in_request_order, batch, scored, service.backend.info.top_k)
        answer, headers = await service.in_thread(write_answer, name, infer_request, outputs)
        return Response(answer, headers=headers)

    return router


def _example(tokenizer: Tokenizer) -> dict[str, Any]:
    """A request for one row with one mask."""
    ids = tokenizer.frame(np.array([tokenizer.mask_id]))
    batch = Batch(ids[None], np.ones_like(ids)[None], np.flatnonzero(ids == tokenizer.mask_id), np.zeros(1, np.int64))
    inputs = [
        {"name": name, "shape": list(values.shape), "datatype": "INT64", "data": values.ravel().tolist()}
        for name, values in zip(INPUTS, batch, strict=True)
    ]
    return {"inputs": inputs, "outputs": [{"name": "log_prob"}, {"name": "rank"}]}


def metadata(name: str, info: ModelInfo, platform: str) -> ModelMetadata:
    """The description of the scoring graph of a model with this name."""

    def describe(tensors: dict[str, tuple[str, int]]) -> list[Tensor]:
        top_k = [-1, info.top_k]
        return [
            Tensor(name=name, datatype=DATATYPES[dtype], shape=top_k if name.startswith("top_") else [-1] * axes)
            for name, (dtype, axes) in tensors.items()
        ]

    tensors = {"inputs": describe(INPUTS), "outputs": describe(OUTPUTS)}
    return ModelMetadata(name=name, versions=[VERSION], platform=platform, **tensors)


def read_request(body: bytes, header_length: str | None, limits: Limits) -> tuple[InferRequest, Batch]:
    """The request and its batch; `header_length` is the header that says where the JSON ends and binary data begin.

    Raises `ApiError` for an invalid request.
    """
    size = len(body)
    if header_length is not None:
        size = int(header_length[:20]) if header_length.isascii() and header_length.isdigit() else -1
        if not 0 <= size <= len(body):
            raise ApiError(400, "bad_header_length", f"{HEADER_LENGTH} must be the size of the body's JSON in bytes")
    numbers = 2 * (min(limits.texts * limits.text_tokens, limits.queue_tokens) + limits.candidates)
    request = parse_body(InferRequest, body[:size], numbers)
    names = [tensor.name for tensor in request.inputs]
    if sorted(names) != sorted(INPUTS):
        raise _invalid(f"the inputs must be {', '.join(INPUTS)}, each once, not {', '.join(names[:5]) or 'none'}")
    outputs = [output.name for output in request.outputs or []]
    if len(set(outputs)) < len(outputs):
        raise _invalid("an output is named more than once")
    arrays, binary = {}, body[size:]
    for tensor in request.inputs:
        arrays[tensor.name], binary = _array(tensor, binary)
    if binary:
        raise _invalid(f"{len(binary)} bytes follow the last tensor")
    return request, Batch(**arrays)


def check_batch(batch: Batch, info: ModelInfo, limits: Limits) -> None:
    """Raise `ApiError` for a batch that would make ONNX Runtime fail or read memory outside its inputs."""
    rows, seq = batch.input_ids.shape
    if batch.attention_mask.shape != batch.input_ids.shape or batch.targets.shape != batch.positions.shape:
        raise _invalid("attention_mask must have the shape of input_ids, and targets that of positions")
    if rows > limits.texts:
        message = f"{rows} rows are more than the limit of {limits.texts}: send several requests"
        raise ApiError(413, "too_many_texts", message)
    if len(batch.positions) > limits.candidates:
        message = f"{len(batch.positions)} positions are more than the limit of {limits.candidates}"
        raise ApiError(413, "too_many_candidates", f"{message}: send several requests")
    if not 0 < seq <= limits.text_tokens:
        raise ApiError(422, "text_too_long", f"rows must have 1 to {limits.text_tokens} tokens, not {seq}")
    for name, values, end in (
        ("input_ids", batch.input_ids, info.vocabulary_size),
        ("targets", batch.targets, info.vocabulary_size),
        ("positions", batch.positions, rows * seq),
        ("attention_mask", batch.attention_mask, 2),
    ):
        if values.size and (values.min() < 0 or values.max() >= end):
            raise _invalid(f"{name} must be from 0 to {end - 1}")


def in_request_order(batch: Batch, scored: list[Scored], top_k: int) -> Scored:
    """The scores of those rows that have positions, joined in the order of the batch's positions, which is any."""
    ids, probs = np.zeros((0, top_k), np.int64), np.zeros((0, top_k), np.float32)
    empty = Scored(probs[:, 0], ids[:, 0], probs, ids)  # or a batch without positions could not be joined
    rows = batch.positions // batch.input_ids.shape[1]
    order = np.argsort(np.argsort(rows, kind="stable"))
    return Scored(*(np.concatenate(parts)[order] for parts in zip(empty, *scored, strict=True)))


def write_answer(name: str, request: InferRequest, scored: Scored) -> tuple[bytes, dict[str, str]]:
    """The body and its headers: JSON, followed by bytes for the outputs that are requested as such."""
    tensors, blobs = [], []
    for output in request.outputs or [RequestedOutput(name=name) for name in OUTPUTS]:  # pyright: ignore[reportArgumentType]
        values, is_binary = np.ascontiguousarray(getattr(scored, output.name)), output.parameters.binary_data
        tensor = {"name": output.name, "shape": list(values.shape), "datatype": DATATYPES[str(values.dtype)]}
        if request.parameters.binary_data_output if is_binary is None else is_binary:
            blobs.append(values.astype(values.dtype.newbyteorder("<")).tobytes())
            tensors.append(json.dumps(tensor | {"parameters": {"binary_data_size": len(blobs[-1])}}).encode())
        else:
            pieces = np.array_split(values.ravel(), values.size // JSON_NUMBERS + 1)
            data = b", ".join(json.dumps(piece.tolist())[1:-1].encode() for piece in pieces)
            tensors.append(b'%s, "data": [%s]}' % (json.dumps(tensor).encode()[:-1], data))
    answer = {"model_name": name, "model_version": VERSION} | ({} if request.id is None else {"id": request.id})
    head = b'%s, "outputs": [%s]}' % (json.dumps(answer).encode()[:-1], b", ".join(tensors))
    if not blobs:
        return head, {"Content-Type": "application/json"}
    return b"".join([head, *blobs]), {"Content-Type": OCTETS, HEADER_LENGTH: str(len(head))}


def _array(tensor: InputTensor, binary: bytes) -> tuple[NDArray[np.int64], bytes]:
    """The tensor's values, int64 in its shape, and the binary data that follow its own."""
    axes = INPUTS[tensor.name][1]
    if len(tensor.shape) != axes:
        raise _invalid(f"{tensor.name} has {axes} axes, not {len(tensor.shape)}")
    size = tensor.parameters.binary_data_size
    if size is None:
        try:
            values = np.array(tensor.data or [], dtype=np.int64).ravel()
        except (ValueError, OverflowError):
            raise _invalid(f"the data of {tensor.name} must be whole numbers of 64 bits, in equal rows") from None
    elif size <= len(binary):
        values, binary = np.frombuffer(binary[:size], dtype="<i8").astype(np.int64), binary[size:]
    else:
        raise _invalid(f"{tensor.name}: binary_data_size is {size}, but {len(binary)} bytes are left")
    if math.prod(tensor.shape) != values.size:
        raise _invalid(f"{tensor.name} has {values.size} values, which do not fit the shape {tensor.shape[:4]}")
    return values.reshape(tensor.shape), binary


def _invalid(message: str) -> ApiError:
    return ApiError(422, "invalid_tensor", message)
