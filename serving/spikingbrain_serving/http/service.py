"""From a checked request to its answer: whole, or as server-sent events."""

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from ..async_llm import AsyncLLM
from ..errors import EngineStopped, InvalidRequest, Overloaded, RequestFailed
from ..sampling import SamplingParams
from ..sequence import CompletionOutput, Extras, RequestOutput
from ..sessions import SessionStore
from .answers import ModelCard
from .failures import MODEL_NOT_FOUND, TimedOut, error_body
from .protocol import GenerationRequest, StreamOptions
from .settings import HttpSettings
from .wire import Format, Ledger

CLIENT_CLOSED_REQUEST = 499
DONE = "data: [DONE]\n\n"
# A client that takes nothing for so long is gone.
SEND_SECONDS = 120
MID_STREAM_ERRORS = (InvalidRequest, Overloaded, RequestFailed, EngineStopped, TimedOut)


@dataclass
class Service:
    """What the routes work with: the engine, its sessions, and the name under which its model is served."""

    engine: AsyncLLM
    model_name: str
    settings: HttpSettings
    sessions: SessionStore
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


def service_of(request: Request) -> Service:
    """The application's one service."""
    return request.app.state.service


ServiceHere = Annotated[Service, Depends(service_of)]


def tenant_of(request: Request) -> str:
    """Whose share of the engine a request uses: its key's, or else its address's."""
    address = request.client.host if request.client else ""
    return getattr(request.state, "tenant", address)


@dataclass
class Job:
    """One HTTP request for completions, checked: `prompts` give `params.n` choices each, `format` writes them."""

    request_id: str
    prompts: list[list[int]]
    params: SamplingParams
    format: Format
    stream: bool
    options: StreamOptions
    extras: Extras

    def choice(self, index: int, output: CompletionOutput) -> int:
        """The number of the choice that an output of a prompt is."""
        return index * self.params.n + output.index


def make_job(
    body: GenerationRequest, prompts: list[list[int]], params: SamplingParams, wire: Format, extras: Extras
) -> Job:
    """A job as its body wants it."""
    options = body.stream_options or StreamOptions()
    return Job(wire.request_id, prompts, params, wire, bool(body.stream), options, extras)


class EventStream(StreamingResponse):
    """Server-sent events; a client that goes away, or takes nothing for long, closes the generator at once."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None]):
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            # Nobody is there to be told.
            return
        finally:
            await self._events.aclose()


async def answer(job: Job, request: Request, service: Service) -> Response:
    """The response to a job."""
    await require_servable(job, service)
    log, limit = request.state.log, service.settings.request_timeout
    if job.stream:
        return EventStream(_events(job, service.engine, log, limit))
    return await unless_disconnected(request, _collect(job, service.engine, log, limit))


async def require_servable(job: Job, service: Service) -> None:
    """Refuse before the first byte of a stream, after which no status can tell: `InvalidRequest` or `Overloaded`."""
    if not job.prompts:
        raise InvalidRequest("prompt is an empty list", param="prompt")
    if len(job.prompts) > service.settings.max_prompts:
        raise InvalidRequest(f"more than {service.settings.max_prompts} prompts", param="prompt")
    for prompt in job.prompts:
        service.engine.engine.check(prompt, job.params)
    service.engine.require_room(len(job.prompts))
    if job.params.structured is not None:
        await asyncio.to_thread(service.engine.engine.prepare, job.request_id, job.prompts[0], job.params)


async def outputs_of(
    job: Job, engine: AsyncLLM, log: dict[str, Any], limit: float | None
) -> AsyncGenerator[tuple[int, RequestOutput, Ledger], None]:
    """What is new, prompt by prompt, counted; raises `TimedOut` after `limit` seconds."""
    ledger = Ledger(job.prompts)
    try:
        async with asyncio.timeout(limit):
            async with aclosing(engine.generate_many(job.prompts, job.params, job.request_id, job.extras)) as outputs:
                async for index, new in outputs:
                    ledger.record(index, new)
                    yield index, new, ledger
    except TimeoutError:
        raise TimedOut(f"the answer took longer than {limit} s") from None
    finally:
        log.update(prompt_tokens=ledger.usage.prompt_tokens, completion_tokens=ledger.num_output_tokens)


async def _collect(job: Job, engine: AsyncLLM, log: dict[str, Any], limit: float | None) -> Response:
    results: dict[int, CompletionOutput] = {}
    ledger = Ledger(job.prompts)
    async with aclosing(outputs_of(job, engine, log, limit)) as outputs:
        async for index, new, ledger in outputs:  # noqa: B007
            (output,) = new.outputs
            choice = job.choice(index, output)
            if choice in results:
                results[choice].extend(output)
            else:
                results[choice] = output
    body = job.format.response([results[choice] for choice in sorted(results)], ledger.usage)
    return Response(body.model_dump_json(), media_type="application/json")


async def _events(job: Job, engine: AsyncLLM, log: dict[str, Any], limit: float | None) -> AsyncGenerator[str, None]:
    """The answer piece by piece; a failure in the middle is an event with an error."""
    try:
        async with aclosing(_chunks(job, engine, log, limit)) as chunks:
            async for chunk in chunks:
                yield f"data: {chunk.model_dump_json()}\n\n"
    except MID_STREAM_ERRORS as error:
        yield f"data: {error_body(str(error), 'server_error').model_dump_json()}\n\n"
    yield DONE


async def _chunks(job: Job, engine: AsyncLLM, log: dict[str, Any], limit: float | None) -> AsyncGenerator[Any, None]:
    for choice in range(len(job.prompts) * job.params.n):
        opening = job.format.opening(choice)
        if opening is not None:
            yield opening
    ledger = Ledger(job.prompts)
    async with aclosing(outputs_of(job, engine, log, limit)) as outputs:
        async for index, new, ledger in outputs:
            usage = ledger.usage if job.options.continuous_usage_stats else None
            (output,) = new.outputs
            if _says_something(output, with_tokens=job.format.return_token_ids):
                yield job.format.chunk(job.choice(index, output), output, usage)
    if job.options.include_usage:
        yield job.format.closing(ledger.usage)


def _says_something(output: CompletionOutput, *, with_tokens: bool) -> bool:
    """Not so while a character or a possible stop string is held back."""
    return bool(output.text or output.finish_reason or output.logprobs or output.spikes or with_tokens)


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The result of `work`, which is cancelled if the client goes away."""
    result = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnection(request))
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        return result.result() if result.done() else Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        result.cancel()
        gone.cancel()
        await asyncio.gather(result, gone, return_exceptions=True)


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
