"""The web page, its files, and the API's documentation. All come from this server: none needs a network."""

from functools import cache
from importlib import resources

from fastapi import APIRouter, Response

from mlmkit.serve.errors import ApiError

TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "png": "image/png", "svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
DOCS_POLICY = POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")  # Swagger has inline styles


def page_router() -> APIRouter:
    """Routes of the page (`/`), its files (`/static`) and the API's documentation (`/docs`)."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page() -> Response:
        return _file("index.html")

    @router.get("/docs")
    async def docs() -> Response:
        return _file("docs.html", DOCS_POLICY)

    @router.get("/static/{name}")
    async def static(name: str) -> Response:
        return _file(name)

    @router.get("/favicon.ico")
    async def favicon() -> Response:
        return _file("icon.svg")

    return router


def _file(name: str, policy: str = POLICY) -> Response:
    content = _files().get(name)
    if content is None:
        raise ApiError(404, "not_found", "nothing at this path")
    return Response(content, headers={"Content-Security-Policy": policy}, media_type=TYPES[name.rpartition(".")[2]])


@cache
def _files() -> dict[str, bytes]:
    """All files by name, read once: no path from a request reaches the file system."""
    page = (resources.files("mlmkit.serve") / "page").iterdir()
    swagger = (
        resources.files("fastapi_offline") / "static" / name for name in ("swagger-ui.css", "swagger-ui-bundle.js")
    )
    return {file.name: file.read_bytes() for file in (*page, *swagger) if file.name.rpartition(".")[2] in TYPES}
