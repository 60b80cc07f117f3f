"""Whose turn it is: sequences wait in a line for each tenant; the tenant that was given least comes next."""

from collections import deque

from .sequence import Sequence


class FairQueue:
    """Start-time fair queueing over tenants, counted in tokens (Goyal et al., SIGCOMM 1996, all weights equal).

    A tenant that comes back does not get the time it was away: it starts level with the least served who waits.
    """

    def __init__(self) -> None:
        self._lines: dict[str, deque[Sequence]] = {}
        self._served: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def add(self, sequence: Sequence) -> None:
        """To the end of its tenant's line."""
        tenant = sequence.extras.tenant
        if tenant not in self._lines:
            floor = min((self._served[other] for other in self._lines), default=0)
            self._served[tenant] = max(self._served.get(tenant, 0), floor)
            self._lines[tenant] = deque()
        self._lines[tenant].append(sequence)

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """Count tokens computed for its tenant."""
        tenant = sequence.extras.tenant
        self._served[tenant] = self._served.get(tenant, 0) + num_tokens

    def pop(self) -> Sequence:
        """The first of the least served tenant's line; raises ValueError if nobody waits."""
        tenant = min(self._lines, key=self._served.__getitem__)
        sequence = self._lines[tenant].popleft()
        self._forget_if_empty(tenant)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands, if it waits."""
        tenant = sequence.extras.tenant
        if sequence in self._lines.get(tenant, ()):
            self._lines[tenant].remove(sequence)
            self._forget_if_empty(tenant)

    def settle(self) -> None:
        """Nobody is served or waits: what was is forgotten, so that the ledger does not grow for ever."""
        self._served.clear()

    def served(self, sequence: Sequence) -> int:
        """Tokens computed for its tenant."""
        return self._served.get(sequence.extras.tenant, 0)

    def _forget_if_empty(self, tenant: str) -> None:
        if not self._lines[tenant]:
            del self._lines[tenant]
