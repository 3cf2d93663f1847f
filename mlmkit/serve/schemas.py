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
    """What to do with a text that is longer than the model can read."""

    truncation: StrictBool | None = Field(
        default=False,
        description="Cut the text to a window of `max_length` tokens around its masks, instead of refusing it.",
    )
    max_length: StrictInt | None = Field(
        default=None,
        description="Length of the window in tokens, special tokens included. Default: the server's limit.",
    )


class FillMaskParameters(_Strict):
    """Options of a fill-mask request."""

    top_k: StrictInt | None = Field(default=5, description="Candidates per mask.")
    targets: StrictStr | Strings | None = Field(
        default=None,
        description="Rank only these, used exactly as written, with their spaces. Without `whole_targets`, a target of "
        "several tokens is ranked by its first token.",
    )
    tokenizer_kwargs: TokenizerKwargs | None = Field(default=None, description="How to cut a text that is too long.")
    whole_targets: StrictBool | None = Field(default=False, description="Rank each target by all of its tokens.")
    joint: StrictBool | None = Field(
        default=False, description="Rank fillings of all masks of a text together, instead of each mask alone."
    )


class FillMaskRequest(_Strict):
    """A request in the form of Hugging Face's fill-mask task."""

    inputs: Texts
    parameters: FillMaskParameters | None = Field(default=None, description="Options; all have defaults.")
    options: dict[str, Any] | None = Field(default=None, deprecated=True, description="Accepted and ignored.")


class FilledMask(BaseModel):
    """One candidate for one mask."""

    score: float = Field(description="Its probability, over the whole vocabulary.")
    token: int = Field(description="Its id in the vocabulary.")
    token_str: str = Field(description="The token as text.")
    sequence: str = Field(description="The text with the candidate in place of the mask.")


class FilledTarget(BaseModel):
    """One whole target for one mask, with `whole_targets`."""

    score: float = Field(description="The geometric mean of the probabilities of its tokens.")
    log_prob: float = Field(description="The sum of the log-probabilities of its tokens (natural log).")
    tokens: list[int] = Field(description="The ids of its tokens.")
    token_str: str = Field(description="The target as it was sent.")
    sequence: str = Field(description="The text with the target in place of the mask.")


class JointFilling(BaseModel):
    """One token for each mask of a text, with `joint`."""

    score: float = Field(description="The joint probability of the tokens, filled in from left to right.")
    log_prob: float = Field(description="The natural logarithm of `score`.")
    tokens: list[int] = Field(description="The ids of the tokens, one per mask.")
    token_strs: list[str] = Field(description="The tokens as text, one per mask.")
    sequence: str = Field(description="The text with all masks filled.")


FilledText = (
    list[FilledMask] | list[list[FilledMask]] | list[FilledTarget] | list[list[FilledTarget]] | list[JointFilling]
)
FillMaskAnswer = FilledText | list[FilledText]


class ScoreParameters(_Strict):
    """Options of a score request."""

    pll: Literal["original", "within-word"] | None = Field(
        default="original",
        description="`original` masks each token alone (Salazar et al. 2020); `within-word` also masks the later "
        "tokens of its word (Kauf and Ivanova 2023).",
    )
    per_token: StrictBool | None = Field(default=False, description="Also return each token with its log-probability.")


class ScoreRequest(_Strict):
    """Texts to score by pseudo-log-likelihood."""

    inputs: Texts
    parameters: ScoreParameters | None = Field(default=None, description="Options; all have defaults.")


class ScoredToken(BaseModel):
    """One token of a scored text."""

    token: int = Field(description="Its id in the vocabulary.")
    token_str: str = Field(description="The token as text.")
    start: int = Field(description="Where it starts in the text, in Unicode code points.")
    end: int = Field(description="Where it ends in the text, in Unicode code points.")
    log_prob: float = Field(description="Its log-probability in nats, given the rest of the text.")


class ScoredText(BaseModel):
    """One text. Both figures are null if it has no token to score."""

    pseudo_log_likelihood: float | None = Field(description="The sum of its tokens' log-probabilities, in nats.")
    pseudo_perplexity: float | None = Field(description="exp(-`pseudo_log_likelihood` / `tokens`).")
    tokens: int = Field(description="How many tokens were scored.")
    per_token: list[ScoredToken] | None = Field(default=None, description="The tokens, if the request asks for them.")


ScoreAnswer = ScoredText | list[ScoredText]


class Health(BaseModel):
    """The server is alive."""

    status: Literal["ok"] = Field(default="ok", description="Always `ok`: a dead server answers with an error.")


class Ready(BaseModel):
    """Whether the server accepts requests."""

    ready: bool = Field(description="False while the model loads, and after the server was told to stop.")


class Info(BaseModel):
    """The served model and the server's limits."""

    name: str = Field(description="The name of the model's folder.")
    version: str = Field(description="The version of mlmkit.")
    architecture: str = Field(description="The model's architecture, such as `bert`.")
    vocabulary_size: int = Field(description="Number of entries of the vocabulary.")
    max_length: int = Field(description="Longest text that the model reads, in tokens, special tokens included.")
    precision: str = Field(description="Number format of the computation, such as `fp32`.")
    top_k: int = Field(description="Most candidates per mask.")
    fingerprint: str = Field(description="SHA-256 of the checkpoint's weights.")
    mask_token: str = Field(description="The string that stands for a mask in a text.")
    example: str = Field(description="A text with a mask, from the model's card; empty if there is none.")
    language: str = Field(description="ISO 639 code of the example's language; empty if the card names no single one.")
    backend: str = Field(description="What computes: `onnx`, `tensorrt` or `torch`.")
    device: str = Field(description="Where it computes: `cpu` or `cuda`.")
    files: dict[str, str] | None = Field(description="SHA-256 of each file of the artifact.")
    parity: dict[str, Any] | None = Field(description="How far the artifact's scores differ from its checkpoint's.")
    limits: dict[str, float | int] = Field(description="The server's limits: see `mlmkit serve --help`.")


class ErrorBody(BaseModel):
    """Every error."""

    error: str = Field(description="One line that says what is wrong and what to do.")
    error_type: str = Field(description="A fixed name, for programs.")


def body_schema(model: type[BaseModel], example: dict[str, Any], *more_types: str) -> dict[str, Any]:
    """A route's body in the OpenAPI document, which FastAPI cannot know: the route parses it in a thread."""
    schema = {"schema": {"$ref": REFERENCE.format(model=model.__name__)}, "example": example}
    content = {"application/json": schema} | dict.fromkeys(more_types, BINARY)
    return {"requestBody": {"required": True, "content": content}}
