"""The engine: continuous batching over a fixed pool of states. Synchronous; see `llm.py` and `async_llm.py`."""

import logging
import random
import time
from typing import Any

import torch
from torch import Tensor

from spikingbrain.errors import InputError
from spikingbrain.state import StatePool

from .config import EngineConfig
from .errors import InvalidRequest
from .keeper import StateKeeper
from .prefix import PrefixTree
from .runner import ModelRunner
from .sampling import SamplingParams, adjust, describe, logprobs_of, sample
from .scheduler import Chunk, Scheduler
from .sequence import Extras, FinishReason, RequestOutput, Sequence, TokenLogprobs
from .spill import Spill
from .state_file import ModelIdentity
from .stats import EngineStats
from .structured import Grammars

logger = logging.getLogger(__name__)

# What computing one request can raise on account of that request; anything else is a fault of the engine and ends it.
REQUEST_ERRORS = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
CHAT_END = "<|im_end|>"
NO_EXTRAS = Extras()


class Engine:
    """Adds requests, steps, hands out what is new. Not thread-safe but for `check` and `prepare`."""

    def __init__(self, model: Any, tokenizer: Any, config: EngineConfig | None = None):
        self.config = config = config or EngineConfig()
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_model_len = config.max_model_len or model.config.max_position_embeddings
        self._warn_of_length()
        self.stats = EngineStats()
        self.identity = ModelIdentity(model)
        self.pool = _allocate_pool(model, config.max_num_seqs, self.max_model_len)
        self._spill = Spill(config.spill_dir, config.spill_bytes, self.identity) if config.spill_dir else None
        self.prefixes = PrefixTree(config.prefix_cache_bytes, self._spill) if config.prefix_cache_bytes else None
        self._scheduler = Scheduler(self.pool, config.max_num_batched_tokens, config.preempt_after)
        self._keeper = StateKeeper(self.pool, self.prefixes, self.stats)
        self._runner = ModelRunner(model, self.pool, self.stats)
        self._groups: dict[str, list[Sequence]] = {}
        # Further outputs of a prompt, which start when the first has computed it.
        self._siblings: dict[str, list[Sequence]] = {}
        self._seeds = random.Random(config.seed)
        self.eos_token_ids = eos_token_ids(model, tokenizer)
        self._grammars = Grammars(tokenizer, model.config.vocab_size, self.eos_token_ids)
        logger.info("%d state slots of %d bytes", config.max_num_seqs, self.pool.bytes_per_sequence)

    def _warn_of_length(self) -> None:
        trained = self.model.config.max_position_embeddings
        if not self.model.is_constant_memory and self.max_model_len > trained:
            logger.warning("max_model_len %d is more than the model's %d positions", self.max_model_len, trained)

    def close(self) -> None:
        """Remove what was spilled."""
        if self._spill is not None:
            self._spill.close()

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self._scheduler.has_work

    @property
    def request_ids(self) -> list[str]:
        """The unfinished requests."""
        return list(self._groups)

    @property
    def num_running(self) -> int:
        """Sequences with a slot."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Sequences without one."""
        return self._scheduler.num_waiting

    def check(self, prompt_token_ids: list[int], params: SamplingParams) -> int:
        """The most tokens to generate; raises `InvalidRequest` if the request does not fit the model."""
        self._require_tokens(prompt_token_ids, "prompt")
        self._require_tokens(params.logit_bias, "logit_bias")
        self._require_tokens(params.stop_token_ids, "stop_token_ids")
        if not prompt_token_ids:
            raise InvalidRequest("the prompt is empty: at least one token is needed", param="prompt")
        room = self.max_model_len - len(prompt_token_ids)
        wanted = params.max_tokens or max(room, 1)
        if wanted > room:
            raise InvalidRequest(
                f"{len(prompt_token_ids)} prompt tokens and {wanted} to generate are "
                f"{len(prompt_token_ids) + wanted} tokens; this model serves at most {self.max_model_len}",
                param="prompt" if room < 1 else "max_tokens",
                code="context_length_exceeded",
            )
        return wanted

    def _require_tokens(self, tokens: Any, param: str) -> None:
        vocabulary = self.model.config.vocab_size
        wrong = [token for token in tokens if not 0 <= token < vocabulary]
        if wrong:
            raise InvalidRequest(f"token {wrong[0]} is not one of the {vocabulary} of the vocabulary", param=param)

    def prepare(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, extras: Extras = NO_EXTRAS
    ) -> list[Sequence]:
        """The sequences of a request, for `enqueue`; from any thread. Raises `InvalidRequest` if it does not fit."""
        max_tokens = self.check(prompt_token_ids, params)
        return [
            Sequence(
                request_id,
                prompt_token_ids,
                params,
                index=index,
                max_tokens=max_tokens,
                tokenizer=self.tokenizer,
                generator=self._generator(params.seed, index),
                extras=extras,
                matcher=None if params.structured is None else self._grammars.matcher(params.structured),
            )
            for index in range(params.n)
        ]

    def _generator(self, seed: int | None, index: int) -> torch.Generator:
        seed = self._seeds.getrandbits(63) if seed is None else seed + index
        return torch.Generator(self.model.device).manual_seed((seed + 2**63) % 2**64 - 2**63)

    def enqueue(self, sequences: list[Sequence]) -> None:
        """Let a prepared request wait for a slot; raises `InvalidRequest` if its id is in use."""
        first, *others = sequences
        if first.request_id in self._groups:
            raise InvalidRequest(f"request {first.request_id!r} is already running", param="request_id")
        self._groups[first.request_id] = list(sequences)
        if others:
            self._siblings[first.request_id] = others
        self._scheduler.add(first)

    def add_request(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, extras: Extras = NO_EXTRAS
    ) -> None:
        """`prepare` and `enqueue`."""
        self.enqueue(self.prepare(request_id, prompt_token_ids, params, extras))

    def abort(self, request_id: str) -> list[RequestOutput]:
        """End a request and free its slots now; nothing if there is no such request."""
        self._siblings.pop(request_id, None)
        return [self._finish(sequence, "abort") for sequence in list(self._groups.get(request_id, ()))]

    def step(self) -> list[RequestOutput]:
        """Compute one batch; what is new of every output that has something new."""
        outputs = self._rotate()
        step = self._scheduler.schedule()
        for batch in step.decode:
            outputs += self._decode(batch)
        for chunk in step.prefill:
            outputs += self._prefill(chunk)
        return outputs

    def _rotate(self) -> list[RequestOutput]:
        """Give the slots to those whose turn it is."""
        victim = self._scheduler.to_preempt()
        if victim is not None:
            self._keeper.park(victim)
            self._scheduler.requeue(victim)
            self.stats.preemptions += 1
        outputs = []
        while (sequence := self._scheduler.admit()) is not None:
            outputs += self._place(sequence)
        return outputs

    def _place(self, sequence: Sequence) -> list[RequestOutput]:
        try:
            self._keeper.place(sequence)
        except REQUEST_ERRORS as error:
            return self._fail(sequence, error)
        sequence.clock.place(time.monotonic(), self.stats)
        outputs = [] if sequence.num_remaining else self._after_prefill(sequence)
        if sequence.finish_reason is None:
            self._scheduler.start(sequence)
        return outputs

    def _prefill(self, chunk: Chunk) -> list[RequestOutput]:
        sequence = chunk.sequence
        try:
            self._runner.prefill(sequence, chunk.num_tokens)
        except REQUEST_ERRORS as error:
            return self._fail(sequence, error)
        self._scheduler.computed(sequence, chunk.num_tokens)
        self._keeper.checkpoint(sequence)
        return [] if sequence.num_remaining else self._after_prefill(sequence)

    def _after_prefill(self, sequence: Sequence) -> list[RequestOutput]:
        """The state has seen all tokens: choose the next, for the other outputs of the prompt too."""
        if sequence.extras.prefill_only:
            return [self._finish(sequence, "length")]
        try:
            logits = self._runner.logits([sequence])[0]
        except REQUEST_ERRORS as error:
            return self._fail(sequence, error)
        siblings = self._siblings.pop(sequence.request_id, [])
        snapshot = self._keeper.read(sequence) if siblings else None
        for sibling in siblings:
            sibling.parked, sibling.num_computed = snapshot, sequence.num_computed
            sibling.num_cached = sequence.num_cached
            sibling.clock.placed = sequence.clock.placed
        outputs = self._advance(sequence, logits)
        for sibling in siblings:
            outputs += self._advance(sibling, logits)
            if sibling.finish_reason is None:
                self._scheduler.add(sibling)
        return outputs

    def _decode(self, sequences: list[Sequence]) -> list[RequestOutput]:
        try:
            self._runner.decode(sequences)
            logits = self._runner.logits(sequences)
        except REQUEST_ERRORS as error:
            return self._recover(sequences, error)
        outputs = []
        for sequence, row in zip(sequences, logits, strict=True):
            self._scheduler.computed(sequence, 1)
            outputs += self._advance(sequence, row)
        return outputs

    def _recover(self, sequences: list[Sequence], error: Exception) -> list[RequestOutput]:
        """The states of the whole batch may be half updated: compute each again by itself; who fails alone is out."""
        if len(sequences) == 1:
            return self._fail(sequences[0], error)
        logger.warning("a batch of %d failed, each goes on alone", len(sequences), exc_info=error)
        self.stats.recoveries += 1
        for sequence in sequences:
            sequence.alone = True
            sequence.num_computed, sequence.hidden = 0, None
            self._scheduler.requeue(sequence)
        return []

    def _advance(self, sequence: Sequence, logits: Tensor) -> list[RequestOutput]:
        """Choose the next token from `logits [V]`."""
        try:
            token, logprobs = self._choose(sequence, logits)
            sequence.append(token, logprobs, self.eos_token_ids)
        except REQUEST_ERRORS as error:
            return self._fail(sequence, error)
        self.stats.generation_tokens += 1
        sequence.clock.token(time.monotonic(), self.stats)
        if sequence.finish_reason is not None:
            return [self._close(sequence)]
        return [self._output(sequence)]

    def _choose(self, sequence: Sequence, logits: Tensor) -> tuple[int, TokenLogprobs | None]:
        params = sequence.params
        adjusted = adjust(logits, params, sequence.prompt_token_ids, sequence.output_token_ids)
        if sequence.matcher is not None:
            adjusted = sequence.matcher.restrict(adjusted)
        elif not sequence.may_end:
            ends = torch.tensor(sorted({*self.eos_token_ids, *params.stop_token_ids}), device=logits.device)
            adjusted = adjusted.index_fill(0, ends.long(), -torch.inf)
        token = sample(adjusted, params, sequence.generator)
        if params.logprobs is None:
            return token, None
        return token, describe(logprobs_of(logits, token, params.logprobs), self.tokenizer)

    def _fail(self, sequence: Sequence, error: Exception) -> list[RequestOutput]:
        logger.error("request %s failed", sequence.request_id, exc_info=error)
        reason = f"{type(error).__name__}: {error}"
        waiting = self._siblings.pop(sequence.request_id, [])
        return [self._finish(each, "error", reason) for each in [sequence, *waiting]]

    def _finish(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> RequestOutput:
        sequence.finish(reason, error)
        return self._close(sequence)

    def _close(self, sequence: Sequence) -> RequestOutput:
        """Hand out the rest of a finished sequence and give back what it held."""
        if sequence.finish_reason in ("stop", "length"):
            self._keeper.finish(sequence)
        self.stats.finished[sequence.finish_reason] += 1
        sequence.clock.finish(time.monotonic(), self.stats)
        group = self._groups[sequence.request_id]
        group.remove(sequence)
        output = self._output(sequence)
        self._scheduler.remove(sequence)
        if not group:
            del self._groups[sequence.request_id]
        return output

    def _output(self, sequence: Sequence) -> RequestOutput:
        return RequestOutput(
            sequence.request_id,
            sequence.prompt_token_ids,
            [sequence.take_output()],
            finished=not self._groups[sequence.request_id],
            state_bytes=self.pool.bytes_used(sequence.num_computed),
            num_cached_tokens=min(sequence.num_cached, len(sequence.prompt_token_ids)),
        )


def _allocate_pool(model: Any, max_num_seqs: int, max_model_len: int) -> StatePool:
    try:
        return StatePool(model.state_specs(), max_num_seqs, model.device, max_model_len)
    except RuntimeError as error:
        raise InputError(
            f"no memory for {max_num_seqs} sequences of {max_model_len} tokens; lower max_num_seqs or max_model_len "
            f"({str(error).splitlines()[0]})"
        ) from error


def eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an output: those of the generation config and, for a chat model, the end of a turn."""
    configured = model.generation_config.eos_token_id
    ids = {configured} if isinstance(configured, int) else set(configured or ())
    chat_end = tokenizer.get_vocab().get(CHAT_END)
    if tokenizer.chat_template is not None and chat_end is not None:
        ids.add(chat_end)
    return frozenset(token for token in ids if token < model.config.vocab_size)
