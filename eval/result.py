"""The types of `result.json`, which `mlmkit eval` writes. docs/evaluation.md defines the metrics."""

from typing import Any, NotRequired, TypedDict

from mlmkit.overlap import Overlap

RESULT_FORMAT = 5  # also counts changes of the parts of unfinished evaluations


class Metric(TypedDict):
    """A metric's value and its 95 % interval. None: the number overflows or does not exist, or has no interval."""

    value: float | None
    low: float | None
    high: float | None
    standard_error: NotRequired[float]  # of scoring a sample of the tokens, where `pseudo.sample` is below 1


Metrics = dict[str, Metric]
SliceGroups = dict[str, dict[str, dict[str, Any]]]  # by slicing and slice: `tokens`, `documents`, {metric: {"value"}}


class Unknown(TypedDict):
    """Text that the tokenizer has no token for."""

    tokens: int
    characters: int
    token_share: float  # of all tokens
    character_share: float  # of all characters


class Corpus(TypedDict):
    """The text that was measured."""

    source: dict[str, Any]  # `set` (its name or None), `location`, and the options of reading it
    fingerprint: str  # of the texts and their order, whatever the tokenizer
    documents: int
    empty_texts: int  # left out: whitespace-only texts, or items with such an option
    documents_without_tokens: int
    windowed_documents: int  # longer than the model takes, so read in several windows
    tokens: int
    words: int  # separated by white space
    characters: int  # Unicode code points
    bytes: int  # in UTF-8
    overlap: NotRequired[Overlap | None]  # with the training text; None if that is not known. Older results lack it


class Timing(TypedDict):
    """The work of one kind of pass, summed over its parts and ranks."""

    seconds: float
    rows: int  # that the model read
    tokens_per_second: float  # that the model read, special tokens included


class MaskSeeds(TypedDict):
    """Metrics of each mask seed."""

    by_seed: dict[str, dict[str, Any]]  # by seed: its `mask_digest` and each metric's value
    spread: dict[str, dict[str, float | None]]  # by metric: mean, standard_deviation (n - 1), lowest, highest


class Model(TypedDict):
    """What was measured."""

    path: str
    fingerprint: str  # of the weights; a checkpoint and its artifact share it
    architecture: str
    vocabulary_size: int
    max_length: int  # tokens, with special tokens
    precision: str
    top_k: int  # candidates per position that the model returns
    sees_padding: bool  # scores change with the padding behind a row, so batches hold rows of one length
    tokenizer: str  # fingerprint
    mask_id: int


class Result(TypedDict):
    """All of `result.json`, except for the `checksum` that its file has in addition."""

    format: int
    metrics: Metrics  # by name
    unigram_entropy: NotRequired[float]  # nats per token; older results lack it
    slices: dict[str, SliceGroups]  # by kind of score, `masked` or `pseudo`
    mask_seeds: NotRequired[MaskSeeds]  # for more than one mask seed
    items: NotRequired[dict[str, Any]]  # for pairs, choices, cloze: task, counts, groups by `phenomena` and `paradigms`
    unknown: Unknown
    mask_digest: str  # of all masked positions; of the scored ones where only pseudo-likelihood was measured
    digests: dict[str, str]  # by pass: `masked-SEED` or `pseudo`
    corpus: Corpus
    masking: dict[str, Any]  # algorithm, recipe, `seeds`, `seed` (the first), `epoch`, `selected` tokens
    pseudo: dict[str, Any] | None  # `variant` and `sample`, the share of tokens that was scored
    scored: dict[str, int]  # tokens by kind of score
    model: Model
    backend: dict[str, str]  # `name` and `device`
    batch_coupling: bool  # scores depended on the other rows of a batch
    timing: dict[str, Timing]  # by kind of score
    seconds: float  # in total, of the call that finished the evaluation
    date: NotRequired[str]  # when it was finished, ISO 8601 in UTC. Older results lack it
    versions: dict[str, str]  # of mlmkit, Python and the packages that compute
    command: list[str]
    set: dict[str, Any] | None  # the declaration of the set
    identity: dict[str, Any]  # what another call must share to resume this evaluation
    examples: dict[str, list[dict[str, Any]]]  # `worst` and `best` tokens in context: see `mlmkit.eval.examples`
    files: NotRequired[dict[str, str]]  # SHA-256 of the two tables; absent until they are complete


def main_metric(result: Result) -> str:
    """The metric that tables of several results show: the one that its set declares, or the first.

    It is also the first if the declared one was not measured, such as a masked metric with `--metric pseudo`.
    """
    declared = (result["set"] or {}).get("metric")
    return declared if declared in result["metrics"] else next(iter(result["metrics"]))


def sample_size(result: Result, metric: str) -> int:
    """What a metric is measured on: documents, or items; for a correlation the items that have the human number."""
    items = result.get("items", {})
    return items.get("correlated", {}).get(metric) or items.get("items") or result["corpus"]["documents"]
