"""What operators ask: is it well, what does it count, which version is it."""

from importlib.metadata import version

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from ..errors import EngineStopped
from .generation import ERRORS
from .service import ServiceHere

router = APIRouter(responses=ERRORS)


@router.get("/health")
async def health(service: ServiceHere) -> dict[str, str]:
    """200 while requests are served, 503 when the engine has stopped."""
    if not service.engine.is_alive:
        raise EngineStopped("the engine has stopped")
    return {"status": "ok"}


@router.get("/version")
async def show_version() -> dict[str, str]:
    """The version of this package."""
    return {"version": version("spikingbrain")}


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Counts and durations in Prometheus' text form."""
    return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE_LATEST)
