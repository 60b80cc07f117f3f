"""Completions and chat, models, and the tokenizer."""

import asyncio
import uuid

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..errors import InvalidRequest
from ..prompts import encode, encode_chat, tokens_of
from ..sequence import Extras
from ..snapshot import Snapshot
from .answers import (
    ChatCompletionResponse,
    CompletionResponse,
    DetokenizeResponse,
    ErrorResponse,
    ModelCard,
    ModelList,
    TokenizeResponse,
)
from .protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from .service import Service, ServiceHere, answer, make_job, tenant_of
from .wire import ChatFormat, CompletionFormat

ERRORS: dict[int | str, dict] = {"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}}
router = APIRouter(responses=ERRORS)


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
    """Continue texts or tokens, or a saved session."""
    service.require_model(body.model)
    params = body.sampling_params()
    before, resume = await _session(body.session, service)
    prompts = [before + await asyncio.to_thread(tokens_of, service.tokenizer, prompt) for prompt in body.prompts]
    wire = CompletionFormat(uuid.uuid4().hex, service.model_name, return_token_ids=bool(body.return_token_ids))
    extras = Extras(tenant=tenant_of(request), spikes=bool(body.return_spikes), resume=resume)
    return await answer(make_job(body, prompts, params, wire, extras), request, service)


async def _session(name: str | None, service: Service) -> tuple[list[int], Snapshot | None]:
    if name is None:
        return [], None
    state = await asyncio.to_thread(service.sessions.load, name)
    return state.tokens, state.snapshot


@router.post("/v1/chat/completions", response_model=ChatCompletionResponse)
async def chat_completions(body: ChatCompletionRequest, request: Request, service: ServiceHere) -> Response:
    """Answer a conversation."""
    service.require_model(body.model)
    params = body.sampling_params()
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    tools = [tool.model_dump(exclude_none=True) for tool in body.offered_tools] or None
    prompt = await asyncio.to_thread(encode_chat, service.tokenizer, messages, tools)
    wire = ChatFormat(
        uuid.uuid4().hex,
        service.model_name,
        return_token_ids=bool(body.return_token_ids),
        num_top=params.logprobs or 0,
        tools=bool(tools),
        must_call=body.must_call,
    )
    extras = Extras(tenant=tenant_of(request), spikes=bool(body.return_spikes))
    return await answer(make_job(body, [prompt], params, wire, extras), request, service)


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, service: ServiceHere) -> TokenizeResponse:
    """The tokens of a text or of a conversation."""
    service.require_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    if body.messages is not None:
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        tokens = await asyncio.to_thread(encode_chat, service.tokenizer, messages)
    else:
        special = body.add_special_tokens is not False
        tokens = await asyncio.to_thread(encode, service.tokenizer, body.prompt, add_special_tokens=special)
    return TokenizeResponse(count=len(tokens), max_model_len=service.engine.engine.max_model_len, tokens=tokens)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, service: ServiceHere) -> DetokenizeResponse:
    """The text of tokens."""
    service.require_model(body.model)
    vocabulary = len(service.tokenizer)
    if any(not 0 <= token < vocabulary for token in body.tokens):
        raise InvalidRequest(f"tokens are numbers from 0 to {vocabulary - 1}", param="tokens")
    return DetokenizeResponse(prompt=await asyncio.to_thread(service.tokenizer.decode, body.tokens))
