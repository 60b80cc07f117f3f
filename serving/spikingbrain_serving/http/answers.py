"""What clients get: OpenAI's bodies, with vLLM's additional fields under vLLM's names, and our own `state_bytes`."""

from typing import Literal

from pydantic import BaseModel

from .protocol import OMITTED, ToolCall


class PromptTokensDetails(BaseModel):
    """Tokens of the prompts whose state was known and that were not computed again."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens read and written, and the bytes of state the sequences held in the end."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    state_bytes: int


class CompletionLogprobs(BaseModel):
    """One entry a token; `text_offset` counts characters of the tokens' texts."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class CompletionChoice(BaseModel):
    """The completion of one prompt, or a piece of it. `token_ids` only if the request has `return_token_ids`."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: list[int] | None = OMITTED
    spikes: list[dict[str, list[int]]] | None = OMITTED


class CompletionResponse(BaseModel):
    """Answer of /v1/completions, and each chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = OMITTED


class TopLogprob(BaseModel):
    """A token that was likely."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A token that was chosen."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry a token."""

    content: list[ChatLogprob]


class AssistantMessage(BaseModel):
    """The answer; in a stream (`delta`) a piece of it, the role in the first only."""

    role: Literal["assistant"] | None = OMITTED
    content: str | None = OMITTED
    tool_calls: list[ToolCall] | None = OMITTED


class ChatChoice(BaseModel):
    """The answer to a conversation."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: list[int] | None = OMITTED
    spikes: list[dict[str, list[int]]] | None = OMITTED


class ChatChunkChoice(BaseModel):
    """A piece of the answer to a conversation."""

    index: int
    delta: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: list[int] | None = OMITTED
    spikes: list[dict[str, list[int]]] | None = OMITTED


class ChatCompletionResponse(BaseModel):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(BaseModel):
    """A chunk of the stream of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = OMITTED


class TokenizeResponse(BaseModel):
    """Answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeResponse(BaseModel):
    """Answer of /detokenize."""

    prompt: str


class ModelCard(BaseModel):
    """The model served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "spikingbrain"
    max_model_len: int


class ModelList(BaseModel):
    """Answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """What went wrong, for people (`message`) and programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Body of every answer that is not a success."""

    error: ErrorDetail
