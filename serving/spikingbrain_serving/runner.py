"""The model's step function over a pool of states: the only place where the engine computes."""

from typing import Any

import torch
from torch import Tensor

from spikingbrain.state import StatePool

from .sequence import Sequence


class ModelRunner:
    """Runs chunks of prompts, one sequence a call, and single tokens, a row for each sequence."""

    def __init__(self, model: Any, pool: StatePool):
        self._model = model
        self._pool = pool

    @torch.inference_mode()
    def prefill(self, sequence: Sequence, num_tokens: int) -> Tensor:
        """Compute `num_tokens` more tokens of the prompt; logits `[V]` after the last of them."""
        start = sequence.num_computed
        tokens = sequence.prompt_token_ids[start : start + num_tokens]
        return self._step([tokens], [list(range(start, start + num_tokens))], [sequence])[0]

    @torch.inference_mode()
    def decode(self, sequences: list[Sequence]) -> Tensor:
        """Compute each sequence's newest token; logits `[B, V]`."""
        tokens = [sequence.output_token_ids[-1:] for sequence in sequences]
        return self._step(tokens, [[sequence.num_computed] for sequence in sequences], sequences)

    def _step(self, tokens: list[list[int]], positions: list[list[int]], sequences: list[Sequence]) -> Tensor:
        device = self._model.device
        slots = [sequence.slot for sequence in sequences if sequence.slot is not None]
        hidden, _ = self._model.step(
            torch.tensor(tokens, device=device),
            self._pool.states(slots),
            positions=torch.tensor(positions, device=device),
        )
        for sequence, row in zip(sequences, tokens, strict=True):
            sequence.num_computed += len(row)
        return self._model.lm_head(hidden[:, -1])
