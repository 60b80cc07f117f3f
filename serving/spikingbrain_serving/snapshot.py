"""A state outside the pool: what the model remembers after some tokens, as plain tensors, never written to again."""

from dataclasses import dataclass

from torch import Tensor

States = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Snapshot:
    """The states after `num_tokens` tokens and the last hidden state `[D]` there, from which the next logits follow."""

    states: States
    hidden: Tensor
    num_tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.hidden.nbytes + sum(tensor.nbytes for layer in self.states for tensor in layer.values())
