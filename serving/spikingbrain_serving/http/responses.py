"""/v1/responses: answers that are kept with their state, so that the next one goes on where this one ended."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..conversation import continued, notes_of
from ..errors import InvalidRequest
from ..prompts import render_chat
from ..sampling import SamplingParams
from ..sequence import CompletionOutput, Extras
from ..sessions import RESPONSE_PREFIX
from ..snapshot import Snapshot
from ..state_file import StoredState
from .failures import error_body
from .generation import ERRORS
from .protocol import StreamOptions
from .response_protocol import (
    InputTokensDetails,
    OutputMessage,
    OutputText,
    ResponseEvent,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
)
from .service import (
    MID_STREAM_ERRORS,
    EventStream,
    Job,
    Service,
    ServiceHere,
    outputs_of,
    require_servable,
    tenant_of,
    unless_disconnected,
)
from .sessions import Deleted, SessionPath
from .wire import CompletionFormat, Ledger

router = APIRouter(prefix="/v1/responses", responses=ERRORS)
STATUS = {"stop": "completed", "length": "incomplete", "abort": "cancelled"}


@dataclass
class Turn:
    """One turn of a conversation on its way: the whole conversation, its text, its tokens, what is known of them."""

    body: ResponsesRequest
    id: str
    messages: list[dict[str, Any]]
    text: str
    tokens: list[int]
    resume: Snapshot | None
    params: SamplingParams
    created: int


@router.post("", response_model=ResponseObject)
async def create(body: ResponsesRequest, request: Request, service: ServiceHere) -> Response:
    """Answer; with `previous_response_id`, going on from the state that was kept."""
    service.require_model(body.model)
    turn = await asyncio.to_thread(_begin, body, service)
    extras = Extras(
        tenant=tenant_of(request), resume=turn.resume, spikes=bool(body.return_spikes), snapshot=body.store is not False
    )
    wire = CompletionFormat(turn.id, service.model_name, return_token_ids=False)
    job = Job(turn.id, [turn.tokens], turn.params, wire, bool(body.stream), StreamOptions(), extras)
    await require_servable(job, service)
    if body.stream:
        return EventStream(_events(turn, job, request, service))
    return await unless_disconnected(request, _whole(turn, job, request, service))


def _begin(body: ResponsesRequest, service: Service) -> Turn:
    """The conversation so far and its tokens: those that the model has really read and written, where they are kept."""
    params = body.sampling_params()
    before: list[dict[str, Any]] = []
    state = None
    if body.previous_response_id is not None:
        try:
            state = service.sessions.load(body.previous_response_id)
        except InvalidRequest as error:
            raise InvalidRequest(str(error), "previous_response_id", error.code) from None
        before = state.notes.get("messages", [])
    messages = body.messages(before)
    text = render_chat(service.tokenizer, messages)
    start = continued(service.tokenizer, state, text)
    tokens, resume = (start, None) if isinstance(start, list) else (start.tokens, start.snapshot)
    return Turn(body, RESPONSE_PREFIX + uuid.uuid4().hex, messages, text, tokens, resume, params, int(time.time()))


async def _whole(turn: Turn, job: Job, request: Request, service: Service) -> Response:
    result, ledger = CompletionOutput(), Ledger(job.prompts)
    limit = service.settings.request_timeout
    async with aclosing(outputs_of(job, service.engine, request.state.log, limit)) as outputs:
        async for _, new, ledger in outputs:  # noqa: B007
            result.extend(new.outputs[0])
    response = await _finish(turn, result, ledger, service)
    return Response(response.model_dump_json(), media_type="application/json")


async def _finish(turn: Turn, result: CompletionOutput, ledger: Ledger, service: Service) -> ResponseObject:
    """The answer, kept if it is to be."""
    response = _response(turn, service.model_name, result, ledger)
    if result.snapshot is not None:
        notes = {**notes_of(turn.messages, turn.text, result), "response": response.model_dump()}
        state = StoredState(turn.tokens + result.token_ids, result.snapshot, notes)
        await asyncio.to_thread(service.sessions.save, turn.id, state, turn.body.previous_response_id)
    return response


def _response(turn: Turn, model: str, result: CompletionOutput | None, ledger: Ledger | None) -> ResponseObject:
    """The response as it stands: begun (`result` None) or ended."""
    body = turn.body
    status = "in_progress" if result is None else STATUS[result.finish_reason]
    ended = result is not None
    return ResponseObject(
        id=turn.id,
        created_at=turn.created,
        status=status,
        incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
        instructions=body.instructions,
        metadata=body.metadata or {},
        model=model,
        output=[_message(turn, result.text, status)] if ended else [],
        previous_response_id=body.previous_response_id,
        store=body.store is not False,
        temperature=turn.params.temperature,
        top_p=turn.params.top_p,
        max_output_tokens=body.max_output_tokens,
        text=body.text_or_default,
        usage=_usage(ledger) if ended else None,
    )


def _message(turn: Turn, text: str, status: str) -> OutputMessage:
    return OutputMessage(
        id=f"msg_{turn.id.removeprefix(RESPONSE_PREFIX)}", status=status, content=[OutputText(text=text)]
    )


def _usage(ledger: Ledger) -> ResponseUsage:
    usage = ledger.usage
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        state_bytes=usage.state_bytes,
    )


class _Events:
    """Writes the events of one stream, numbered."""

    def __init__(self) -> None:
        self._number = -1

    def __call__(self, kind: str, **fields: Any) -> str:
        self._number += 1
        event = ResponseEvent(type=f"response.{kind}", sequence_number=self._number, **fields)
        return f"event: {event.type}\ndata: {event.model_dump_json()}\n\n"


async def _events(turn: Turn, job: Job, request: Request, service: Service) -> AsyncGenerator[str, None]:
    event, model = _Events(), service.model_name
    begun = _response(turn, model, None, None)
    where = {"item_id": f"msg_{turn.id.removeprefix(RESPONSE_PREFIX)}", "output_index": 0, "content_index": 0}
    yield event("created", response=begun)
    yield event("in_progress", response=begun)
    opened = {**_message(turn, "", "in_progress").model_dump(), "content": []}
    yield event("output_item.added", output_index=0, item=opened)
    yield event("content_part.added", part=OutputText(text="").model_dump(), **where)
    result, ledger = CompletionOutput(), Ledger(job.prompts)
    try:
        limit = service.settings.request_timeout
        async with aclosing(outputs_of(job, service.engine, request.state.log, limit)) as outputs:
            async for _, new, ledger in outputs:  # noqa: B007
                result.extend(new.outputs[0])
                output = new.outputs[0]
                if output.text or output.spikes:
                    more = {"state_bytes": new.state_bytes, "spikes": output.spikes}
                    yield event("output_text.delta", delta=output.text, logprobs=[], **more, **where)
        response = await _finish(turn, result, ledger, service)
    except MID_STREAM_ERRORS as error:
        failed = error_body(str(error), "server_error").error
        begun = begun.model_copy(update={"status": "failed", "error": {"code": "server_error", "message": str(error)}})
        yield event("failed", response=begun, error=failed.model_dump())
        return
    yield event("output_text.done", text=result.text, logprobs=[], **where)
    yield event("content_part.done", part=OutputText(text=result.text).model_dump(), **where)
    yield event("output_item.done", output_index=0, item=response.output[0].model_dump())
    yield event(response.status, response=response)


@router.get("/{name}")
async def show(name: SessionPath, service: ServiceHere) -> ResponseObject:
    """A response that was kept."""
    state = await asyncio.to_thread(service.sessions.load, name)
    if "response" not in state.notes:
        raise InvalidRequest(f"{name} is a session, not a response", param="id", code="session_not_found")
    return ResponseObject(**state.notes["response"])


@router.delete("/{name}")
async def delete(name: SessionPath, service: ServiceHere) -> Deleted:
    """Remove a response and its state."""
    await asyncio.to_thread(service.sessions.delete, name)
    return Deleted(id=name, object="response")
