"""The model's step function over a pool of states: the only place where the engine computes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from spikingbrain.spiking import SpikeRecord, record_spikes
from spikingbrain.state import StatePool

from .sequence import Sequence
from .stats import EngineStats

RASTER_CHANNELS = 48


class ModelRunner:
    """Runs chunks of prompts, one sequence a call, and single tokens, a row for each sequence.

    Both leave each sequence's last hidden state in it and count what was computed.
    """

    def __init__(self, model: Any, pool: StatePool, stats: EngineStats):
        self._model = model
        self._pool = pool
        self._stats = stats

    @torch.inference_mode()
    def prefill(self, sequence: Sequence, num_tokens: int) -> None:
        """Compute `num_tokens` more tokens of a sequence."""
        start = sequence.num_computed
        tokens = sequence.token_ids[start : start + num_tokens]
        self._step([tokens], [list(range(start, start + num_tokens))], [sequence])

    @torch.inference_mode()
    def decode(self, sequences: list[Sequence]) -> None:
        """Compute each sequence's newest token."""
        tokens = [sequence.token_ids[-1:] for sequence in sequences]
        positions = [[sequence.num_computed] for sequence in sequences]
        with self._recording(sequences):
            self._step(tokens, positions, sequences)

    @torch.inference_mode()
    def logits(self, sequences: list[Sequence]) -> Tensor:
        """Logits `[B, V]` of what comes after each sequence."""
        hidden = torch.stack([s.hidden for s in sequences if s.hidden is not None])
        with self._stats.computing():
            return self._model.lm_head(hidden)

    def _step(self, tokens: list[list[int]], positions: list[list[int]], sequences: list[Sequence]) -> None:
        device = self._model.device
        slots = [sequence.slot for sequence in sequences if sequence.slot is not None]
        with self._stats.computing():
            hidden, _ = self._model.step(
                torch.tensor(tokens, device=device),
                self._pool.states(slots),
                positions=torch.tensor(positions, device=device),
            )
        # A copy: a view would keep the hidden states of the whole chunk.
        for sequence, row, last in zip(sequences, tokens, hidden[:, -1].clone(), strict=True):
            sequence.num_computed += len(row)
            sequence.hidden = last

    @contextlib.contextmanager
    def _recording(self, sequences: list[Sequence]) -> Iterator[None]:
        """Give the sequences that asked for it their spikes."""
        wanted = [row for row, sequence in enumerate(sequences) if sequence.extras.spikes]
        if not wanted:
            yield
            return
        with record_spikes(self._model) as record:
            yield
        for row in wanted:
            sequences[row].show_spikes(_raster(record, row))


def _raster(record: SpikeRecord, row: int) -> dict[str, list[int]]:
    """Counts of evenly spaced channels of one row of the batch, by encoder."""
    raster = {}
    for name, calls in record.counts.items():
        counts = calls[-1][row, -1]
        raster[name] = counts[:: max(1, len(counts) // RASTER_CHANNELS)][:RASTER_CHANNELS].tolist()
    return raster
