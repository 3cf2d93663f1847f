"""Requests and answers about texts: pydantic checks requests by these, and the OpenAPI document shows them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

REFERENCE = "#/components/schemas/{model}"
BINARY = {"schema": {"type": "string", "format": "binary"}}

# Stop at the first error: a body may have a million, and a list of them takes seconds and a gigabyte.
Strings = Annotated[list[StrictStr], Field(fail_fast=True)]
Texts = Annotated[StrictStr | Strings, Field(description="A text, or a list of texts.")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TokenizerKwargs(_Strict):
    """`truncation`: cut a text that is too long to a window of `max_length` tokens around its masks."""

    truncation: StrictBool | None = False
    max_length: StrictInt | None = Field(default=None, description="With special tokens. Default: the server's limit.")


class FillMaskParameters(_Strict):
    """`targets`: rank only these, taken with their spaces. One of several tokens is ranked by its first token.

    `whole_targets`: rank targets by all of their tokens. `joint`: rank fillings of all masks of a text together.
    """

    top_k: StrictInt | None = Field(5, description="Candidates per mask.")
    targets: StrictStr | Strings | None = None
    tokenizer_kwargs: TokenizerKwargs | None = None
    whole_targets: StrictBool | None = False
    joint: StrictBool | None = False


class FillMaskRequest(_Strict):
    """Hugging Face's fill-mask request. `options` is accepted and ignored."""

    inputs: Texts = Field(examples=["The capital of France is [MASK]."])
    parameters: FillMaskParameters | None = Field(None, examples=[{"top_k": 5}])
    options: dict[str, Any] | None = Field(None, deprecated=True)


class FilledMask(BaseModel):
    """One candidate for one mask."""

    score: float = Field(description="Its probability, over the whole vocabulary.")
    token: int
    token_str: str
    sequence: str = Field(description="The text with it filled in.")


class FilledTarget(BaseModel):
    """One whole target for one mask, with `whole_targets`."""

    score: float = Field(description="The geometric mean of the probabilities of its tokens.")
    log_prob: float = Field(description="The sum of the log-probabilities of its tokens (natural log).")
    tokens: list[int]
    token_str: str = Field(description="The target as it was sent.")
    sequence: str


class JointFilling(BaseModel):
    """One token for each mask of a text, with `joint`."""

    score: float = Field(description="Their joint probability, filled in from left to right.")
    log_prob: float
    tokens: list[int]
    token_strs: list[str]
    sequence: str


FilledText = (
    list[FilledMask] | list[list[FilledMask]] | list[FilledTarget] | list[list[FilledTarget]] | list[JointFilling]
)
FillMaskAnswer = FilledText | list[FilledText]


class ScoreParameters(_Strict):
    """`pll`: mask each token alone, or with the later tokens of its word (Kauf and Ivanova 2023)."""

    pll: Literal["original", "within-word"] | None = "original"
    per_token: StrictBool | None = False


class ScoreRequest(_Strict):
    """Texts to score by pseudo-log-likelihood."""

    inputs: Texts = Field(examples=["The capital of France is Paris."])
    parameters: ScoreParameters | None = Field(None, examples=[{"per_token": True}])


class ScoredToken(BaseModel):
    """One token: its span in the text, in code points, and its log-probability (natural log)."""

    token: int
    token_str: str
    start: int
    end: int
    log_prob: float


class ScoredText(BaseModel):
    """One text. Both figures are null if it has no token to score."""

    pseudo_log_likelihood: float | None = Field(description="The sum over its tokens (natural log).")
    pseudo_perplexity: float | None
    tokens: int
    per_token: list[ScoredToken] | None = None


ScoreAnswer = ScoredText | list[ScoredText]


class Health(BaseModel):
    """The server is alive."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """Whether the server accepts requests."""

    ready: bool


class Info(BaseModel):
    """The served model and the server's limits."""

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
    parity: dict[str, Any] | None = Field(description="How far the artifact's scores differ from its checkpoint's.")
    limits: dict[str, float | int]


class ErrorBody(BaseModel):
    """Every error."""

    error: str = Field(description="One line that says what is wrong and what to do.")
    error_type: str = Field(description="A fixed name, for programs.")


def body_schema(model: type[BaseModel], *more_types: str) -> dict[str, Any]:
    """A route's body in the OpenAPI document, which FastAPI cannot know: the route parses it in a thread."""
    schema = {"schema": {"$ref": REFERENCE.format(model=model.__name__)}}
    content = {"application/json": schema} | dict.fromkeys(more_types, BINARY)
    return {"requestBody": {"required": True, "content": content}}
