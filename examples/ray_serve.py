"""Fill-mask on Ray Serve: each replica loads the artifact once, and one engine call answers many requests.

pip install 'mlmkit[serve]' 'ray[serve]'
serve run ray_serve:app artifact=/path/to/artifact
curl http://127.0.0.1:8000/ --json '{"inputs": "Return the [MASK] of the file."}'
"""

import asyncio
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from mlmkit.backends import load, score_together
from mlmkit.errors import UserError
from mlmkit.fill import Candidate, Question, answer, ask_all


@serve.deployment(max_ongoing_requests=64)
class FillMask:
    """The schema of `mlmkit serve`, with one text per request."""

    def __init__(self, artifact: str) -> None:
        self.backend = load(artifact)
        info = self.backend.info
        self.is_mergeable = not (info.sees_padding or info.couples_batch)

    async def __call__(self, request: Request) -> JSONResponse:
        try:
            body = await request.json()
            parameters = body.get("parameters") or {}
            (question,) = ask_all(self.backend.tokenizer, self.backend.info, [body["inputs"]], **parameters)
        except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
            return JSONResponse({"error": str(error), "error_type": "invalid_request"}, 422)
        filled = await self.fill(question)
        return JSONResponse(filled if len(filled) > 1 else filled[0])

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.005)
    async def fill(self, questions: list[Question]) -> list[list[list[Candidate]]]:
        rows = [question.batch for question in questions]
        calls = [rows] if self.is_mergeable else [[row] for row in rows]
        predicted = [one for call in calls for one in await asyncio.to_thread(score_together, self.backend, call)]
        tokenizer = self.backend.tokenizer
        return [answer(tokenizer, question, one) for question, one in zip(questions, predicted, strict=True)]


def app(arguments: dict[str, Any]) -> serve.Application:
    """Build the application for `serve run ray_serve:app artifact=FOLDER`."""
    return FillMask.bind(arguments["artifact"])
