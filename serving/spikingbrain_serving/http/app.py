"""The application: routes, limits and errors put together."""

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from ..async_llm import AsyncLLM
from ..sessions import SessionStore
from . import generation, operations, page, responses, sessions
from .failures import ERROR_HANDLERS
from .metrics import Metrics
from .middleware import AccessLog, Admission, KeyCheck
from .service import Service
from .settings import HttpSettings

ROUTERS = (generation.router, responses.router, sessions.router, operations.router, page.router)


def create_app(engine: AsyncLLM, model_name: str, settings: HttpSettings | None = None) -> FastAPI:
    """The application; it starts the engine's thread and stops it."""
    settings = settings or HttpSettings()
    temporary = None if settings.session_dir else tempfile.TemporaryDirectory(prefix="spikingbrain-sessions-")
    directory = settings.session_dir or Path(temporary.name)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()
        if temporary is not None:
            temporary.cleanup()

    app = FastAPI(title="spikingbrain", version=version("spikingbrain"), lifespan=lifespan)
    store = SessionStore(directory, engine.engine.identity, settings.session_bytes)
    app.state.service = Service(engine, model_name, settings, store)
    app.state.metrics = Metrics(engine, model_name)
    for router in ROUTERS:
        app.include_router(router)
    for kind, handler in ERROR_HANDLERS.items():
        app.add_exception_handler(kind, handler)
    _add_middleware(app, engine, settings)
    return app


def _add_middleware(app: FastAPI, engine: AsyncLLM, settings: HttpSettings) -> None:
    """The last one added sees a request first."""
    app.add_middleware(Admission, engine=engine, max_body_bytes=settings.max_body_bytes)
    app.add_middleware(KeyCheck, keys=settings.api_keys)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(AccessLog)
