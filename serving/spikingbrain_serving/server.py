"""The HTTP interface: routes, errors and the way from a request to its answer, whole or as server-sent events."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from .async_engine import AsyncEngine
from .errors import EngineStopped, InvalidRequest, RequestFailed
from .prompts import encode_chat, tokens_of
from .protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompletionRequest,
    CompletionResponse,
    ErrorDetail,
    ErrorResponse,
    GenerationRequest,
    ModelCard,
    ModelList,
    StreamOptions,
)
from .sampling import SamplingParams
from .sequence import RequestOutput
from .wire import ChatFormat, CompletionFormat, Format, Ledger

CLIENT_CLOSED_REQUEST = 499
MODEL_NOT_FOUND = "model_not_found"
DONE = "data: [DONE]\n\n"


@dataclass
class Service:
    """What the routes work with: the engine, and the name under which its model is served."""

    engine: AsyncEngine
    model_name: str
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self) -> Any:
        return self.engine.engine.tokenizer

    def require_model(self, name: str | None) -> None:
        """Raise `InvalidRequest` for the name of another model; none means ours."""
        if name not in (None, self.model_name):
            message = f"the model {name!r} does not exist; this server has {self.model_name!r}"
            raise InvalidRequest(message, param="model", code=MODEL_NOT_FOUND)

    def model_card(self) -> ModelCard:
        """The entry of the list of models."""
        return ModelCard(id=self.model_name, created=self.created, max_model_len=self.engine.engine.max_model_len)


@dataclass
class Job:
    """One HTTP request for completions, checked: `prompts` are its choices, `format` writes them."""

    request_id: str
    prompts: list[list[int]]
    params: SamplingParams
    format: Format
    stream: bool
    options: StreamOptions


class EventStream(StreamingResponse):
    """Server-sent events; a client that goes away closes the generator at once."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None]):
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


def _service(request: Request) -> Service:
    return request.app.state.service


ServiceHere = Annotated[Service, Depends(_service)]
router = APIRouter(responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}})


def create_app(engine: AsyncEngine, model_name: str) -> FastAPI:
    """The application; it starts the engine's thread and stops it."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()

    app = FastAPI(title="spikingbrain", version=version("spikingbrain"), lifespan=lifespan)
    app.state.service = Service(engine, model_name)
    app.include_router(router)
    for kind, handler in ERROR_HANDLERS.items():
        app.add_exception_handler(kind, handler)
    return app


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


@router.get("/v1/models")
async def list_models(service: ServiceHere) -> ModelList:
    """The one model served."""
    return ModelList(data=[service.model_card()])


@router.get("/v1/models/{name:path}")
async def show_model(name: str, service: ServiceHere) -> ModelCard:
    """The model, if the name is its own."""
    service.require_model(name)
    return service.model_card()


@router.post("/v1/completions", response_model=CompletionResponse)
async def completions(body: CompletionRequest, request: Request, service: ServiceHere) -> Response:
    """Continue texts or tokens."""
    service.require_model(body.model)
    params = body.sampling_params()
    prompts = [await asyncio.to_thread(tokens_of, service.tokenizer, prompt) for prompt in body.prompts]
    request_id = uuid.uuid4().hex
    wire = CompletionFormat(request_id, service.model_name, return_token_ids=bool(body.return_token_ids))
    return await _answer(_job(request_id, body, prompts, params, wire), request, service.engine)


@router.post("/v1/chat/completions", response_model=ChatCompletionResponse)
async def chat_completions(body: ChatCompletionRequest, request: Request, service: ServiceHere) -> Response:
    """Answer a conversation."""
    service.require_model(body.model)
    params = body.sampling_params()
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    prompt = await asyncio.to_thread(encode_chat, service.tokenizer, messages)
    request_id = uuid.uuid4().hex
    wire = ChatFormat(
        request_id,
        service.model_name,
        return_token_ids=bool(body.return_token_ids),
        num_top=params.logprobs or 0,
    )
    return await _answer(_job(request_id, body, [prompt], params, wire), request, service.engine)


def _job(
    request_id: str, body: GenerationRequest, prompts: list[list[int]], params: SamplingParams, wire: Format
) -> Job:
    options = body.stream_options or StreamOptions()
    return Job(request_id, prompts, params, wire, bool(body.stream), options)


async def _answer(job: Job, request: Request, engine: AsyncEngine) -> Response:
    if not job.prompts:
        raise InvalidRequest("prompt is an empty list", param="prompt")
    for prompt in job.prompts:
        # Before the first byte of a stream, after which no status can tell.
        engine.engine.check(prompt, job.params)
    if job.stream:
        return EventStream(_events(job, engine))
    return await _unless_disconnected(request, _collect(job, engine))


async def _collect(job: Job, engine: AsyncEngine) -> Response:
    """The whole answer."""
    ledger = Ledger(job.prompts)
    results: dict[int, RequestOutput] = {}
    async with aclosing(engine.generate_many(job.prompts, job.params, job.request_id)) as outputs:
        async for index, new in outputs:
            ledger.record(index, new)
            if index in results:
                results[index].extend(new)
            else:
                results[index] = new
    answer = job.format.response([results[index] for index in sorted(results)], ledger.usage)
    return Response(answer.model_dump_json(), media_type="application/json")


async def _events(job: Job, engine: AsyncEngine) -> AsyncGenerator[str, None]:
    """The answer piece by piece; a failure in the middle is an event with an error."""
    try:
        async with aclosing(_chunks(job, engine)) as chunks:
            async for chunk in chunks:
                yield f"data: {chunk.model_dump_json()}\n\n"
    except (RequestFailed, EngineStopped) as error:
        body = ErrorResponse(error=ErrorDetail(message=str(error), type="server_error", param=None, code=None))
        yield f"data: {body.model_dump_json()}\n\n"
    yield DONE


async def _chunks(job: Job, engine: AsyncEngine) -> AsyncGenerator[Any, None]:
    ledger = Ledger(job.prompts)
    for index in range(len(job.prompts)):
        opening = job.format.opening(index)
        if opening is not None:
            yield opening
    async with aclosing(engine.generate_many(job.prompts, job.params, job.request_id)) as outputs:
        async for index, new in outputs:
            ledger.record(index, new)
            usage = ledger.usage if job.options.continuous_usage_stats else None
            if _says_something(new, with_tokens=job.format.return_token_ids):
                yield job.format.chunk(index, new.outputs[0], usage)
    if job.options.include_usage:
        yield job.format.closing(ledger.usage)


def _says_something(new: RequestOutput, *, with_tokens: bool) -> bool:
    """Not so while a character or a possible stop string is held back."""
    output = new.outputs[0]
    return bool(output.text or new.finished or output.logprobs or with_tokens)


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The result of `work`, which is cancelled if the client goes away."""
    answer = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnection(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        answer.cancel()
        gone.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = ErrorResponse(error=ErrorDetail(message=message, type=kind, param=param, code=code))
    return JSONResponse(body.model_dump(), status)


async def _on_invalid(_request: Request, error: Any) -> JSONResponse:
    return _error(404 if error.code == MODEL_NOT_FOUND else 400, str(error), error.param, error.code)


async def _on_wrong_body(_request: Request, error: Any) -> JSONResponse:
    """One message for the first field at fault, however many alternatives its type has."""
    first = error.errors()[0]
    field_name = next((part for part in first["loc"][1:] if isinstance(part, str)), None)
    reasons = [problem["msg"] for problem in error.errors() if problem["loc"][:2] == first["loc"][:2]]
    where = f"{field_name}: " if field_name else ""
    return _error(400, where + "; ".join(dict.fromkeys(reasons)), field_name)


async def _on_http_error(_request: Request, error: Any) -> JSONResponse:
    return _error(error.status_code, error.detail)


async def _on_failure(_request: Request, error: Exception) -> JSONResponse:
    return _error(503 if isinstance(error, EngineStopped) else 500, str(error))


async def _on_bug(_request: Request, error: Exception) -> JSONResponse:
    """The traceback goes to the log, not to the client."""
    return _error(500, f"internal error: {type(error).__name__}")


ERROR_HANDLERS: dict[type[Exception], Any] = {
    InvalidRequest: _on_invalid,
    RequestValidationError: _on_wrong_body,
    HTTPException: _on_http_error,
    RequestFailed: _on_failure,
    EngineStopped: _on_failure,
    Exception: _on_bug,
}
