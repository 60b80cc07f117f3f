"""One output on its way through the engine, and what the engine hands out of it."""

import time
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .sampling import Logprob, SamplingParams
from .snapshot import Snapshot
from .stats import Clock
from .structured import Matcher
from .text import Detokenizer, StopStrings

FinishReason = Literal["stop", "length", "abort", "error"]
TokenLogprobs = dict[int, Logprob]
Raster = dict[str, list[int]]


@dataclass
class CompletionOutput:
    """Generated text and tokens. `stop_reason`: the stop string or token that ended it; `error`: why it failed.

    `spikes`: of each token, by encoder, counts of some of its channels, if the request asked for them.
    `snapshot`: the state after all tokens but the last, in the end, if the request asked for it.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    spikes: list[Raster] | None = None
    snapshot: Snapshot | None = None

    def extend(self, later: "CompletionOutput") -> None:
        """Add what came later."""
        self.text += later.text
        self.token_ids = self.token_ids + later.token_ids
        if later.logprobs is not None:
            self.logprobs = (self.logprobs or []) + later.logprobs
        if later.spikes is not None:
            self.spikes = (self.spikes or []) + later.spikes
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason
        self.error = later.error
        self.snapshot = later.snapshot


@dataclass
class RequestOutput:
    """What a request has produced: all of it from `LLM`, what is new of one of its outputs from an engine's step.

    `finished`: whether all its outputs are. `state_bytes`: bytes of state that the sequence held at that time.
    `num_cached_tokens`: tokens of the prompt whose state was known. `prompt`: the text, where `LLM` was given one.
    """

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    state_bytes: int
    num_cached_tokens: int = 0
    prompt: str | None = None

    def extend(self, later: "RequestOutput") -> None:
        """Add what came later."""
        known = {output.index: output for output in self.outputs}
        for more in later.outputs:
            if more.index in known:
                known[more.index].extend(more)
            else:
                self.outputs = sorted([*self.outputs, more], key=lambda output: output.index)
        self.finished = later.finished
        self.state_bytes = later.state_bytes
        self.num_cached_tokens = later.num_cached_tokens


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What a request wants besides its text. `tenant`: whose turn it uses up. `resume`: a state its prompt begins with.

    `spikes`: counts of each token. `snapshot`: the state at the end. `prefill_only`: that of the prompt, no output.
    """

    tenant: str = ""
    resume: Snapshot | None = None
    spikes: bool = False
    snapshot: bool = False
    prefill_only: bool = False


class Sequence:
    """One output's tokens, its place in the state pool and its text.

    `token_ids`: prompt and output. `num_computed`: how many of them the state has seen; `hidden [D]`: the model's last
    hidden state there. `parked`: the state while it has no slot. `checkpoints`: where to keep a copy of the state.
    `alone`: computed by itself since a batch with it failed.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        index: int,
        max_tokens: int,
        tokenizer: Any,
        generator: torch.Generator,
        extras: Extras,
        matcher: Matcher | None,
    ):
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.token_ids = list(prompt_token_ids)
        self.output_token_ids: list[int] = []
        self.params = params
        self.index = index
        self.max_tokens = max_tokens
        self.generator = generator
        self.extras = extras
        self.matcher = matcher
        self.clock = Clock(time.monotonic())
        self.slot: int | None = None
        self.num_computed = 0
        self.num_since_placed = 0
        self.num_cached = 0
        self.hidden: Tensor | None = None
        self.parked = extras.resume
        self.checkpoints: set[int] = set()
        self.alone = False
        self.finish_reason: FinishReason | None = None
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(tuple(params.stop))
        self._unsent = CompletionOutput(index)

    @property
    def num_remaining(self) -> int:
        """Tokens that the state has not seen; the next token can be chosen when there are none."""
        return len(self.token_ids) - self.num_computed

    @property
    def may_end(self) -> bool:
        """Whether an end token may come next."""
        return len(self.output_token_ids) >= self.params.min_tokens

    def append(self, token: int, logprobs: TokenLogprobs | None, eos_token_ids: frozenset[int]) -> None:
        """Take the next token: extend the text, or finish at an end token, a stop string or the last allowed token."""
        complete = self.matcher is not None and self.matcher.accept(token)
        ends = self.may_end and token in eos_token_ids and (complete or not self.params.ignore_eos)
        self.token_ids.append(token)
        self.output_token_ids.append(token)
        self._unsent.token_ids.append(token)
        if logprobs is not None:
            self._unsent.logprobs = [*(self._unsent.logprobs or []), logprobs]
        if ends or (self.may_end and token in self.params.stop_token_ids):
            self._unsent.stop_reason = None if ends else token
            self.finish("stop")
            return
        self._show(self._detokenizer.add(token))
        if self.finish_reason is None and (complete or len(self.output_token_ids) >= self.max_tokens):
            self.finish("stop" if complete else "length")

    def show_spikes(self, raster: Raster) -> None:
        """Spikes of the token computed last."""
        self._unsent.spikes = [*(self._unsent.spikes or []), raster]

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
        """End the sequence and give out the text held back, unless a stop string begins in it."""
        self.finish_reason = reason
        text, stop = self._stops.feed(self._detokenizer.finish())
        self._unsent.text += text + self._stops.release()
        if stop is not None:
            self.finish_reason = "stop"
            self._unsent.stop_reason = stop
        self._unsent.error = error

    def keep(self, snapshot: Snapshot) -> None:
        """Hand out the state with the output."""
        self._unsent.snapshot = snapshot

    def take_output(self) -> CompletionOutput:
        """What is new since the last call."""
        output, self._unsent = self._unsent, CompletionOutput(self.index)
        output.finish_reason = self.finish_reason
        return output
