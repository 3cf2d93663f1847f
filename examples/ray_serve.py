"""Fill-mask on Ray Serve: each replica loads the artifact once, and one engine call answers many requests.

pip install '.[serve]' 'ray[serve]'
cd examples && serve run ray_serve:app artifact=/path/to/artifact
curl http://127.0.0.1:8000/ --json '{"inputs": "Return the [MASK] of the file."}'
"""

import asyncio
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from mlmkit.backends import Batch, Scored, load, score_together
from mlmkit.errors import UserError
from mlmkit.fill import answer, rank_together, step
from mlmkit.questions import ask_all


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
            parameters |= parameters.pop("tokenizer_kwargs", None) or {}
            (question,) = ask_all(self.backend.tokenizer, self.backend.info, [body["inputs"]], **parameters)
        except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
            return JSONResponse({"error": str(error), "error_type": "invalid_request"}, 422)
        rounds = rank_together([question])
        rows, rankings = step(rounds)
        while rankings is None:
            rows, rankings = step(rounds, await asyncio.gather(*map(self.score, rows)))
        filled = answer(self.backend.tokenizer, question, rankings[0])
        return JSONResponse(filled if len(filled) > 1 else filled[0])

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.005)
    async def score(self, rows: list[Batch]) -> list[Scored]:
        calls = [rows] if self.is_mergeable else [[row] for row in rows]
        return [one for call in calls for one in await asyncio.to_thread(score_together, self.backend, call)]


def app(arguments: dict[str, Any]) -> serve.Application:
    """Build the application for `serve run ray_serve:app artifact=FOLDER`."""
    return FillMask.bind(arguments["artifact"])
