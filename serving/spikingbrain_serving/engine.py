"""The engine: continuous batching over a fixed pool of states. Synchronous; see `llm.py` and `async_engine.py`."""

import logging
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spikingbrain.errors import InputError
from spikingbrain.state import StatePool

from .errors import InvalidRequest
from .runner import ModelRunner
from .sampling import Logprob, SamplingParams, logprobs_of, sample
from .scheduler import Chunk, Scheduler
from .sequence import FinishReason, RequestOutput, Sequence, TokenLogprobs

logger = logging.getLogger(__name__)

# What computing one request can raise on account of that request; anything else is a fault of the engine and ends it.
REQUEST_ERRORS = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
CHAT_END = "<|im_end|>"


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What is fixed at start; raises `InputError` for a number that is not positive.

    max_num_seqs: sequences in memory at a time, each with a slot of state. max_model_len: most tokens of prompt and
    output together, None for the model's own. max_num_batched_tokens: most prompt tokens a step. dtype: a torch type's
    name, or "auto" for the checkpoint's. device: "auto" takes a GPU if there is one. seed: for requests without one.
    """

    max_num_seqs: int = 16
    max_model_len: int | None = None
    max_num_batched_tokens: int = 512
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_model_len", "max_num_batched_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")


class Engine:
    """Adds requests, steps, hands out what is new. Not thread-safe."""

    def __init__(self, model: Any, tokenizer: Any, config: EngineConfig | None = None):
        config = config or EngineConfig()
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_model_len = config.max_model_len or model.config.max_position_embeddings
        self._warn_of_length()
        self.pool = _allocate_pool(model, config.max_num_seqs, self.max_model_len)
        self._scheduler = Scheduler(self.pool, config.max_num_batched_tokens)
        self._runner = ModelRunner(model, self.pool)
        self._sequences: dict[str, Sequence] = {}
        self._seeds = random.Random(config.seed)
        self._eos_token_ids = eos_token_ids(model, tokenizer)
        logger.info("%d state slots of %d bytes", config.max_num_seqs, self.pool.bytes_per_sequence)

    def _warn_of_length(self) -> None:
        trained = self.model.config.max_position_embeddings
        if not self.model.is_constant_memory and self.max_model_len > trained:
            logger.warning("max_model_len %d is more than the model's %d positions", self.max_model_len, trained)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self._scheduler.has_work

    @property
    def request_ids(self) -> list[str]:
        """The unfinished requests."""
        return list(self._sequences)

    def check(self, prompt_token_ids: list[int], params: SamplingParams) -> int:
        """The most tokens to generate; raises `InvalidRequest` if the request does not fit the model."""
        vocabulary = self.model.config.vocab_size
        wrong = [token for token in prompt_token_ids if not 0 <= token < vocabulary]
        if wrong:
            raise InvalidRequest(f"token {wrong[0]} is not one of the {vocabulary} of the vocabulary", param="prompt")
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

    def add_request(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Queue a request; raises `InvalidRequest` if it does not fit the model or the id is in use."""
        if request_id in self._sequences:
            raise InvalidRequest(f"request {request_id!r} is already running", param="request_id")
        max_tokens = self.check(prompt_token_ids, params)
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        sequence = Sequence(
            request_id,
            prompt_token_ids,
            params,
            max_tokens=max_tokens,
            tokenizer=self.tokenizer,
            generator=torch.Generator(self.model.device).manual_seed(seed),
        )
        self._sequences[request_id] = sequence
        self._scheduler.add(sequence)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request and free its slot now; None if there is no such request."""
        sequence = self._sequences.get(request_id)
        return None if sequence is None else self._finish(sequence, "abort")

    def step(self) -> list[RequestOutput]:
        """Compute one batch; what is new of every request that has something new."""
        step = self._scheduler.schedule()
        outputs = self._decode(step.decode) if step.decode else []
        for chunk in step.prefill:
            outputs += self._prefill(chunk)
        return outputs

    def _prefill(self, chunk: Chunk) -> list[RequestOutput]:
        sequence = chunk.sequence
        try:
            logits = self._runner.prefill(sequence, chunk.num_tokens)
        except REQUEST_ERRORS as error:
            return [self._fail(sequence, error)]
        return [self._advance(sequence, logits)] if sequence.is_prefilled else []

    def _decode(self, sequences: list[Sequence]) -> list[RequestOutput]:
        try:
            logits = self._runner.decode(sequences)
        except REQUEST_ERRORS as error:
            # The states of the whole batch may be half updated: none of them can go on.
            return [self._fail(sequence, error) for sequence in sequences]
        return [self._advance(sequence, row) for sequence, row in zip(sequences, logits, strict=True)]

    def _advance(self, sequence: Sequence, logits: Tensor) -> RequestOutput:
        """Choose the next token from `logits [V]`."""
        try:
            token, logprobs = self._choose(sequence, logits)
            sequence.append(token, logprobs, self._eos_token_ids)
        except REQUEST_ERRORS as error:
            return self._fail(sequence, error)
        output = sequence.take_output(self.pool.bytes_used(sequence.num_computed))
        if output.finished:
            self._forget(sequence)
        return output

    def _choose(self, sequence: Sequence, logits: Tensor) -> tuple[int, TokenLogprobs | None]:
        params = sequence.params
        if len(sequence.output_token_ids) < params.min_tokens:
            ends = torch.tensor(sorted(self._eos_token_ids), dtype=torch.long, device=logits.device)
            logits = logits.index_fill(0, ends, -torch.inf)
        token = sample(logits, params, sequence.generator)
        if params.logprobs is None:
            return token, None
        entries = logprobs_of(logits, token, params.logprobs)
        return token, {key: Logprob(value, rank, self.tokenizer.decode([key])) for key, value, rank in entries}

    def _fail(self, sequence: Sequence, error: Exception) -> RequestOutput:
        logger.error("request %s failed", sequence.request_id, exc_info=error)
        return self._finish(sequence, "error", f"{type(error).__name__}: {error}")

    def _finish(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> RequestOutput:
        sequence.finish(reason, error)
        output = sequence.take_output(self.pool.bytes_used(sequence.num_computed))
        self._forget(sequence)
        return output

    def _forget(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request_id]


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
