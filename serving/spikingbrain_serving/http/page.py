"""The page at `/`: files of this package, and nothing from anywhere else."""

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from .generation import ERRORS

router = APIRouter(include_in_schema=False, responses=ERRORS)
MEDIA_TYPES = {"index.html": "text/html", "page.js": "text/javascript", "page.css": "text/css"}
# Nothing is loaded from elsewhere, whatever the page is made to say.
POLICY = "default-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"


@router.get("/")
async def index() -> Response:
    """The page."""
    return _file("index.html")


@router.get("/page/{name}")
async def asset(name: str) -> Response:
    """Its script and its style."""
    return _file(name)


def _file(name: str) -> Response:
    if name not in MEDIA_TYPES:
        raise HTTPException(404, "Not Found")
    content = files("spikingbrain_serving.http").joinpath("static", name).read_bytes()
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
    return Response(content, media_type=MEDIA_TYPES[name], headers=headers)
