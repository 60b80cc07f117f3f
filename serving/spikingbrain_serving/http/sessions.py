"""Sessions over HTTP: save, list, show, fork, restore, delete."""

import asyncio
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, Field

from ..engine import Engine
from ..errors import InvalidRequest
from ..prompts import encode_chat, render_chat, tokens_of
from ..sampling import SamplingParams
from ..sequence import CompletionOutput, Extras
from ..sessions import NAME, SessionInfo
from ..state_file import StoredState
from .generation import ERRORS
from .protocol import OMITTED, Body, ChatMessage
from .service import Service, ServiceHere, tenant_of

router = APIRouter(prefix="/v1/sessions", responses=ERRORS)
SessionName = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
SessionPath = Annotated[str, Path(pattern=f"^{NAME.pattern}$")]


class SaveRequest(Body):
    """What to save: the state after a text, tokens, or a conversation; under `id`, or a name that is made up."""

    id: SessionName | None = None
    prompt: str | list[int] | None = None
    messages: list[ChatMessage] | None = None


class ForkRequest(Body):
    """The name of the new session."""

    id: SessionName | None = None


class SessionObject(BaseModel):
    """A saved session. `bytes` is the size of its file, `cached_tokens` what was known when it was saved.

    `messages`: the conversation, where it is one and the session is restored.
    """

    id: str
    object: str = "session"
    created: int
    num_tokens: int
    bytes: int
    parent: str | None
    cached_tokens: int | None = OMITTED
    messages: list[dict[str, Any]] | None = OMITTED


class SessionList(BaseModel):
    """All sessions, the newest first."""

    object: str = "list"
    data: list[SessionObject]


class Deleted(BaseModel):
    """What was deleted."""

    id: str
    object: str = "session"
    deleted: bool = True


def _object(info: SessionInfo, cached_tokens: int | None = None) -> SessionObject:
    return SessionObject(**vars(info), cached_tokens=cached_tokens)


def _new_name() -> str:
    return f"sess_{uuid.uuid4().hex}"


@router.post("")
async def save(body: SaveRequest, request: Request, service: ServiceHere) -> SessionObject:
    """Compute the state after a prompt, reusing what is known of it, and save it."""
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    tokens, notes = await asyncio.to_thread(_read, body, service)
    snapshot, cached = None, 0
    extras = Extras(tenant=tenant_of(request), snapshot=True, prefill_only=True)
    params = SamplingParams(max_tokens=None)
    output = CompletionOutput()
    async for new in service.engine.generate(tokens, params, uuid.uuid4().hex, extras):
        (output,) = new.outputs
        cached = new.num_cached_tokens
    snapshot = output.snapshot
    if snapshot is None:
        raise InvalidRequest("the server is shutting down: nothing was saved")
    state = StoredState(tokens, snapshot, notes)
    return _object(await asyncio.to_thread(service.sessions.save, body.id or _new_name(), state), cached)


def _read(body: SaveRequest, service: Service) -> tuple[list[int], dict]:
    if body.messages is None:
        return tokens_of(service.tokenizer, body.prompt or ""), {}
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    text = render_chat(service.tokenizer, messages)
    return encode_chat(service.tokenizer, messages), {"messages": messages, "text": text}


@router.get("")
async def list_sessions(service: ServiceHere) -> SessionList:
    """Every saved session."""
    return SessionList(data=[_object(info) for info in await asyncio.to_thread(service.sessions.all)])


@router.get("/{name}")
async def show(name: SessionPath, service: ServiceHere) -> SessionObject:
    """One saved session."""
    return _object(await asyncio.to_thread(service.sessions.info, name))


@router.post("/{name}/fork")
async def fork(name: SessionPath, body: ForkRequest, service: ServiceHere) -> SessionObject:
    """Save a session under another name too; both go their own ways."""
    return _object(await asyncio.to_thread(service.sessions.fork, name, body.id or _new_name()))


@router.post("/{name}/restore")
async def restore(name: SessionPath, service: ServiceHere) -> SessionObject:
    """Read a session into memory: what begins with its tokens is not computed again."""
    state = await asyncio.to_thread(service.sessions.load, name)

    def insert(engine: Engine) -> None:
        if engine.prefixes is not None:
            engine.prefixes.insert(state.tokens[: state.snapshot.num_tokens], state.snapshot)

    await service.engine.call(insert)
    restored = _object(await asyncio.to_thread(service.sessions.info, name))
    return restored.model_copy(update={"messages": state.notes.get("messages")})


@router.delete("/{name}")
async def delete(name: SessionPath, service: ServiceHere) -> Deleted:
    """Remove a saved session."""
    await asyncio.to_thread(service.sessions.delete, name)
    return Deleted(id=name)
