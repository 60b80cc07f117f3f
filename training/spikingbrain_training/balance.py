"""Even use of experts in training: what it adds to the loss, how loads are summed, and the move after a step.

A model without experts has no loads and adds nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikingbrain.experts import Routing, balance_loss, choices, expert_load, routers, shift_balance_

from .collectives import summed
from .data import Batch
from .distributed import World, total
from .sequence import Piece

Record = dict[str, list[Routing]]


def loss(model: nn.Module, record: Record, batch: Batch | Piece) -> Tensor | float:
    """The weighted balance loss of a batch in nats, summed over its tokens and layers; a piece has its share of it."""
    rows, terms = batch.rows, []
    for name, router in routers(model).items():
        if router.moe["aux_loss"]:
            (routing,) = record[name]
            chosen = choices(routing, rows, batch.num_rows)
            whole = summed(chosen, batch.group) if isinstance(batch, Piece) else chosen
            terms.append(router.moe["aux_loss"] * balance_loss(routing, rows, whole))
    return torch.stack(terms).sum() if terms else 0.0


class Sums(NamedTuple):
    """Of a step so far: the loss, the balance loss, and the tokens by layer and expert `loads [L, E]`."""

    loss: float
    unevenness: float
    loads: Tensor

    @classmethod
    def zero(cls, model: nn.Module) -> "Sums":
        """Before the first batch."""
        layers = routers(model).values()
        width = max((router.out_features for router in layers), default=0)
        return cls(0.0, 0.0, torch.zeros(len(layers), width, dtype=torch.float64))

    def add(self, loss: Tensor, unevenness: Tensor | float, record: Record) -> "Sums":
        """With one batch more."""
        loads = [expert_load(routing).cpu() for (routing,) in record.values()]
        more = torch.stack(loads) if loads else 0
        return Sums(
            self.loss + float(loss.detach()),
            self.unevenness + float(torch.as_tensor(unevenness).detach()),
            self.loads + more,
        )

    def over_processes(self, world: World) -> "Sums":
        """Summed over all of them."""
        loss, unevenness, *loads = total(world, self.loss, self.unevenness, *self.loads.flatten().tolist())
        return Sums(loss, unevenness, torch.tensor(loads, dtype=torch.float64).view_as(self.loads))


def shift_(model: nn.Module, loads: Tensor) -> None:
    """Move each layer's loss-free balance by its row of `loads [L, E]`."""
    for router, load in zip(routers(model).values(), loads, strict=True):
        shift_balance_(router, load.to(router.weight.device))


def metrics(sums: Sums, num_targets: float) -> dict[str, float]:
    """Balance loss a token, and the tokens of the fullest and emptiest expert of any layer: 1 where use is even."""
    if not len(sums.loads):
        return {}
    relative = sums.loads / sums.loads.mean(1, keepdim=True)
    return {
        "balance_loss": sums.unevenness / num_targets,
        "expert_load_max": float(relative.max()),
        "expert_load_min": float(relative.min()),
    }
