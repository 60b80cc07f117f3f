"""Engine outputs in OpenAI's words: the two kinds of completion, whole and in pieces."""

import time
from collections import Counter
from typing import Any

from pydantic import BaseModel

from .protocol import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionResponse,
    ChatLogprob,
    ChatLogprobs,
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    TopLogprob,
    Usage,
)
from .sampling import Logprob
from .sequence import CompletionOutput, RequestOutput, TokenLogprobs


class Ledger:
    """Tokens and bytes of the prompts of one HTTP request, for its `usage`."""

    def __init__(self, prompts: list[list[int]]):
        self._num_prompt_tokens = sum(map(len, prompts))
        self._num_output_tokens = 0
        self._state_bytes = [0] * len(prompts)

    def record(self, index: int, output: RequestOutput) -> None:
        """Count what is new of a prompt's output."""
        self._num_output_tokens += len(output.outputs[0].token_ids)
        self._state_bytes[index] = output.state_bytes

    @property
    def usage(self) -> Usage:
        """So far."""
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_output_tokens,
            total_tokens=self._num_prompt_tokens + self._num_output_tokens,
            state_bytes=sum(self._state_bytes),
        )


class Format:
    """How the outputs of one HTTP request are written; `return_token_ids` adds the tokens to each choice."""

    prefix = ""

    def __init__(self, request_id: str, model: str, *, return_token_ids: bool):
        self._envelope: dict[str, Any] = {
            "id": f"{self.prefix}-{request_id}",
            "created": int(time.time()),
            "model": model,
        }
        self.return_token_ids = return_token_ids

    def _common(self, index: int, output: CompletionOutput) -> dict[str, Any]:
        return {
            "index": index,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
            "token_ids": output.token_ids if self.return_token_ids else None,
        }

    def response(self, outputs: list[RequestOutput], usage: Usage) -> BaseModel:
        """The whole answer."""
        raise NotImplementedError

    def opening(self, index: int) -> BaseModel | None:
        """What comes before a choice's first piece."""
        raise NotImplementedError

    def chunk(self, index: int, output: CompletionOutput, usage: Usage | None) -> BaseModel:
        """A piece of a choice."""
        raise NotImplementedError

    def closing(self, usage: Usage) -> BaseModel:
        """The chunk without choices that carries the usage."""
        raise NotImplementedError


class CompletionFormat(Format):
    """/v1/completions."""

    prefix = "cmpl"

    def __init__(self, request_id: str, model: str, *, return_token_ids: bool):
        super().__init__(request_id, model, return_token_ids=return_token_ids)
        self._num_characters: Counter[int] = Counter()

    def _choice(self, index: int, output: CompletionOutput) -> CompletionChoice:
        logprobs = None if output.logprobs is None else self._logprobs(index, output)
        return CompletionChoice(text=output.text, logprobs=logprobs, **self._common(index, output))

    def _logprobs(self, index: int, output: CompletionOutput) -> CompletionLogprobs:
        chosen = [entries[token] for token, entries in _entries(output)]
        offsets = []
        for entry in chosen:
            offsets.append(self._num_characters[index])
            self._num_characters[index] += len(entry.decoded_token)
        return CompletionLogprobs(
            text_offset=offsets,
            tokens=[entry.decoded_token for entry in chosen],
            token_logprobs=[entry.logprob for entry in chosen],
            top_logprobs=[{e.decoded_token: e.logprob for e in entries.values()} for _, entries in _entries(output)],
        )

    def response(self, outputs: list[RequestOutput], usage: Usage) -> CompletionResponse:
        choices = [self._choice(index, output.outputs[0]) for index, output in enumerate(outputs)]
        return CompletionResponse(choices=choices, usage=usage, **self._envelope)

    def opening(self, index: int) -> None:  # noqa: ARG002
        return None

    def chunk(self, index: int, output: CompletionOutput, usage: Usage | None) -> CompletionResponse:
        return CompletionResponse(choices=[self._choice(index, output)], usage=usage, **self._envelope)

    def closing(self, usage: Usage) -> CompletionResponse:
        return CompletionResponse(choices=[], usage=usage, **self._envelope)


class ChatFormat(Format):
    """/v1/chat/completions; `num_top`: likeliest tokens to list where log-probabilities were asked for."""

    prefix = "chatcmpl"

    def __init__(self, request_id: str, model: str, *, return_token_ids: bool, num_top: int):
        super().__init__(request_id, model, return_token_ids=return_token_ids)
        self._num_top = num_top

    def response(self, outputs: list[RequestOutput], usage: Usage) -> ChatCompletionResponse:
        choices = [self._choice(index, output.outputs[0]) for index, output in enumerate(outputs)]
        return ChatCompletionResponse(choices=choices, usage=usage, **self._envelope)

    def _choice(self, index: int, output: CompletionOutput) -> ChatChoice:
        message = AssistantMessage(role="assistant", content=output.text)
        return ChatChoice(message=message, logprobs=self._logprobs(output), **self._common(index, output))

    def opening(self, index: int) -> ChatCompletionChunk:
        return self._chunk(index, AssistantMessage(role="assistant", content=""), CompletionOutput(), None)

    def chunk(self, index: int, output: CompletionOutput, usage: Usage | None) -> ChatCompletionChunk:
        return self._chunk(index, AssistantMessage(content=output.text or None), output, usage)

    def closing(self, usage: Usage) -> ChatCompletionChunk:
        return ChatCompletionChunk(choices=[], usage=usage, **self._envelope)

    def _chunk(
        self, index: int, delta: AssistantMessage, output: CompletionOutput, usage: Usage | None
    ) -> ChatCompletionChunk:
        choice = ChatChunkChoice(delta=delta, logprobs=self._logprobs(output), **self._common(index, output))
        return ChatCompletionChunk(choices=[choice], usage=usage, **self._envelope)

    def _logprobs(self, output: CompletionOutput) -> ChatLogprobs | None:
        if output.logprobs is None:
            return None
        return ChatLogprobs(content=[self._logprob(token, entries) for token, entries in _entries(output)])

    def _logprob(self, token: int, entries: TokenLogprobs) -> ChatLogprob:
        likeliest = sorted(entries.values(), key=lambda entry: entry.rank)
        top = [TopLogprob(**_token_text(entry)) for entry in likeliest if entry.rank <= self._num_top]
        return ChatLogprob(**_token_text(entries[token]), top_logprobs=top)


def _entries(output: CompletionOutput) -> list[tuple[int, TokenLogprobs]]:
    """Each token and its log-probabilities."""
    return list(zip(output.token_ids, output.logprobs or [], strict=True))


def _token_text(entry: Logprob) -> dict[str, Any]:
    text = entry.decoded_token
    return {"token": text, "logprob": entry.logprob, "bytes": list(text.encode())}
