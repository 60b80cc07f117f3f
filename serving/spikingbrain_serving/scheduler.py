"""Which tokens the engine computes next: who gets a state slot, who gives one up, whose prompt goes on, who decodes."""

from collections import deque
from typing import NamedTuple

from spikingbrain.state import StatePool

from .fairness import FairQueue
from .sequence import Sequence


class Chunk(NamedTuple):
    """`num_tokens` more tokens of a sequence."""

    sequence: Sequence
    num_tokens: int


class Step(NamedTuple):
    """The work of one step: batches of one token for each sequence, then the chunks."""

    decode: list[list[Sequence]]
    prefill: list[Chunk]


class Scheduler:
    """Sequences wait for a slot, tenants by fair shares; prompts take turns, chunk by chunk; every step decodes all.

    A prompt is always cut at multiples of `max_num_batched_tokens` and where a copy of its state is kept, whatever else
    runs. A step computes chunks of at most so many tokens together, so decoding never waits for long.
    While others wait, a sequence gives its slot up after `preempt_after` tokens.
    """

    def __init__(self, pool: StatePool, max_num_batched_tokens: int, preempt_after: int):
        self._pool = pool
        self._max_num_batched_tokens = max_num_batched_tokens
        self._preempt_after = preempt_after
        self._waiting = FairQueue()
        self._prefilling: deque[Sequence] = deque()
        self._decoding: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        return bool(len(self._waiting) or self._prefilling or self._decoding)

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with a slot."""
        return len(self._prefilling) + len(self._decoding)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for a slot."""
        self._waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and give its slot back."""
        self._waiting.remove(sequence)
        self._vacate(sequence)
        if not self.has_work:
            self._waiting.settle()

    def _vacate(self, sequence: Sequence) -> None:
        for place in (self._prefilling, self._decoding):
            if sequence in place:
                place.remove(sequence)
        if sequence.slot is not None:
            self._pool.free(sequence.slot)
            sequence.slot = None

    def to_preempt(self) -> Sequence | None:
        """Who gives up a slot now: of those who had their turn, the one whose tenant was served most."""
        if not len(self._waiting) or self._pool.num_free:
            return None
        running = [*self._decoding, *self._prefilling]
        had_their_turn = [sequence for sequence in running if sequence.num_since_placed >= self._preempt_after]
        return max(had_their_turn, key=self._burden, default=None)

    def _burden(self, sequence: Sequence) -> tuple[int, int]:
        return self._waiting.served(sequence), sequence.num_since_placed

    def requeue(self, sequence: Sequence) -> None:
        """Take the slot of a sequence and let it wait again."""
        self._vacate(sequence)
        self._waiting.add(sequence)

    def admit(self) -> Sequence | None:
        """Give the next who waits a zeroed slot; None if nobody waits or no slot is free."""
        if not len(self._waiting) or not self._pool.num_free:
            return None
        sequence = self._waiting.pop()
        sequence.slot = self._pool.allocate()
        sequence.num_since_placed = 0
        return sequence

    def start(self, sequence: Sequence) -> None:
        """Let an admitted sequence, whose state is in its slot, be computed."""
        decodes = sequence.output_token_ids and sequence.num_remaining == 1
        (self._decoding if decodes else self._prefilling).append(sequence)

    def schedule(self) -> Step:
        """Decide the next step."""
        together = [sequence for sequence in self._decoding if not sequence.alone]
        batches = [[sequence] for sequence in self._decoding if sequence.alone]
        batches = [together, *batches] if together else batches
        return Step(batches, self._take_chunks())

    def computed(self, sequence: Sequence, num_tokens: int) -> None:
        """Count what was computed for a sequence."""
        sequence.num_since_placed += num_tokens
        self._waiting.charge(sequence, num_tokens)

    def _take_chunks(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        budget = self._max_num_batched_tokens
        for sequence in list(self._prefilling):
            num_tokens = self._chunk_length(sequence)
            if num_tokens > budget:
                break
            budget -= num_tokens
            chunks.append(Chunk(sequence, num_tokens))
            self._prefilling.popleft()
            # To the end of the line, so that a long prompt does not keep short ones waiting.
            (self._decoding if num_tokens == sequence.num_remaining else self._prefilling).append(sequence)
        return chunks

    def _chunk_length(self, sequence: Sequence) -> int:
        start = sequence.num_computed
        ends = [len(sequence.token_ids), (start // self._max_num_batched_tokens + 1) * self._max_num_batched_tokens]
        return min([*ends, *(end for end in sequence.checkpoints if end > start)]) - start
