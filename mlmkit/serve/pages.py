"""The page, its files, and the API's documentation: all of it from this machine."""

from functools import cache
from importlib import resources

from fastapi import APIRouter, Response

from mlmkit.serve.errors import ApiError

TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "png": "image/png", "svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
DOCS_POLICY = POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")  # Swagger's own styles
DOCS = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>mlmkit API</title><link rel="icon" href="static/icon.svg">
<link rel="stylesheet" href="static/swagger-ui.css"></head>
<body><div id="swagger-ui"></div><script src="static/swagger-ui-bundle.js"></script>
<script src="static/docs.js"></script></body></html>
"""
DOCS_SCRIPT = 'SwaggerUIBundle({ url: "openapi.json", dom_id: "#swagger-ui" });\n'


def page_router() -> APIRouter:
    """The page at `/`, its files under `/static`, the documentation at `/docs`."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page() -> Response:
        return _file("index.html", POLICY)

    @router.get("/docs")
    async def docs() -> Response:
        return _response(DOCS, "html", DOCS_POLICY)

    @router.get("/static/{name}")
    async def static(name: str) -> Response:
        return _response(DOCS_SCRIPT, "js", POLICY) if name == "docs.js" else _file(name, POLICY)

    @router.get("/favicon.ico")
    async def favicon() -> Response:
        return _file("icon.svg", POLICY)

    return router


def _file(name: str, policy: str) -> Response:
    content = _files().get(name)
    if content is None:
        raise ApiError(404, "not_found", "there is nothing at this path")
    return _response(content, name.rpartition(".")[2], policy)


def _response(content: str | bytes, kind: str, policy: str) -> Response:
    return Response(content, headers={"Content-Security-Policy": policy}, media_type=TYPES[kind])


@cache
def _files() -> dict[str, bytes]:
    """Every file that may be asked for, read once: nothing that a path says leads anywhere else."""
    own = {item.name: item.read_bytes() for item in (resources.files("mlmkit.serve") / "page").iterdir()}
    swagger = resources.files("fastapi_offline") / "static"
    return {name: content for name, content in own.items() if name.rpartition(".")[2] in TYPES} | {
        name: (swagger / name).read_bytes() for name in ("swagger-ui.css", "swagger-ui-bundle.js")
    }
