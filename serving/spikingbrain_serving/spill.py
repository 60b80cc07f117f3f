"""States that memory has no room for, in files of this process: written in the background, removed in the end."""

import logging
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from spikingbrain.errors import InputError

from .snapshot import Snapshot
from .state_file import ModelIdentity, StoredState, read_state, write_state

logger = logging.getLogger(__name__)

# States on their way to the disk are still in memory: no more than so many.
MAX_BEING_WRITTEN = 2


@dataclass(eq=False)
class Spilled:
    """A state on disk. `in_memory`: the state until it has been written; `failed`: it could not be."""

    path: Path
    nbytes: int
    on_drop: Callable[[], None]
    in_memory: Snapshot | None
    failed: bool = False


class Spill:
    """At most `max_bytes` of states below `directory`; the oldest are dropped."""

    def __init__(self, directory: Path, max_bytes: int, identity: ModelIdentity):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = Path(tempfile.mkdtemp(prefix="spill-", dir=directory))
        self._max_bytes = max_bytes
        self._identity = identity
        self._entries: OrderedDict[Spilled, None] = OrderedDict()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="spill")
        self._num_files = 0
        self.num_bytes = 0

    def put(self, tokens: list[int], snapshot: Snapshot, on_drop: Callable[[], None]) -> Spilled | None:
        """Begin to write a state; None if the disk does not keep up or has no room."""
        being_written = sum(entry.in_memory is not None for entry in self._entries)
        if being_written >= MAX_BEING_WRITTEN or snapshot.nbytes > self._max_bytes:
            return None
        self._num_files += 1
        entry = Spilled(self._directory / f"{self._num_files}.safetensors", snapshot.nbytes, on_drop, snapshot)
        self._entries[entry] = None
        self.num_bytes += entry.nbytes
        self._writer.submit(self._write, entry, StoredState(tokens, snapshot))
        while self.num_bytes > self._max_bytes:
            oldest = next(iter(self._entries))
            self.drop(oldest)
            oldest.on_drop()
        return entry

    def take(self, entry: Spilled) -> Snapshot | None:
        """The state, no longer kept here; None if it cannot be read."""
        snapshot = entry.in_memory
        try:
            if snapshot is None and not entry.failed:
                snapshot = read_state(entry.path, self._identity).snapshot
        except InputError as error:
            logger.warning("a spilled state is lost: %s", error)
        self.drop(entry)
        return snapshot

    def drop(self, entry: Spilled) -> None:
        """Forget a state."""
        del self._entries[entry]
        self.num_bytes -= entry.nbytes
        self._writer.submit(entry.path.unlink, missing_ok=True)

    def close(self) -> None:
        """Remove everything."""
        self._writer.shutdown(cancel_futures=True)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _write(self, entry: Spilled, state: StoredState) -> None:
        try:
            write_state(entry.path, state, self._identity)
        except OSError as error:
            entry.failed = True
            logger.warning("a state could not be spilled: %s", error)
        entry.in_memory = None
