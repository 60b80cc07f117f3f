"""What is fixed when an engine starts."""

from dataclasses import dataclass
from pathlib import Path

from spikingbrain.errors import InputError

POSITIVE = ("max_num_seqs", "max_model_len", "max_num_batched_tokens", "preempt_after", "max_num_waiting")
NOT_NEGATIVE = ("prefix_cache_bytes", "spill_bytes")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Raises `InputError` for a number out of range.

    max_num_seqs: sequences in memory at a time, each with a slot of state. max_model_len: most tokens of prompt and
    output together, None for the model's own. max_num_batched_tokens: most prompt tokens a step. max_num_waiting: most
    requests beside those that run. preempt_after: tokens after which a sequence gives its slot to one that waits.
    prefix_cache_bytes: most bytes of states kept for reuse, 0 for no reuse. spill_dir, spill_bytes: where states go
    that no longer fit, and how much. dtype: a torch type's name, or "auto" for the checkpoint's. device: "auto" takes
    a GPU if there is one. seed: for requests without one. pack: how weights are packed: fp32, bf16, int8 (on a GPU
    this alone), "auto" for the model's own type where it can be packed, or "none". With weights packed on a CPU a
    request's tokens do not depend on what runs beside it, on chunks or on reuse, to the last bit, and are those of
    `generate` of the model that `spikingbrain.prepare` packed; else up to ties of rounding.
    """

    max_num_seqs: int = 16
    max_model_len: int | None = None
    max_num_batched_tokens: int = 512
    max_num_waiting: int = 1024
    preempt_after: int = 256
    prefix_cache_bytes: int = 512 * 2**20
    spill_dir: Path | None = None
    spill_bytes: int = 8 * 2**30
    dtype: str = "auto"
    device: str = "auto"
    pack: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in POSITIVE + NOT_NEGATIVE:
            value, least = getattr(self, name), int(name in POSITIVE)
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")
