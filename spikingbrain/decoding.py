"""One more token for each of several sequences in a pool: the model's step, on the CPU recorded and made again."""

from typing import Any

import torch
from torch import Tensor

from spikingbrain_kernels.recording import Recording

from .state import StatePool

# With more rows the products take so long that what lies between them does not matter, and recordings take memory.
MAX_RECORDED_ROWS = 8


class Decoder:
    """`model.step` for single tokens over the states of `pool`.

    A step of so many rows is recorded the first time and repeated from then on, bit for bit the same. `plain` is the
    step as it is. `why_not`: what of the model cannot be recorded, if something cannot.
    """

    def __init__(self, model: Any, pool: StatePool):
        self._model, self._pool = model, pool
        self._recordings: dict[tuple[int, int], Recording] = {}
        self.why_not = None if model.device.type == "cpu" else "not on a CPU"

    def plain(self, tokens: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """Last hidden states `[B, D]` after `tokens [B]` at `positions [B]` of the sequences in `slots [B]`."""
        hidden, _ = self._model.step(tokens[:, None], self._pool.states(slots), positions=positions[:, None])
        return hidden[:, -1]

    @torch.inference_mode()
    def __call__(self, tokens: list[int], positions: list[int], slots: list[int]) -> Tensor:
        """As `plain`; the result is overwritten by the next call."""
        inputs = torch.tensor([tokens, positions, slots]).unbind()
        if self.why_not or len(tokens) > MAX_RECORDED_ROWS:
            return self.plain(*(x.to(self._model.device) for x in inputs))
        key = len(tokens), torch.get_num_threads()
        recording = self._recordings.get(key)
        return self._record(key, inputs) if recording is None else recording(*inputs)

    def _record(self, key: tuple[int, int], inputs: tuple[Tensor, ...]) -> Tensor:
        recording = Recording(self.plain, *inputs)
        self.why_not = recording.why_not
        if self.why_not is None:
            self._recordings[key] = recording
        return recording.outputs
