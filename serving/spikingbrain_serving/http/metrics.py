"""The engine's counts under vLLM's names for Prometheus; what vLLM has no name for is called `spikingbrain:`."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..async_llm import AsyncLLM
from ..stats import DURATIONS

BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """One engine's metrics, in a registry of their own."""

    def __init__(self, engine: AsyncLLM, model_name: str):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine, model_name))
        self._histograms = {
            name: Histogram(
                f"vllm:{name}_seconds",
                f"Seconds {meaning}.",
                ["model_name"],
                buckets=BUCKETS,
                registry=self._registry,
            ).labels(model_name)
            for name, meaning in DURATIONS.items()
        }
        engine.engine.stats.observe = self._observe

    def _observe(self, name: str, seconds: float) -> None:
        self._histograms[name].observe(seconds)

    def text(self) -> bytes:
        """Everything in Prometheus' text form."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the engine's counts when asked."""

    def __init__(self, engine: AsyncLLM, model_name: str):
        self._async = engine
        self._engine = engine.engine
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        """All counts and gauges."""
        yield from self._counters()
        yield from self._by_reason()
        yield from self._gauges()

    def _counters(self) -> Iterable[Metric]:
        stats = self._engine.stats
        counts = {
            "vllm:prompt_tokens": ("Tokens of prompts.", stats.prompt_tokens),
            "vllm:generation_tokens": ("Tokens generated.", stats.generation_tokens),
            "vllm:prefix_cache_queries": ("Tokens looked up for reuse.", stats.prefix_queries),
            "vllm:prefix_cache_hits": ("Tokens whose state was reused.", stats.prefix_hits),
            "vllm:num_preemptions": ("States copied out to let another run.", stats.preemptions),
            "spikingbrain:model_seconds": ("Seconds of the model's own computation.", stats.model_seconds),
            "spikingbrain:batch_recoveries": ("Batches that failed and were computed again.", stats.recoveries),
        }
        for name, (meaning, count) in counts.items():
            family = CounterMetricFamily(name, meaning, labels=["model_name"])
            family.add_metric([self._model_name], count)
            yield family

    def _by_reason(self) -> Iterable[Metric]:
        stats = self._engine.stats
        finished = CounterMetricFamily(
            "vllm:request_success", "Outputs ended.", labels=["model_name", "finished_reason"]
        )
        for reason, count in list(stats.finished.items()):
            finished.add_metric([self._model_name, reason], count)
        yield finished
        missed = CounterMetricFamily(
            "spikingbrain:prefix_cache_misses",
            "Prompts not wholly reused, by why: new_tokens, no_state_at_branch, evicted, unreadable.",
            labels=["model_name", "reason"],
        )
        for reason, count in list(stats.misses.items()):
            missed.add_metric([self._model_name, reason], count)
        yield missed

    def _gauges(self) -> Iterable[Metric]:
        pool, prefixes = self._engine.pool, self._engine.prefixes
        gauges = {
            "vllm:num_requests_running": ("Sequences with a state slot.", self._engine.num_running),
            "vllm:num_requests_waiting": ("Requests without one.", self._async.num_waiting),
            "vllm:kv_cache_usage_perc": ("Share of the state slots in use.", 1 - pool.num_free / pool.num_slots),
            "spikingbrain:state_slot_bytes": ("Bytes of one state slot.", pool.bytes_per_sequence),
            "spikingbrain:prefix_cache_bytes": ("Bytes of states kept.", prefixes.num_bytes if prefixes else 0),
            "spikingbrain:prefix_cache_states": ("States kept in memory.", len(prefixes) if prefixes else 0),
        }
        for name, (meaning, value) in gauges.items():
            family = GaugeMetricFamily(name, meaning, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family
