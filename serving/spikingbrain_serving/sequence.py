"""One request on its way through the engine, and what the engine hands out of it."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .sampling import Logprob, SamplingParams
from .text import Detokenizer, StopStrings

FinishReason = Literal["stop", "length", "abort", "error"]
TokenLogprobs = dict[int, Logprob]


@dataclass
class CompletionOutput:
    """Generated text and tokens. `stop_reason`: the stop string that ended it; `error`: why it failed."""

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None
    error: str | None = None

    def extend(self, later: "CompletionOutput") -> None:
        """Add what came later."""
        self.text += later.text
        self.token_ids += later.token_ids
        if later.logprobs is not None:
            self.logprobs = (self.logprobs or []) + later.logprobs
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason
        self.error = later.error


@dataclass
class RequestOutput:
    """What a request has produced: all of it from `LLM`, what is new since the last from an engine's step.

    `state_bytes`: bytes of state that the sequence held at that time. `prompt`: the text, where `LLM` was given one.
    """

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    state_bytes: int
    prompt: str | None = None

    def extend(self, later: "RequestOutput") -> None:
        """Add what came later."""
        for output, more in zip(self.outputs, later.outputs, strict=True):
            output.extend(more)
        self.finished = later.finished
        self.state_bytes = later.state_bytes


class Sequence:
    """A request's tokens, its place in the state pool and its text.

    `num_computed`: tokens, of the prompt and then of the output, that the state has seen.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        max_tokens: int,
        tokenizer: Any,
        generator: torch.Generator,
    ):
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.max_tokens = max_tokens
        self.generator = generator
        self.output_token_ids: list[int] = []
        self.slot: int | None = None
        self.num_computed = 0
        self.finish_reason: FinishReason | None = None
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(tuple(params.stop))
        self._unsent = CompletionOutput()

    @property
    def is_prefilled(self) -> bool:
        """Whether the whole prompt has been computed."""
        return self.num_computed >= len(self.prompt_token_ids)

    @property
    def may_end(self) -> bool:
        """Whether an end-of-sequence token may come next."""
        return not self.params.ignore_eos and len(self.output_token_ids) >= self.params.min_tokens

    def append(self, token: int, logprobs: TokenLogprobs | None, eos_token_ids: frozenset[int]) -> None:
        """Take the next token: extend the text, or finish at an end token, a stop string or the last allowed token."""
        ends = self.may_end and token in eos_token_ids
        self.output_token_ids.append(token)
        self._unsent.token_ids.append(token)
        if logprobs is not None:
            self._unsent.logprobs = [*(self._unsent.logprobs or []), logprobs]
        if ends:
            self.finish("stop")
            return
        self._show(self._detokenizer.add(token))
        if self.finish_reason is None and len(self.output_token_ids) >= self.max_tokens:
            self.finish("length")

    def _show(self, piece: str) -> None:
        if len(self.output_token_ids) < self.params.min_tokens:
            self._unsent.text += piece
            return
        text, stop = self._stops.feed(piece)
        self._unsent.text += text
        if stop is not None:
            self.finish_reason = "stop"
            self._unsent.stop_reason = stop

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """End the sequence and give out the text held back."""
        self.finish_reason = reason
        self._unsent.text += self._stops.release() + self._detokenizer.finish()
        self._unsent.error = error

    def take_output(self, state_bytes: int) -> RequestOutput:
        """What is new since the last call."""
        output, self._unsent = self._unsent, CompletionOutput()
        output.finish_reason = self.finish_reason
        return RequestOutput(
            self.request_id,
            self.prompt_token_ids,
            [output],
            finished=self.finish_reason is not None,
            state_bytes=state_bytes,
        )
