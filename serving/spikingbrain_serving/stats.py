"""What the engine counts while it works; `metrics.py` shows it to Prometheus."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

# Durations in seconds: their names here and what they measure.
DURATIONS = {
    "time_to_first_token": "from arrival to the first token",
    "inter_token_latency": "between two tokens of an output",
    "e2e_request_latency": "from arrival to the end",
    "request_queue_time": "from arrival to a state slot",
    "request_prefill_time": "from a state slot to the first token",
    "request_decode_time": "from the first token to the end",
}


def _ignore(_name: str, _seconds: float) -> None:
    """Nobody wants durations."""


@dataclass
class EngineStats:
    """Counts since the start. `misses`: prompts whose prefix was not wholly reused, by the reason why.

    `model_seconds`: time in the model's own computation; what a step takes beyond it is the engine's.
    """

    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    recoveries: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    model_seconds: float = 0.0
    misses: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)
    observe: Callable[[str, float], None] = _ignore

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Count the time of the block as the model's."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.model_seconds += time.monotonic() - began


@dataclass
class Clock:
    """When a sequence passed the stations of its way, in seconds of the monotonic clock; 0: not yet."""

    arrived: float
    placed: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0

    def place(self, now: float, stats: EngineStats) -> None:
        """It has a slot, perhaps again."""
        if not self.placed:
            self.placed = now
            stats.observe("request_queue_time", now - self.arrived)

    def token(self, now: float, stats: EngineStats) -> None:
        """It has one more token."""
        if not self.first_token:
            self.first_token = now
            stats.observe("time_to_first_token", now - self.arrived)
            stats.observe("request_prefill_time", now - (self.placed or self.arrived))
        else:
            stats.observe("inter_token_latency", now - self.last_token)
        self.last_token = now

    def finish(self, now: float, stats: EngineStats) -> None:
        """It has ended."""
        stats.observe("e2e_request_latency", now - self.arrived)
        if self.first_token:
            stats.observe("request_decode_time", now - self.first_token)
