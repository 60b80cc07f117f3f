"""Collectives that gradients go through: the backward pass of each is the same exchange the other way round."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Processes that share a sequence or the experts; `received` counts bytes from other ranks by collective."""

    handle: Any
    rank: int
    size: int
    received: dict[str, int] = field(default_factory=dict)

    def count(self, name: str, num_bytes: int) -> None:
        """Add to what came from others."""
        self.received[name] = self.received.get(name, 0) + num_bytes

    def peer(self, offset: int) -> int:
        """The global rank of the member `offset` places after this one."""
        return dist.get_global_rank(self.handle, self.rank + offset)


def make_group(rank: int, size: int, width: int, stride: int = 1) -> Group:
    """This process's group of `width` ranks that are `stride` apart; every process must call it, in the same order."""
    mine = None
    for first in (first for first in range(size) if (first // stride) % width == 0):
        members = [first + stride * number for number in range(width)]
        handle = dist.new_group(members)
        if rank in members:
            mine = Group(handle, members.index(rank), width)
    return mine


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        everything = x.new_empty(group.size, *x.shape)
        dist.all_gather(list(everything.unbind(0)), x.contiguous(), group=group.handle)
        group.count("all_gather", (group.size - 1) * x.nbytes)
        return everything

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        group = ctx.group
        received = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, gradient.contiguous(), group=group.handle)
        group.count("reduce_scatter", (group.size - 1) * gradient[0].nbytes)
        return received.sum(0), None


def all_gather(x: Tensor, group: Group) -> Tensor:
    """`x [...]` of every rank `[P, ...]`."""
    return _AllGather.apply(x, group)


def summed(x: Tensor, group: Group) -> Tensor:
    """The sum of `x` over the ranks, without gradients."""
    out = x.detach().clone()
    dist.all_reduce(out, group=group.handle)
    group.count("all_reduce", 2 * (group.size - 1) * x.nbytes // group.size)
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
        ctx.group, ctx.splits = group, (send, receive)
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        send, receive = ctx.splits
        return _all_to_all(gradient, receive, send, ctx.group), None, None, None


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group.handle)
    others = sum(receive) - receive[group.rank]
    group.count("all_to_all", others * math.prod(rows.shape[1:]) * rows.element_size())
    return received


def exchange(rows: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    """All-to-all: `rows [sum(send), ...]`, so many to each rank, for `[sum(receive), ...]`, in the order of ranks."""
    return _Exchange.apply(rows, send, receive, group)


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, like: Tensor, group: Group) -> Tensor:
        ctx.group = group
        state = torch.zeros_like(like)
        if group.rank > 0:
            dist.recv(state, group.peer(-1), group=group.handle)
            group.count("relay", state.nbytes)
        return state

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        if ctx.group.rank > 0:
            dist.send(gradient.contiguous(), ctx.group.peer(-1), group=ctx.group.handle)
        return None, None, None


def receive_state(like: Tensor, anchor: Tensor, group: Group) -> Tensor:
    """A state from the rank before, zero on the first; `anchor` ties it into the graph of the calling rank."""
    return _Receive.apply(anchor, like, group)


class _HandOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, state: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.like = group, torch.empty_like(state)
        if group.rank + 1 < group.size:
            dist.send(state.contiguous(), group.peer(1), group=group.handle)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        theirs = torch.zeros_like(ctx.like)
        if ctx.group.rank + 1 < ctx.group.size:
            dist.recv(theirs, ctx.group.peer(1), group=ctx.group.handle)
            ctx.group.count("relay", theirs.nbytes)
        return gradient, theirs, None


def hand_on(out: Tensor, state: Tensor, group: Group) -> Tensor:
    """`out` as it is, after giving `state` to the next rank, whose gradient of it comes back through `out`."""
    return _HandOn.apply(out, state, group)


class _PipelinedScan(torch.autograd.Function):
    """Rank r gets S_r = A_{r-1} S_{r-1} + B_{r-1}, in blocks of rows that follow each other through the ranks."""

    @staticmethod
    def forward(ctx: Any, keep: Tensor, update: Tensor, blocks: int, group: Group) -> Tensor:
        before = torch.zeros_like(update)
        for rows in torch.arange(update.shape[-2]).chunk(blocks):
            here = slice(int(rows[0]), int(rows[-1]) + 1)
            block = torch.zeros_like(update[..., here, :]).contiguous()
            if group.rank > 0:
                dist.recv(block, group.peer(-1), group=group.handle)
                group.count("relay", block.nbytes)
            if group.rank + 1 < group.size:
                after = keep[..., here, None] * block + update[..., here, :]
                dist.send(after.contiguous(), group.peer(1), group=group.handle)
            before[..., here, :] = block
        ctx.save_for_backward(keep, before)
        ctx.group, ctx.blocks = group, blocks
        return before

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        keep, before = ctx.saved_tensors
        group, theirs = ctx.group, torch.zeros_like(before)
        for rows in torch.arange(before.shape[-2]).chunk(ctx.blocks):
            here = slice(int(rows[0]), int(rows[-1]) + 1)
            block = torch.zeros_like(before[..., here, :]).contiguous()
            if group.rank + 1 < group.size:
                dist.recv(block, group.peer(1), group=group.handle)
                group.count("relay", block.nbytes)
            if group.rank > 0:
                mine = gradient[..., here, :] + keep[..., here, None] * block
                dist.send(mine.contiguous(), group.peer(-1), group=group.handle)
            theirs[..., here, :] = block
        return (theirs * before).sum(-1), theirs, None, None


def pipelined_scan(keep: Tensor, update: Tensor, blocks: int, group: Group) -> Tensor:
    """The state before this rank `[..., K, V]` of S <- diag(keep [..., K]) S + update (ZeCO, arXiv 2507.01004)."""
    return _PipelinedScan.apply(keep, update, blocks, group)
