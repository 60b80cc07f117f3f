"""Moves states between the pool's slots and everything outside it: parked, reused, kept for later."""

from spikingbrain.state import StatePool

from .prefix import PrefixTree
from .sequence import Sequence
from .snapshot import Snapshot
from .stats import EngineStats

# A branch that saves fewer tokens than this is not worth a copy of the state.
MIN_BRANCH_TOKENS = 16


class StateKeeper:
    """Fills slots and copies them out. `tree` None: no prefix is reused."""

    def __init__(self, pool: StatePool, tree: PrefixTree | None, stats: EngineStats):
        self._pool = pool
        self._tree = tree
        self._stats = stats

    def place(self, sequence: Sequence) -> None:
        """Give the zeroed slot of a sequence the longest known beginning of its state."""
        is_new = not sequence.clock.placed
        snapshot = sequence.parked
        if snapshot is None and self._tree is not None:
            snapshot = self._reuse(sequence, self._tree, is_new=is_new)
        if snapshot is not None:
            self._pool.write(sequence.slot, snapshot.states)
            sequence.num_computed = snapshot.num_tokens
            sequence.hidden = snapshot.hidden
        sequence.parked = None
        if is_new:
            sequence.num_cached = sequence.num_computed
            self._stats.prompt_tokens += len(sequence.prompt_token_ids)

    def _reuse(self, sequence: Sequence, tree: PrefixTree, *, is_new: bool) -> Snapshot | None:
        tokens = sequence.token_ids
        match = tree.lookup(tokens)
        sequence.checkpoints = {len(tokens)}
        if match.num_common - match.num_tokens >= MIN_BRANCH_TOKENS:
            # The next prompt that branches off here finds a state.
            sequence.checkpoints.add(match.num_common)
        if is_new:
            self._stats.prefix_queries += len(tokens)
            self._stats.prefix_hits += match.num_tokens
            if match.reason is not None:
                self._stats.misses[match.reason] += 1
        return match.snapshot

    def read(self, sequence: Sequence) -> Snapshot:
        """A copy of a sequence's state."""
        states = self._pool.read(sequence.slot, sequence.num_computed)
        return Snapshot(states, sequence.hidden, sequence.num_computed)

    def park(self, sequence: Sequence) -> None:
        """Copy the state out of the slot, which can then be given to another."""
        if sequence.num_computed:
            sequence.parked = self.read(sequence)

    def checkpoint(self, sequence: Sequence) -> None:
        """Keep the state if this is a place where one was wanted."""
        if sequence.num_computed in sequence.checkpoints:
            sequence.checkpoints.discard(sequence.num_computed)
            self._insert(sequence, self.read(sequence))

    def finish(self, sequence: Sequence) -> None:
        """Keep the state at the end of an output, and hand it out if that was asked for."""
        if sequence.slot is None or not sequence.num_computed:
            return
        if sequence.extras.snapshot or self._tree is not None:
            snapshot = self.read(sequence)
            self._insert(sequence, snapshot)
            if sequence.extras.snapshot:
                sequence.keep(snapshot)

    def _insert(self, sequence: Sequence, snapshot: Snapshot) -> None:
        if self._tree is not None:
            self._tree.insert(sequence.token_ids[: snapshot.num_tokens], snapshot)
