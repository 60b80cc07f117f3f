"""Expert parallelism: each rank of a group runs its share of the experts, on the tokens that all of them send it.

What is shared is the work and the activations; weights lie where ZeRO puts them, those of experts as all others.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spikingbrain.experts import run_experts

from .collectives import Group, all_gather, exchange


class ExpertsAcrossRanks:
    """Runs experts as `run_experts` does: rank p of P the p-th of P equal shares of them.

    With a `capacity` an expert takes at most so many times its even share of the group's tokens, first come first; the
    others get zero from it and are counted in `dropped`.
    """

    def __init__(self, group: Group, capacity: float | None = None):
        self.group, self.capacity = group, capacity
        self.dropped = 0

    def __call__(self, experts: Sequence[nn.Module], rows: Tensor, sizes: Tensor) -> Tensor:
        """`rows [R, D]`, those of each expert after those of the one before, `sizes [E]` -> `[R, D]`."""
        group, share = self.group, len(experts) // self.group.size
        counts = all_gather(sizes, group)
        mine = slice(group.rank * share, (group.rank + 1) * share)
        send = sizes.view(group.size, share).sum(1).tolist()
        receive = counts[:, mine].sum(1).tolist()
        received = exchange(rows, send, receive, group)
        # From one block a rank to one block an expert.
        owner = torch.arange(share, device=rows.device).repeat(group.size)
        order = torch.repeat_interleave(owner, counts[:, mine].flatten()).argsort(stable=True)
        wanted = counts[:, mine].sum(0)
        kept = self._within_capacity(wanted, int(counts.sum()), len(experts))
        taken = order[_first_of_each(wanted, kept)]
        # The experts of other ranks run on no rows, so that all ranks use the same parameters.
        full = torch.zeros_like(sizes)
        full[mine] = kept
        out = run_experts(experts, received[taken], full)
        return exchange(out.new_zeros(len(received), out.shape[1]).index_put((taken,), out), receive, send, group)

    def _within_capacity(self, sizes: Tensor, total: int, num_experts: int) -> Tensor:
        """How many of its rows each of this rank's experts takes."""
        if self.capacity is None:
            return sizes
        kept = sizes.clamp(max=math.ceil(self.capacity * total / num_experts))
        self.dropped += int((sizes - kept).sum())
        return kept


def _first_of_each(sizes: Tensor, kept: Tensor) -> Tensor:
    """Places of the first `kept [E]` of `sizes [E]` neighbouring rows."""
    place = torch.arange(int(sizes.sum()), device=sizes.device)
    within = place - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    return place[within < torch.repeat_interleave(kept, sizes)]


def share_experts(model: Any, group: Group, capacity: float | None) -> None:
    """Let the ranks of `group` share the experts of every layer; raises ValueError where they cannot evenly."""
    runner = ExpertsAcrossRanks(group, capacity)
    for module in model.modules():
        if hasattr(module, "run_experts"):
            if len(module.experts) % group.size:
                raise ValueError(f"{len(module.experts)} experts cannot be shared evenly by {group.size} ranks")
            module.run_experts = runner


def dropped_tokens(model: Any) -> int:
    """How many tokens this rank's experts had no room for since the last call."""
    runners = {module.run_experts for module in model.modules() if hasattr(module, "run_experts")}
    total = 0
    for runner in runners:
        if isinstance(runner, ExpertsAcrossRanks):
            total, runner.dropped = total + runner.dropped, 0
    return total
