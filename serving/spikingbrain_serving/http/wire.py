"""Engine outputs in OpenAI's words: the two kinds of completion, whole and in pieces."""

import time
from collections import Counter
from typing import Any

from pydantic import BaseModel

from ..sampling import Logprob
from ..sequence import CompletionOutput, RequestOutput, TokenLogprobs
from .answers import (
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
    PromptTokensDetails,
    TopLogprob,
    Usage,
)
from .tools import ToolParser


class Ledger:
    """Tokens and bytes of the prompts of one HTTP request, for its `usage`."""

    def __init__(self, prompts: list[list[int]]):
        self._num_prompt_tokens = sum(map(len, prompts))
        self.num_output_tokens = 0
        self._num_cached = [0] * len(prompts)
        self._state_bytes: dict[tuple[int, int], int] = {}

    def record(self, index: int, output: RequestOutput) -> None:
        """Count what is new of a prompt's output."""
        completion = output.outputs[0]
        self.num_output_tokens += len(completion.token_ids)
        self._num_cached[index] = output.num_cached_tokens
        self._state_bytes[index, completion.index] = output.state_bytes

    @property
    def usage(self) -> Usage:
        """So far."""
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self.num_output_tokens,
            total_tokens=self._num_prompt_tokens + self.num_output_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._num_cached)),
            state_bytes=sum(self._state_bytes.values()),
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
        self.request_id = request_id
        self.return_token_ids = return_token_ids

    def _common(self, index: int, output: CompletionOutput) -> dict[str, Any]:
        return {
            "index": index,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
            "token_ids": output.token_ids if self.return_token_ids else None,
            "spikes": output.spikes,
        }

    def response(self, outputs: list[CompletionOutput], usage: Usage) -> BaseModel:
        """The whole answer, one choice an output."""
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

    def response(self, outputs: list[CompletionOutput], usage: Usage) -> CompletionResponse:
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        return CompletionResponse(choices=choices, usage=usage, **self._envelope)

    def opening(self, index: int) -> None:  # noqa: ARG002
        return None

    def chunk(self, index: int, output: CompletionOutput, usage: Usage | None) -> CompletionResponse:
        return CompletionResponse(choices=[self._choice(index, output)], usage=usage, **self._envelope)

    def closing(self, usage: Usage) -> CompletionResponse:
        return CompletionResponse(choices=[], usage=usage, **self._envelope)


class ChatFormat(Format):
    """/v1/chat/completions; `num_top`: likeliest tokens to list where log-probabilities were asked for.

    `tools`: whether the text may hold calls; `must_call`: it is one.
    """

    prefix = "chatcmpl"

    def __init__(
        self, request_id: str, model: str, *, return_token_ids: bool, num_top: int, tools: bool, must_call: bool
    ):
        super().__init__(request_id, model, return_token_ids=return_token_ids)
        self._num_top = num_top
        self._must_call = must_call
        self._tools = tools
        self._parsers: dict[int, ToolParser] = {}

    def response(self, outputs: list[CompletionOutput], usage: Usage) -> ChatCompletionResponse:
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        return ChatCompletionResponse(choices=choices, usage=usage, **self._envelope)

    def _parse(self, index: int, output: CompletionOutput) -> dict[str, Any]:
        """Text and calls of a piece, and why the choice ended."""
        if not self._tools:
            return {"content": output.text}
        parser = self._parsers.setdefault(index, ToolParser(forced=self._must_call))
        text, calls = parser.feed(output.text, last=output.finish_reason is not None)
        return {"content": text, "tool_calls": calls or None}

    def _common(self, index: int, output: CompletionOutput) -> dict[str, Any]:
        common = super()._common(index, output)
        if output.finish_reason == "stop" and index in self._parsers and self._parsers[index].num_calls:
            common["finish_reason"] = "tool_calls"
        return common

    def _choice(self, index: int, output: CompletionOutput) -> ChatChoice:
        message = AssistantMessage(role="assistant", **self._parse(index, output))
        return ChatChoice(message=message, logprobs=self._logprobs(output), **self._common(index, output))

    def opening(self, index: int) -> ChatCompletionChunk:
        return self._chunk(index, AssistantMessage(role="assistant", content=""), CompletionOutput(), None)

    def chunk(self, index: int, output: CompletionOutput, usage: Usage | None) -> ChatCompletionChunk:
        parsed = self._parse(index, output)
        return self._chunk(index, AssistantMessage(**{**parsed, "content": parsed["content"] or None}), output, usage)

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
