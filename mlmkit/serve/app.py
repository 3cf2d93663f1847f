"""The HTTP application: routes over one backend and its batcher."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mlmkit import __version__
from mlmkit.artifact import is_artifact, parse_manifest
from mlmkit.backends import Backend, Batch, Predicted
from mlmkit.errors import CheckError, UserError
from mlmkit.fill import NoMaskError, Question, TargetError, TextTooLongError, answer, ask
from mlmkit.serve import schemas
from mlmkit.serve.batcher import Batcher
from mlmkit.serve.errors import ApiError, error_response, invalid
from mlmkit.serve.gate import Gate
from mlmkit.serve.kserve_routes import kserve_router
from mlmkit.serve.limits import Limits
from mlmkit.serve.metrics import CONTENT_TYPE, Metrics
from mlmkit.serve.pages import page_router
from mlmkit.serve.scoring import Scoring, plan_scores, read_scores

log = logging.getLogger(__name__)

TEXT_THREADS = 2
STATUSES = (400, 401, 404, 405, 408, 413, 422, 429, 500, 503)
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
        info, folder = self.backend.info, Path(self.backend.info.path)
        manifest = parse_manifest(folder) if is_artifact(folder) else None
        return schemas.Info(
            name=self.name,
            version=__version__,
            architecture=info.architecture,
            vocabulary_size=info.vocabulary_size,
            max_length=info.max_length,
            precision=info.precision,
            top_k=info.top_k,
            fingerprint=info.fingerprint,
            mask_token=self.backend.tokenizer.mask_token,
            backend=self.backend.name,
            device=self.backend.device,
            files=manifest.files if manifest else None,
            parity=manifest.parity if manifest else None,
            limits=asdict(self.limits),
        )

    async def in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Text work, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)

    async def predict(self, rows: list[Batch]) -> list[Predicted]:
        """The rows through the batcher."""
        assert self.batcher is not None  # made before the first request is taken
        return await self.batcher.predict(rows)

    def texts(self, inputs: str | list[str]) -> list[str]:
        """The request's texts. Raises `ApiError` for more than the limit."""
        texts = [inputs] if isinstance(inputs, str) else inputs
        if len(texts) > self.limits.texts:
            raise ApiError(413, "too_many_texts", f"{len(texts)} texts are more than {self.limits.texts}: split them")
        if self.log_texts:
            log.info("texts %s", json.dumps(texts))
        return texts

    async def start(self) -> None:
        """Make the batcher and run the engine once, so that the first request does not wait for it to load."""
        limits = self.limits
        self.batcher = Batcher(
            self.backend, self.metrics, limits.batch_tokens, limits.queue_tokens, limits.wait_seconds
        )
        ids = self.backend.tokenizer.frame(np.array([self.backend.tokenizer.mask_id]))[None]
        await self.predict([Batch(ids, np.ones_like(ids), np.zeros(1, np.int64), np.zeros(1, np.int64))])
        self.is_ready = True

    async def stop(self) -> None:
        """Answer what waits, and take no more."""
        self.is_ready = False
        if self.batcher:
            await self.batcher.close()
        self.threads.shutdown()


def build_app(service: Service, token: str | None = None) -> tuple[FastAPI, Gate]:
    """The application, and the gate before it, which is what a server runs."""

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
        responses=REFUSALS,
    )
    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(UserError, _refuse)
    app.add_exception_handler(CheckError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(Exception, _refuse)
    _add_routes(app, service)
    app.include_router(kserve_router(service))
    app.include_router(page_router())
    return app, Gate(app, service.limits, service.metrics, token)


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.post("/", include_in_schema=False)
    @app.post("/fill-mask", response_model=schemas.FillMaskAnswer)
    async def fill_mask(request: schemas.FillMaskRequest) -> Response:
        """The likeliest tokens for each mask, as Hugging Face's pipeline and Inference API give them."""
        texts, parameters = service.texts(request.inputs), request.parameters or schemas.FillMaskParameters(top_k=None)
        targets = [parameters.targets] if isinstance(parameters.targets, str) else parameters.targets or []
        top_k = 5 if parameters.top_k is None else parameters.top_k
        questions = await service.in_thread(_ask, service, texts, top_k, targets)
        predicted = await service.predict([question.batch for question in questions])
        is_single = isinstance(request.inputs, str) or len(texts) == 1
        body = await service.in_thread(_answer, service, questions, predicted, is_single)
        replaced = {target for question in questions for target in question.stand_ins}
        headers = {"X-Targets-Replaced": str(len(replaced))} if replaced else {}
        return Response(body, headers=headers, media_type="application/json")

    @app.post("/score", response_model=schemas.ScoreAnswer, response_model_exclude_none=True)
    async def score(request: schemas.ScoreRequest) -> Response:
        """Pseudo-log-likelihood of each text: each token masked alone, the logarithms of their probabilities summed."""
        texts, parameters = service.texts(request.inputs), request.parameters or schemas.ScoreParameters()
        scoring, rows = await service.in_thread(_plan, service, texts, parameters.pll or "original")
        predicted = await service.predict(rows)
        is_single = isinstance(request.inputs, str)
        body = await service.in_thread(_scores, service, scoring, predicted, bool(parameters.per_token), is_single)
        return Response(body, media_type="application/json")

    @app.get("/health")
    async def health() -> schemas.Health:
        """Whether the process lives, and its batcher: one that does not should be started again."""
        if service.batcher is None or not service.batcher.is_alive:
            raise ApiError(503, "batcher_died", "the batcher has died: the server must be started again")
        return schemas.Health()

    @app.get("/ready", responses={503: {"model": schemas.Ready}})
    async def ready() -> Response:
        """Whether it takes requests: not before the model is loaded, and not once it is asked to stop."""
        is_ready = service.is_ready and service.batcher is not None and service.batcher.is_alive
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @app.get("/info")
    async def info() -> schemas.Info:
        """What is served, and within which bounds."""
        return service.info

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.page(), media_type=CONTENT_TYPE)


# ---------------------------------------------------------------- in a thread: text to rows, and back


def _ask(service: Service, texts: list[str], top_k: int, targets: list[str]) -> list[Question]:
    limits, backend = service.limits, service.backend
    if len(targets) > limits.targets:
        raise ApiError(422, "too_many_targets", f"{len(targets)} targets are more than {limits.targets}")
    questions = [ask(backend.tokenizer, backend.info, text, top_k=top_k, targets=targets) for text in texts]
    for question in questions:
        _check_length(len(question.ids), limits)
        if len(question.masks) > limits.text_masks:
            message = f"the text has {len(question.masks)} masks, more than {limits.text_masks}"
            raise ApiError(422, "too_many_masks", message)
    return questions


def _answer(service: Service, questions: list[Question], predicted: list[Predicted], is_single: bool) -> bytes:
    tokenizer = service.backend.tokenizer
    filled = [answer(tokenizer, *pair) for pair in zip(questions, predicted, strict=True)]
    texts = [masks[0] if len(masks) == 1 else masks for masks in filled]
    return _json(texts[0] if is_single else texts)


def _plan(service: Service, texts: list[str], variant: str) -> tuple[Scoring, list[Batch]]:
    if not texts:
        raise ApiError(422, "invalid_request", "inputs: there is no text in it")
    scoring = plan_scores(service.backend, texts, variant)
    lengths = scoring.lengths(service.backend.tokenizer)
    for length in lengths:
        _check_length(length, service.limits)
    assert service.batcher is not None
    service.batcher.check_size(int((scoring.plan.rows.length + service.backend.tokenizer.added_tokens).sum()))
    return scoring, scoring.rows(service.backend.tokenizer)


def _scores(service: Service, scoring: Scoring, predicted: list[Predicted], per_token: bool, is_single: bool) -> bytes:
    answers = read_scores(service.backend.tokenizer, scoring, predicted, per_token=per_token)
    return _json(answers[0] if is_single else answers)


def _check_length(length: int, limits: Limits) -> None:
    if length > limits.text_tokens:
        message = f"a text has {length} tokens, and this server takes {limits.text_tokens}: shorten it"
        raise ApiError(422, "text_too_long", message)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


async def _refuse(request: Request, error: Exception) -> Response:
    """Every exception as a refusal. What it says of a defect of ours goes to the log, not to the client."""
    match error:
        case ApiError():
            refusal = error
        case RequestValidationError():
            refusal = invalid(error.errors())
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
    kinds = {404: "not_found", 405: "method_not_allowed", 400: "malformed_json"}
    messages = {
        404: "there is nothing at this path: see /docs",
        400: "the body is no JSON in UTF-8, or nested too deeply",
    }
    status = error.status_code
    refusal = ApiError(status, kinds.get(status, "refused"), messages.get(status, str(error.detail)))
    refusal.headers.update(error.headers or {})
    return refusal
