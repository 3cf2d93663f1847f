"""What requests and answers look like: checked on the way in, shown in the OpenAPI document."""

from typing import Annotated, Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr
from pydantic.json_schema import models_json_schema

from mlmkit.serve.kserve import InferRequest

REFERENCE = "#/components/schemas/{model}"
BINARY = {"schema": {"type": "string", "format": "binary"}}

# The first error is enough: a body may have a million, and a list of them takes seconds and a gigabyte.
Strings = Annotated[list[StrictStr], Field(fail_fast=True)]
Texts = Annotated[StrictStr | Strings, Field(description="A text, or a list of texts.")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FillMaskParameters(_Strict):
    """`targets`: rank these only, spaces included. What is more than one token is ranked by the first of its pieces."""

    top_k: StrictInt | None = Field(5, description="Candidates a mask.")
    targets: StrictStr | Strings | None = None


class FillMaskRequest(_Strict):
    """Hugging Face's fill-mask request. `options` is taken and has no effect."""

    inputs: Texts = Field(examples=["The capital of France is [MASK]."])
    parameters: FillMaskParameters | None = Field(None, examples=[{"top_k": 5}])
    options: dict[str, Any] | None = Field(None, deprecated=True)


class FilledMask(BaseModel):
    """One candidate for one mask."""

    score: float = Field(description="Its probability, over the whole vocabulary.")
    token: int
    token_str: str
    sequence: str = Field(description="The text with it filled in.")


FilledText = list[FilledMask] | list[list[FilledMask]]
FillMaskAnswer = FilledText | list[FilledText]


class ScoreParameters(_Strict):
    """`pll`: mask each token alone, or with the later tokens of its word (Kauf and Ivanova 2023)."""

    pll: Literal["original", "within-word"] | None = "original"
    per_token: StrictBool | None = False


class ScoreRequest(_Strict):
    """Texts whose pseudo-log-likelihood is asked for."""

    inputs: Texts = Field(examples=["The capital of France is Paris."])
    parameters: ScoreParameters | None = Field(None, examples=[{"per_token": True}])


class ScoredToken(BaseModel):
    """One token: where it stands in the text, in code points, and its log-probability, natural log."""

    token: int
    token_str: str
    start: int
    end: int
    log_prob: float


class ScoredText(BaseModel):
    """One text. Without a scored token, both figures are null."""

    pseudo_log_likelihood: float | None = Field(description="The sum over its tokens, natural log.")
    pseudo_perplexity: float | None
    tokens: int
    per_token: list[ScoredToken] | None = None


ScoreAnswer = ScoredText | list[ScoredText]


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """Whether requests should be sent here."""

    ready: bool


class Info(BaseModel):
    """What is served, and within which bounds."""

    name: str
    version: str
    architecture: str
    vocabulary_size: int
    max_length: int
    precision: str
    top_k: int
    fingerprint: str
    mask_token: str
    backend: str
    device: str
    files: dict[str, str] | None = Field(description="SHA-256 of each file of the artifact.")
    parity: dict[str, Any] | None = Field(description="The artifact against its checkpoint.")
    limits: dict[str, float | int]


class ErrorBody(BaseModel):
    """Every refusal."""

    error: str = Field(description="One line that says what is wrong and what to do.")
    error_type: str = Field(description="A name for programs.")


# ---------------------------------------------------------------- the OpenAPI document


def body_of(model: type[BaseModel], *more_types: str) -> dict[str, Any]:
    """A route's body in the OpenAPI document. It is parsed in a thread, by the route, so FastAPI does not see it."""
    schema = {"schema": {"$ref": REFERENCE.format(model=model.__name__)}}
    content = {"application/json": schema} | dict.fromkeys(more_types, BINARY)
    return {"requestBody": {"required": True, "content": content}}


def document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with the bodies that `body_of` names."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        found["servers"] = [{"url": "./"}]  # from where this document is, which a proxy may put behind a prefix
        bodies = (FillMaskRequest, ScoreRequest, InferRequest)
        _, definitions = models_json_schema([(model, "validation") for model in bodies], ref_template=REFERENCE)
        found["components"]["schemas"] |= definitions["$defs"]
        found["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{}, {"bearer": []}]  # asked for where a token is set
        app.openapi_schema = found
    return app.openapi_schema
