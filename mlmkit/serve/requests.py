"""Requests about texts, from body to answer:

    read_fill, read_score    bytes -> checked against the limits -> rows for the engine
    Batcher.score            rows -> scores
    write_fill, write_score  scores -> bytes, or for a fill of several rounds the next rows

Reading and writing may take long and run in a thread.
"""

import json
import logging
import math
import threading
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mlmkit.backends import Batch, Scored, capacity
from mlmkit.corpus import Corpus, concatenate, tokenize
from mlmkit.errors import CheckError
from mlmkit.eval.rows import Rows, pseudo_rows
from mlmkit.eval.score_texts import TextScore, text_scores
from mlmkit.eval.scoring import build_batch
from mlmkit.fill import Ranking, Rounds, answer, rank_together, step
from mlmkit.questions import Question, ask_all, check_length
from mlmkit.serve.batcher import split_rows
from mlmkit.serve.bodies import parse_body
from mlmkit.serve.errors import ApiError
from mlmkit.serve.schemas import FillMaskParameters, FillMaskRequest, ScoreParameters, ScoreRequest, TokenizerKwargs
from mlmkit.serve.service import Service
from mlmkit.tokenizer import Tokenizer

log = logging.getLogger(__name__)


# ---------------------------------------------------------------- fill-mask


@dataclass(frozen=True)
class FillJob:
    """A fill-mask request: one question per text, their `rounds`, and the `rows` of the first round.

    `candidates` is an upper bound on those that the answer holds or that are looked up for it. `is_single`: the answer
    is not a list over texts. `is_abandoned` is set when nobody waits for the answer any more: a thread cannot be
    cancelled.
    """

    questions: list[Question]
    candidates: int
    rounds: Rounds[list[Ranking]]
    rows: list[Batch]
    is_single: bool
    is_abandoned: threading.Event = field(default_factory=threading.Event)

    @property
    def headers(self) -> dict[str, str]:
        """How many targets and texts were cut, which Hugging Face's schema has no field for."""
        replaced = {target for question in self.questions for target in question.stand_ins}
        truncated = sum(question.is_truncated for question in self.questions)
        counts = {"X-Targets-Replaced": len(replaced), "X-Texts-Truncated": truncated}
        return {name: str(count) for name, count in counts.items() if count}


def read_fill(service: Service, body: bytes) -> FillJob:
    """Parse a fill-mask request and tokenise its texts.

    Raises `ApiError` for an invalid body or one over the limits, `UserError` for a text that cannot be filled.
    """
    limits, backend = service.limits, service.backend
    request = parse_body(FillMaskRequest, body)
    texts, parameters = _checked_texts(service, request.inputs), request.parameters or FillMaskParameters()
    targets = [parameters.targets] if isinstance(parameters.targets, str) else parameters.targets or []
    if len(targets) > limits.targets:
        raise ApiError(422, "too_many_targets", f"{len(targets)} targets are more than the limit of {limits.targets}")
    cut = parameters.tokenizer_kwargs or TokenizerKwargs()
    questions = ask_all(
        backend.tokenizer,
        replace(backend.info, max_length=limits.text_tokens),
        texts,
        top_k=5 if parameters.top_k is None else parameters.top_k,
        targets=targets,
        whole_targets=bool(parameters.whole_targets),
        joint=bool(parameters.joint),
        truncation=bool(cut.truncation),
        max_length=cut.max_length,
    )
    for question in questions:
        if len(question.masks) > limits.text_masks:
            message = f"a text has {len(question.masks)} masks; the limit is {limits.text_masks}"
            raise ApiError(422, "too_many_masks", message)
    candidates = sum(question.candidates for question in questions)
    if candidates > limits.candidates:
        message = f"{candidates} candidates (masks x top_k, targets or beam) are more than the limit of"
        raise ApiError(413, "too_many_candidates", f"{message} {limits.candidates}: send several requests")
    service.batcher.check_size(sum(question.work for question in questions))  # before the rows are built
    rounds = rank_together(questions)
    # Hugging Face's pipeline answers a list of one text like the text alone.
    return FillJob(questions, candidates, rounds, step(rounds)[0], isinstance(request.inputs, str) or len(texts) == 1)


def write_fill(service: Service, job: FillJob, scored: list[Scored]) -> list[Batch] | bytes:
    """The rows of the next round, or after the last round the answer in the form of Hugging Face's pipeline.

    Raises `CheckError` for scores that are not finite.
    """
    rows, rankings = step(job.rounds, scored)
    if rankings is None:
        return rows
    texts = []
    for question, ranking in zip(job.questions, rankings, strict=True):
        if job.is_abandoned.is_set():
            return b""
        masks = answer(service.backend.tokenizer, question, ranking)
        texts.append(_json(masks[0] if len(masks) == 1 else masks))  # text by text: json holds the interpreter's lock
    return texts[0] if job.is_single else b"[%s]" % b", ".join(texts)


# ---------------------------------------------------------------- pseudo-log-likelihood


@dataclass(frozen=True)
class ScoreJob:
    """A scoring request: its texts, the rows that score their tokens, and each row as a batch for the engine."""

    texts: list[str]
    corpus: Corpus
    rows: Rows
    batches: list[Batch]
    per_token: bool
    is_single: bool


def read_score(service: Service, body: bytes) -> ScoreJob:
    """Parse a scoring request and make its rows.

    Raises `ApiError` for an invalid body or one over the limits, `UserError` for a text that is too long.
    """
    request = parse_body(ScoreRequest, body)
    texts, parameters = _checked_texts(service, request.inputs), request.parameters or ScoreParameters()
    if not texts:
        raise ApiError(422, "invalid_request", "inputs: the list of texts is empty")
    backend, tokenizer, limit = service.backend, service.backend.tokenizer, service.limits.text_tokens
    parts = []
    for text in texts:  # one at a time, so that nothing behind the first text that is too long is tokenised
        check_length(len(text), "characters", limit * tokenizer.characters_per_token)
        parts.append(tokenize([text], tokenizer))
        check_length(len(parts[-1].ids) + tokenizer.added_tokens, "tokens", limit)
    corpus = concatenate(parts)
    rows = pseudo_rows(corpus, tokenizer, capacity(backend), parameters.pll or "original")
    service.batcher.check_size(int((rows.windows.length + tokenizer.added_tokens).sum()))  # before they are built
    batches = _batches(corpus, rows, tokenizer)
    return ScoreJob(texts, corpus, rows, batches, bool(parameters.per_token), isinstance(request.inputs, str))


def write_score(service: Service, job: ScoreJob, scored: list[Scored]) -> bytes:
    """The answer: one `ScoredText` per text, sums in float64. Raises `CheckError` for scores that are not finite."""
    log_prob = np.array([row.log_prob[0] for row in scored], dtype=np.float32)
    if not np.isfinite(log_prob).all():
        raise CheckError("the model gives scores that are not finite: its weights or activations are not")
    scores = text_scores(job.texts, job.corpus, job.rows, log_prob, service.backend.tokenizer)
    answers = [_scored_text(service.backend.tokenizer, score, job.per_token) for score in scores]
    return _json(answers[0] if job.is_single else answers)


def _batches(corpus: Corpus, rows: Rows, tokenizer: Tokenizer) -> list[Batch]:
    """One batch per row, in the same order. The windows of a text have one length, so nothing is padded."""
    texts = np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows.document)) + 1)
    batches = (build_batch(corpus, rows, indices, tokenizer)[0] for indices in texts if len(indices))
    return [row for batch in batches for row in split_rows(batch)]


def _scored_text(tokenizer: Tokenizer, score: TextScore, per_token: bool) -> dict[str, Any]:
    total, count = score.pseudo_log_likelihood, len(score.token_ids)
    answer = {"pseudo_log_likelihood": total, "pseudo_perplexity": _perplexity(total or 0.0, count), "tokens": count}
    if per_token:
        tokens = zip(score.token_ids.tolist(), score.spans.tolist(), score.log_prob.tolist(), strict=True)
        answer["per_token"] = [
            {
                "token": id,
                "token_str": tokenizer.readable(id),
                "start": start,
                "end": end,
                "log_prob": log_prob,
            }
            for id, (start, end), log_prob in tokens
        ]
    return answer


def _perplexity(total: float, count: int) -> float | None:
    """exp(-PLL / N), Salazar et al. 2020. None without tokens, or if it exceeds the range of a float."""
    try:
        return math.exp(-total / count) if count else None
    except OverflowError:
        return None


# ---------------------------------------------------------------- both


def _checked_texts(service: Service, inputs: str | list[str]) -> list[str]:
    texts = [inputs] if isinstance(inputs, str) else inputs
    if len(texts) > service.limits.texts:
        message = f"{len(texts)} texts are more than the limit of {service.limits.texts}: send several requests"
        raise ApiError(413, "too_many_texts", message)
    if service.log_texts:
        log.info("texts %s", json.dumps(texts))
    return texts


def _json(value: Any) -> bytes:
    """UTF-8. Half surrogate pairs, which UTF-8 cannot hold, are replaced."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
