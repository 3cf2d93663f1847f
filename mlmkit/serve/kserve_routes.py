"""Routes of the Open Inference Protocol, version 2."""

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from mlmkit import __version__
from mlmkit.serve import kserve
from mlmkit.serve.batcher import split
from mlmkit.serve.errors import ApiError
from mlmkit.serve.gate import json_body
from mlmkit.serve.kserve import VERSION
from mlmkit.serve.schemas import BINARY, body_of

if TYPE_CHECKING:
    from mlmkit.serve.app import Service


def kserve_router(service: "Service") -> APIRouter:
    """The protocol's paths over the service's one model."""
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])
    octets = "application/octet-stream"
    extra = body_of(kserve.InferRequest, octets) | {"responses": {"200": {"content": {octets: BINARY}}}}
    shown: dict[str, Any] = {"response_model": kserve.InferAnswer, "openapi_extra": extra}

    def check(name: str, version: str = VERSION) -> None:
        if name != service.name or version != VERSION:
            raise ApiError(404, "no_such_model", f"the model here is {service.name}, version {VERSION}")

    @router.get("")
    async def server() -> dict[str, Any]:
        """The server."""
        return {"name": "mlmkit", "version": __version__, "extensions": ["binary_tensor_data"]}

    @router.get("/health/live")
    async def live() -> Response:
        """Whether the process lives, and its batcher."""
        return JSONResponse({"live": service.is_alive}, 200 if service.is_alive else 503)

    @router.get("/health/ready")
    async def ready() -> Response:
        """Whether it takes requests."""
        return JSONResponse({"ready": service.takes_requests}, 200 if service.takes_requests else 503)

    @router.get("/models/{name}/ready")
    @router.get("/models/{name}/versions/{version}/ready")
    async def model_ready(name: str, version: str = VERSION) -> Response:
        """Whether the model takes requests."""
        check(name, version)
        is_ready = service.takes_requests
        return JSONResponse({"name": name, "ready": is_ready}, 200 if is_ready else 503)

    @router.get("/models/{name}")
    @router.get("/models/{name}/versions/{version}")
    async def model(name: str, version: str = VERSION) -> kserve.ModelMetadata:
        """The scoring graph's inputs and outputs."""
        check(name, version)
        return kserve.metadata(name, service.backend.info, f"mlmkit_{service.backend.name}")

    @router.post("/models/{name}/infer", **shown)
    @router.post("/models/{name}/versions/{version}/infer", **shown)
    async def infer(request: Request, name: str, version: str = VERSION) -> Response:
        """The scoring graph on a batch of rows, which may share the engine's calls with other requests' rows."""
        check(name, version)
        length = request.headers.get(kserve.HEADER_LENGTH)
        content = await json_body(request) if length is None else await request.body()
        asked, batch = await service.in_thread(kserve.read_request, content, length, service.limits)
        kserve.check_batch(batch, service.backend.info, service.limits)
        rows = {number: row for number, row in enumerate(split(batch)) if len(row.positions)}
        predicted = dict(zip(rows, await service.queue.score(list(rows.values())), strict=True))
        found = await service.in_thread(kserve.gather, batch, predicted, service.backend.info.top_k)
        answer, headers = await service.in_thread(kserve.write_answer, name, asked, found)
        return Response(answer, headers=headers)

    return router
