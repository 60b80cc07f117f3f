"""The model's step function over a pool of states: the only place where the engine computes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spikingbrain.decoding import Decoder
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
        self._decoder = Decoder(model, pool)

    @torch.inference_mode()
    def prefill(self, sequence: Sequence, num_tokens: int) -> None:
        """Compute `num_tokens` more tokens of a sequence."""
        start, device = sequence.num_computed, self._model.device
        tokens = torch.tensor([sequence.token_ids[start : start + num_tokens]], device=device)
        positions = torch.arange(start, start + num_tokens, device=device)[None]
        slots = torch.tensor([sequence.slot], device=device)
        with self._stats.computing():
            hidden, _ = self._model.step(tokens, self._pool.states(slots), positions=positions)
        _advance([sequence], hidden[:, -1], num_tokens)

    @torch.inference_mode()
    def decode(self, sequences: list[Sequence]) -> None:
        """Compute each sequence's newest token."""
        tokens = [sequence.token_ids[-1] for sequence in sequences]
        positions = [sequence.num_computed for sequence in sequences]
        slots = [sequence.slot for sequence in sequences if sequence.slot is not None]
        watched = [row for row, sequence in enumerate(sequences) if sequence.extras.spikes]
        step = self._watched_step(sequences, watched) if watched else self._decoder
        with self._stats.computing():
            hidden = step(tokens, positions, slots)
        _advance(sequences, hidden, 1)

    @torch.inference_mode()
    def logits(self, sequences: list[Sequence]) -> Tensor:
        """Logits `[B, V]` of what comes after each sequence."""
        hidden = torch.stack([s.hidden for s in sequences if s.hidden is not None])
        with self._stats.computing():
            return self._model.lm_head(hidden)

    def _watched_step(self, sequences: list[Sequence], watched: list[int]) -> Callable[..., Tensor]:
        """A step that also gives the `watched` rows their spikes: the plain one, as hooks see no recorded one."""

        def step(*inputs: list[int]) -> Tensor:
            with record_spikes(self._model) as record:
                hidden = self._decoder.plain(*(torch.tensor(values, device=self._model.device) for values in inputs))
            for row in watched:
                sequences[row].show_spikes(_raster(record, row))
            return hidden

        return step


def _advance(sequences: list[Sequence], hidden: Tensor, num_tokens: int) -> None:
    """Note the last `hidden [B, D]` of each sequence after `num_tokens` more tokens."""
    # A copy: a view would keep the hidden states of the whole chunk, and a recorded step writes over them.
    for sequence, last in zip(sequences, hidden.clone(), strict=True):
        sequence.num_computed += num_tokens
        sequence.hidden = last


def _raster(record: SpikeRecord, row: int) -> dict[str, list[int]]:
    """Counts of evenly spaced channels of one row of the batch, by encoder."""
    raster = {}
    for name, calls in record.counts.items():
        counts = calls[-1][row, -1]
        raster[name] = counts[:: max(1, len(counts) // RASTER_CHANNELS)][:RASTER_CHANNELS].tolist()
    return raster
