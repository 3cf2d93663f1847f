"""Requests about texts: bytes → checked → rows, and scores → bytes. All that is long runs in a thread."""

import json
import logging
import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mlmkit.backends import Batch, Scored
from mlmkit.fill import Question, answer, ask_all
from mlmkit.serve.errors import ApiError, checked
from mlmkit.serve.schemas import FillMaskParameters, FillMaskRequest, ScoreParameters, ScoreRequest
from mlmkit.serve.scoring import Scoring, plan_scores, read_scores

if TYPE_CHECKING:
    from mlmkit.serve.app import Service

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Filling:
    """A fill-mask request: a question a text. `is_single`: the answer is the text's own, not a list a text.

    `given_up` is set once nobody waits for the answer: a thread cannot be cancelled, and may have minutes left.
    """

    questions: list[Question]
    is_single: bool
    given_up: threading.Event = field(default_factory=threading.Event)

    @property
    def rows(self) -> list[Batch]:
        """One a text."""
        return [question.batch for question in self.questions]

    @property
    def candidates(self) -> int:
        """How many the answer holds, or are looked up for it, at most."""
        return sum(len(question.masks) * max(question.top_k, len(question.targets)) for question in self.questions)

    @property
    def stand_ins(self) -> set[str]:
        """Targets that are ranked by their first piece."""
        return {target for question in self.questions for target in question.stand_ins}


def read_filling(service: "Service", body: bytes) -> Filling:
    """Raises `ApiError` and `UserError` for a request that cannot be answered."""
    limits, backend = service.limits, service.backend
    request = checked(FillMaskRequest, body)
    texts, parameters = _texts(service, request.inputs), request.parameters or FillMaskParameters(top_k=None)
    targets = [parameters.targets] if isinstance(parameters.targets, str) else parameters.targets or []
    top_k = 5 if parameters.top_k is None else parameters.top_k
    if len(targets) > limits.targets:
        raise ApiError(422, "too_many_targets", f"{len(targets)} targets are more than {limits.targets}")
    info = replace(backend.info, max_length=limits.text_tokens)
    questions = ask_all(backend.tokenizer, info, texts, top_k=top_k, targets=targets)
    for question in questions:
        if len(question.masks) > limits.text_masks:
            message = f"a text has {len(question.masks)} masks, and this server takes {limits.text_masks}"
            raise ApiError(422, "too_many_masks", message)
    filling = Filling(questions, isinstance(request.inputs, str) or len(texts) == 1)  # a list of one, as the pipeline
    if filling.candidates > limits.candidates:
        message = f"{filling.candidates} candidates (top_k or targets, for each mask) are more than {limits.candidates}"
        raise ApiError(413, "too_many_candidates", message)
    return filling


def write_filling(service: "Service", filling: Filling, predicted: list[Scored]) -> bytes:
    """The answer, in Hugging Face's form."""
    tokenizer = service.backend.tokenizer
    texts = []
    for pair in zip(filling.questions, predicted, strict=True):
        if filling.given_up.is_set():
            return b""
        masks = answer(tokenizer, *pair)
        texts.append(_json(masks[0] if len(masks) == 1 else masks))  # one by one: nothing else runs meanwhile
    return texts[0] if filling.is_single else b"[%s]" % b", ".join(texts)


@dataclass(frozen=True)
class Scores:
    """A scoring request, and its rows."""

    scoring: Scoring
    rows: list[Batch]
    per_token: bool
    is_single: bool


def read_scores_request(service: "Service", body: bytes) -> Scores:
    """Raises `ApiError` and `UserError` for a request that cannot be answered."""
    request = checked(ScoreRequest, body)
    texts, parameters = _texts(service, request.inputs), request.parameters or ScoreParameters()
    if not texts:
        raise ApiError(422, "invalid_request", "inputs: there is no text in it")
    tokenizer = service.backend.tokenizer
    scoring = plan_scores(service.backend, texts, parameters.pll or "original", service.limits.text_tokens)
    service.queue.check_size(int((scoring.plan.rows.length + tokenizer.added_tokens).sum()))  # before they are made
    return Scores(scoring, scoring.rows(tokenizer), bool(parameters.per_token), isinstance(request.inputs, str))


def write_scores(service: "Service", scores: Scores, predicted: list[Scored]) -> bytes:
    """The answer: an object a text."""
    answers = read_scores(service.backend.tokenizer, scores.scoring, predicted, per_token=scores.per_token)
    return _json(answers[0] if scores.is_single else answers)


def _texts(service: "Service", inputs: str | list[str]) -> list[str]:
    texts = [inputs] if isinstance(inputs, str) else inputs
    if len(texts) > service.limits.texts:
        raise ApiError(413, "too_many_texts", f"{len(texts)} texts are more than {service.limits.texts}: split them")
    if service.log_texts:
        log.info("texts %s", json.dumps(texts))
    return texts


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
