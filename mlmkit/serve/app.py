"""The HTTP application: routes and error handlers over one `Service`, inside the request middleware."""

import contextlib
import logging
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from mlmkit import __version__
from mlmkit.errors import CheckError, UserError
from mlmkit.questions import NoMaskError, TargetError, TextTooLongError
from mlmkit.serve import schemas
from mlmkit.serve.bodies import json_body
from mlmkit.serve.errors import ApiError
from mlmkit.serve.kserve import kserve_router
from mlmkit.serve.metrics import CONTENT_TYPE
from mlmkit.serve.middleware import AllowedHosts, RequestMiddleware
from mlmkit.serve.openapi import ERROR_RESPONSES, fill_example, openapi, score_example
from mlmkit.serve.pages import page_router
from mlmkit.serve.requests import read_fill, read_score, write_fill, write_score
from mlmkit.serve.service import Service

log = logging.getLogger(__name__)

# Below these (bytes, quotes, candidates) parsing or writing takes 0.1 ms and stays on the event loop: a thread costs
# 0.3 ms (docs/decisions.md). Quotes count because hundreds of short texts or targets take 10 ms in 2 KB.
SHORT_BODY, SHORT_QUOTES, SHORT_ANSWER = 2048, 20, 20
ERROR_TYPES = {NoMaskError: "no_mask", TextTooLongError: "text_too_long", TargetError: "unknown_target"}


def build_app(service: Service, token: str | None, hosts: AllowedHosts) -> RequestMiddleware:
    """The ASGI application over the service. It asks for `token`, if there is one."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="mlmkit",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # it would redirect to the Host header, and to http behind a proxy with TLS
        responses=ERROR_RESPONSES,
    )
    for kind in (ApiError, UserError, CheckError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer_error)
    _add_routes(app, service)
    app.include_router(kserve_router(service))
    app.include_router(page_router())
    app.openapi = lambda: openapi(app, service, has_token=token is not None)
    return RequestMiddleware(app, service.limits, service.metrics, token, hosts)


def _add_routes(app: FastAPI, service: Service) -> None:
    fill_schema = schemas.body_schema(schemas.FillMaskRequest, fill_example(service))
    score_schema = schemas.body_schema(schemas.ScoreRequest, score_example(service))

    @app.post("/", include_in_schema=False)
    @app.post("/fill-mask", tags=["Texts"], response_model=schemas.FillMaskAnswer, openapi_extra=fill_schema)
    async def fill_mask(request: Request) -> Response:
        """Return the likeliest tokens for each mask, in the form of Hugging Face's pipeline and Inference API."""
        body = await json_body(request)
        is_short = len(body) <= SHORT_BODY and body.count(b'"') <= SHORT_QUOTES
        job = await service.in_thread(read_fill, service, body, is_short=is_short)
        answer, is_short = job.rows, job.candidates <= SHORT_ANSWER
        try:
            while not isinstance(answer, bytes):
                scored = await service.batcher.score(answer)
                answer = await service.in_thread(write_fill, service, job, scored, is_short=is_short)
        finally:
            job.is_abandoned.set()
        return Response(answer, headers=job.headers, media_type="application/json")

    @app.post("/score", tags=["Texts"], response_model=schemas.ScoreAnswer, openapi_extra=score_schema)
    async def score(request: Request) -> Response:
        """Return each text's pseudo-log-likelihood: the sum of its tokens' log-probabilities, each masked alone."""
        job = await service.in_thread(read_score, service, await json_body(request))
        answer = await service.in_thread(write_score, service, job, await service.batcher.score(job.batches))
        return Response(answer, media_type="application/json")

    @app.get("/health", tags=["Server"])
    async def health() -> schemas.Health:
        """Whether the server is alive. If not, restart it."""
        if not service.is_alive:
            raise ApiError(503, "batcher_died", "the batcher died: restart the server")
        return schemas.Health()

    not_ready = {"model": schemas.Ready, "description": "The server does not accept requests."}

    @app.get("/ready", tags=["Server"], response_model=schemas.Ready, responses={503: not_ready})
    async def ready() -> Response:
        """Whether the server accepts requests: from when its model is loaded until it is told to stop."""
        return JSONResponse({"ready": service.is_ready}, 200 if service.is_ready else 503)

    @app.get("/info", tags=["Server"])
    async def info() -> schemas.Info:
        """The served model and the server's limits."""
        return service.info

    @app.get("/metrics", tags=["Server"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(service.metrics.page(), media_type=CONTENT_TYPE)


async def _answer_error(request: Request, error: Exception) -> Response:
    """Answer an exception. Details of our own defects go to the log, not to the client."""
    match error:
        case ApiError():
            answer = error
        case HTTPException():
            answer = _from_starlette(error)
        case UserError():
            answer = ApiError(422, ERROR_TYPES.get(type(error), "invalid_request"), str(error))
        case CheckError():
            log.error("%s", error)
            answer = ApiError(500, "model_failed", "the model failed on this request: see the server's log")
        case _:
            answer = ApiError(500, "internal_error", "the server failed on this request: see its log")
    request.scope["state"]["error_type"] = answer.error_type
    return answer.response()


def _from_starlette(error: HTTPException) -> ApiError:
    """Starlette's own errors: no such path or method."""
    status = error.status_code
    error_type = {404: "not_found", 405: "method_not_allowed"}.get(status, "refused")
    message = "nothing at this path: see /docs" if status == 404 else str(error.detail)
    answer = ApiError(status, error_type, message)
    answer.headers.update(error.headers or {})
    return answer
