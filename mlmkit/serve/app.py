"""The HTTP application: routes over one backend and its batcher."""

import asyncio
import contextlib
import ctypes
import gc
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from mlmkit import __version__
from mlmkit.backends import Backend, Batch
from mlmkit.errors import CheckError, UserError
from mlmkit.fill import NoMaskError, TargetError, TextTooLongError
from mlmkit.serve import schemas
from mlmkit.serve.batcher import Batcher
from mlmkit.serve.errors import ApiError, error_response
from mlmkit.serve.gate import Gate, Hosts, json_body
from mlmkit.serve.kserve_routes import kserve_router
from mlmkit.serve.limits import Limits
from mlmkit.serve.metrics import CONTENT_TYPE, Metrics
from mlmkit.serve.pages import page_router
from mlmkit.serve.texts import read_filling, read_scores_request, write_filling, write_scores

log = logging.getLogger(__name__)

TEXT_THREADS = 2
SHRINK_SECONDS = 5.0
# Bytes, quotes, candidates: some 0.1 ms of work, and a thread costs 0.3 (docs/decisions.md). Hundreds of short texts
# or targets are 10 ms in 2 KB, and as many requests may come at once.
SHORT_BODY, SHORT_QUOTES, SHORT_ANSWER = 2048, 20, 20
STATUSES = (400, 401, 403, 404, 405, 408, 413, 415, 422, 429, 431, 500, 503)
REFUSALS: dict[int | str, dict[str, Any]] = {status: {"model": schemas.ErrorBody} for status in STATUSES}
KINDS = {NoMaskError: "no_mask", TextTooLongError: "text_too_long", TargetError: "unknown_target"}


@dataclass
class Service:
    """What the routes share: the model, its bounds and figures, and the batcher once the event loop runs."""

    backend: Backend
    limits: Limits
    metrics: Metrics
    log_texts: bool = False
    batcher: Batcher | None = None
    is_ready: bool = False
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(TEXT_THREADS, "text"))

    @cached_property
    def name(self) -> str:
        """The model's, as the Open Inference Protocol's paths have it: its folder's."""
        path = self.backend.info.path
        return (Path(path).resolve().name if Path(path).exists() else path.replace("/", "--")) or "model"

    @cached_property
    def info(self) -> schemas.Info:
        """What `/info` shows."""
        info, manifest = self.backend.info, self.backend.manifest
        return schemas.Info(
            **asdict(info),
            name=self.name,
            version=__version__,
            mask_token=self.backend.tokenizer.mask_token,
            backend=self.backend.name,
            device=self.backend.device,
            files=manifest.files if manifest else None,
            parity=manifest.parity if manifest else None,
            limits=asdict(self.limits),
        )

    @property
    def is_alive(self) -> bool:
        """Whether calls of the engine are made."""
        return self.batcher is not None and self.batcher.is_alive

    @property
    def takes_requests(self) -> bool:
        """Whether it should be sent any."""
        return self.is_ready and self.is_alive

    async def in_thread(self, work: Callable[..., Any], *arguments: Any, is_short: bool = False) -> Any:
        """Text work, off the event loop, unless it is so short that the way there and back takes longer."""
        if is_short:
            return work(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)

    @property
    def queue(self) -> Batcher:
        """The batcher, which is there before the first request is taken."""
        assert self.batcher is not None
        return self.batcher

    async def start(self) -> None:
        """Make the batcher and run the engine once, so that the first request does not wait for it to load."""
        bounds = self.limits.batch_tokens, self.limits.queue_tokens, self.limits.wait_seconds
        self.batcher = Batcher(self.backend, self.metrics, *bounds)
        ids = self.backend.tokenizer.frame(np.array([self.backend.tokenizer.mask_id]))[None]
        batch = Batch(ids, np.ones_like(ids), np.zeros(1, np.int64), np.zeros(1, np.int64))
        await self.queue.score([batch])
        self.shrinking = asyncio.create_task(self._shrink(batch))
        gc.freeze()  # what is here stays: looking through it again took 40 to 200 ms, while nothing else ran
        self.is_ready = True

    async def _shrink(self, batch: Batch) -> None:
        """Make ONNX Runtime return what earlier calls took, and glibc what long texts did: both keep 100s of MiB."""
        rate = self.queue.rate
        while True:
            await asyncio.sleep(SHRINK_SECONDS)
            if self.queue.rate != rate and self.backend.name == "onnx" and self.backend.device == "cpu":
                rate = self.queue.rate
                await asyncio.to_thread(self.backend.shrink, batch)  # pyright: ignore[reportAttributeAccessIssue]
            with contextlib.suppress(AttributeError, TypeError):  # not glibc
                await asyncio.to_thread(ctypes.CDLL(None).malloc_trim, 0)

    async def stop(self) -> None:
        """Answer what waits, and take no more."""
        self.is_ready = False
        self.shrinking.cancel()
        if self.batcher:
            await self.batcher.close()
        self.threads.shutdown()


def build_app(service: Service, token: str | None, hosts: Hosts) -> Gate:
    """The application behind its gate."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="mlmkit",
        version=__version__,
        summary="Fill-mask and pseudo-log-likelihood from one masked language model.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # to an address made of the Host header, and of http behind a proxy with TLS
        responses=REFUSALS,
    )
    for kind in (ApiError, UserError, CheckError, HTTPException, Exception):
        app.add_exception_handler(kind, _refuse)
    _add_routes(app, service)
    app.include_router(kserve_router(service))
    app.include_router(page_router())
    app.openapi = lambda: schemas.document(app)
    return Gate(app, service.limits, service.metrics, token, hosts)


def _add_routes(app: FastAPI, service: Service) -> None:
    fill_extra, score_extra = schemas.body_of(schemas.FillMaskRequest), schemas.body_of(schemas.ScoreRequest)

    @app.post("/", include_in_schema=False)
    @app.post("/fill-mask", tags=["Texts"], response_model=schemas.FillMaskAnswer, openapi_extra=fill_extra)
    async def fill_mask(request: Request) -> Response:
        """The likeliest tokens for each mask, as Hugging Face's pipeline and Inference API give them."""
        body = await json_body(request)
        is_short = len(body) <= SHORT_BODY and body.count(b'"') <= SHORT_QUOTES
        filling = await service.in_thread(read_filling, service, body, is_short=is_short)
        predicted, is_short = await service.queue.score(filling.rows), filling.candidates <= SHORT_ANSWER
        try:
            body = await service.in_thread(write_filling, service, filling, predicted, is_short=is_short)
        finally:
            filling.given_up.set()
        replaced = filling.stand_ins
        headers = {"X-Targets-Replaced": str(len(replaced))} if replaced else {}
        return Response(body, headers=headers, media_type="application/json")

    @app.post("/score", tags=["Texts"], response_model=schemas.ScoreAnswer, openapi_extra=score_extra)
    async def score(request: Request) -> Response:
        """Pseudo-log-likelihood of each text: each token masked alone, the logarithms of their probabilities summed."""
        scores = await service.in_thread(read_scores_request, service, await json_body(request))
        body = await service.in_thread(write_scores, service, scores, await service.queue.score(scores.rows))
        return Response(body, media_type="application/json")

    @app.get("/health", tags=["Server"])
    async def health() -> schemas.Health:
        """Whether the process lives, and its batcher: one that does not should be started again."""
        if not service.is_alive:
            raise ApiError(503, "batcher_died", "the batcher has died: the server must be started again")
        return schemas.Health()

    @app.get("/ready", tags=["Server"], responses={503: {"model": schemas.Ready}})
    async def ready() -> Response:
        """Whether it takes requests: not before the model is loaded, and not once it is asked to stop."""
        is_ready = service.takes_requests
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @app.get("/info", tags=["Server"])
    async def info() -> schemas.Info:
        """What is served, and within which bounds."""
        return service.info

    @app.get("/metrics", tags=["Server"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.page(), media_type=CONTENT_TYPE)


async def _refuse(request: Request, error: Exception) -> Response:
    """Every exception as a refusal. What it says of a defect of ours goes to the log, not to the client."""
    match error:
        case ApiError():
            refusal = error
        case HTTPException():
            refusal = _of_http(error)
        case UserError():
            refusal = ApiError(422, KINDS.get(type(error), "invalid_request"), str(error))
        case CheckError():
            log.error("%s", error)
            refusal = ApiError(500, "model_failed", "the model failed on this request: see the server's log")
        case _:
            refusal = ApiError(500, "internal_error", "the server failed on this request: see its log")
    request.scope["state"]["error_type"] = refusal.error_type
    return error_response(refusal)


def _of_http(error: HTTPException) -> ApiError:
    """Starlette's own: no such path or method, a body that is no JSON."""
    kinds = {404: "not_found", 405: "method_not_allowed"}
    messages = {404: "there is nothing at this path: see /docs"}
    status = error.status_code
    refusal = ApiError(status, kinds.get(status, "refused"), messages.get(status, str(error.detail)))
    refusal.headers.update(error.headers or {})
    return refusal
