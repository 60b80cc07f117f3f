"""Which tokens the engine computes next: who gets a state slot, whose prompt goes on, who decodes."""

from collections import deque
from typing import NamedTuple

from spikingbrain.state import StatePool

from .sequence import Sequence


class Chunk(NamedTuple):
    """`num_tokens` more tokens of a sequence's prompt."""

    sequence: Sequence
    num_tokens: int


class Step(NamedTuple):
    """The work of one step: one token each for `decode`, then the chunks."""

    decode: list[Sequence]
    prefill: list[Chunk]


class Scheduler:
    """Sequences wait for a slot in order of arrival; prompts take turns, chunk by chunk; every step decodes all.

    A prompt is always cut at multiples of `max_num_batched_tokens`, whatever else runs: its numbers do not depend on
    the company it has. A step computes chunks of at most so many tokens together, so decoding never waits for long.
    """

    def __init__(self, pool: StatePool, max_num_batched_tokens: int):
        self._pool = pool
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: deque[Sequence] = deque()
        self._prefilling: deque[Sequence] = deque()
        self._decoding: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        return bool(self._waiting or self._prefilling or self._decoding)

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for a slot."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and give its slot back."""
        for place in (self._waiting, self._prefilling, self._decoding):
            if sequence in place:
                place.remove(sequence)
        if sequence.slot is not None:
            self._pool.free(sequence.slot)
            sequence.slot = None

    def schedule(self) -> Step:
        """Decide the next step."""
        while self._waiting and self._pool.num_free:
            sequence = self._waiting.popleft()
            sequence.slot = self._pool.allocate()
            self._prefilling.append(sequence)
        decode = list(self._decoding)
        return Step(decode, self._take_chunks())

    def _take_chunks(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        budget = self._max_num_batched_tokens
        for sequence in list(self._prefilling):
            remaining = len(sequence.prompt_token_ids) - sequence.num_computed
            num_tokens = min(remaining, self._max_num_batched_tokens)
            if num_tokens > budget:
                break
            budget -= num_tokens
            chunks.append(Chunk(sequence, num_tokens))
            self._prefilling.popleft()
            # To the end of the line, so that a long prompt does not keep short ones waiting.
            (self._decoding if num_tokens == remaining else self._prefilling).append(sequence)
        return chunks
