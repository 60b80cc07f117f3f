"""The HTTP bodies, OpenAI's, with vLLM's additional fields under vLLM's names.

Wrong types are refused; fields nobody here knows are ignored, as clients send many. Fields that are known, would change
the answer and are not supported yet are refused by name unless they say what is done anyway.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .errors import InvalidRequest
from .sampling import SamplingParams

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "suffix": ("",),
    "tools": ([],),
    "use_beam_search": (False,),
}
# For fields that clients expect to be absent, not null.
OMITTED: Any = Field(default=None, exclude_if=lambda value: value is None)
SAMPLING_FIELDS = ("n", "min_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos")


class Body(BaseModel):
    """What clients send: strict types, finite numbers, further fields ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """`include_usage`: one more chunk at the end, with the usage; `continuous_usage_stats`: usage in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(Body):
    """What both kinds of request share."""

    # Kept, not read, so that those which must be refused can be seen.
    model_config = ConfigDict(extra="allow")

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    def params(self, **limits: Any) -> SamplingParams:
        """The sampling settings; raises `InvalidRequest` naming a field that is out of range or not supported."""
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED and value is not None and value not in UNSUPPORTED[name]:
                raise InvalidRequest(f"{name} is not supported", param=name, code="unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
        given = {name: getattr(self, name) for name in SAMPLING_FIELDS if getattr(self, name) is not None}
        return SamplingParams(**given, **limits)


class CompletionRequest(GenerationRequest):
    """Body of /v1/completions: `prompt` is a text, tokens, or a list of either."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry a choice."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    def sampling_params(self) -> SamplingParams:
        """As OpenAI's default, 16 tokens if nothing is said."""
        limits = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        return self.params(**limits, logprobs=self.logprobs)


class ContentPart(Body):
    """A part of a message; only text is understood."""

    type: str
    text: str = ""


class ChatMessage(Body):
    """One message of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None


class ChatCompletionRequest(GenerationRequest):
    """Body of /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def sampling_params(self) -> SamplingParams:
        """Without a limit, as many tokens as the model length leaves."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.params(max_tokens=limit, logprobs=(self.top_logprobs or 0) if self.logprobs else None)


class Usage(BaseModel):
    """Tokens read and written, and the bytes of state the sequences held in the end."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
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
    stop_reason: str | None
    token_ids: list[int] | None = OMITTED


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


class ChatChoice(BaseModel):
    """The answer to a conversation."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | None
    token_ids: list[int] | None = OMITTED


class ChatChunkChoice(BaseModel):
    """A piece of the answer to a conversation."""

    index: int
    delta: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | None
    token_ids: list[int] | None = OMITTED


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
