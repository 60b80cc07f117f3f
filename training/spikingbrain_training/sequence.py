"""Sequence parallelism: each rank has a piece of a packed row, and what a mixer remembers passes between the pieces.

A mixer is not told: its state is a `Carrier`, which runs the mixer's op on the piece and does the exchange that the
mixer's `kind` asks for. Documents that lie in one piece exchange nothing that is used.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from spikingbrain.state import LayerState, StateSpec
from spikingbrain_kernels import Carrier

from .collectives import Group, all_gather, exchange, hand_on, pipelined_scan, receive_state
from .data import Batch

SCAN_BLOCKS = 8
STATE_BYTES = 4


class Piece(NamedTuple):
    """A rank's part of a packed row. `cu_seqlens`, `positions [1, T]`: of the whole row; `batch`: this rank's tokens.

    `num_rows`: how many rows of a batch were laid end to end; `scan`: how composed states travel, by `all_gather` or
    `pipelined`.
    """

    group: Group
    batch: Batch
    cu_seqlens: Tensor
    positions: Tensor
    num_rows: int
    scan: str = "all_gather"

    def to(self, device: torch.device) -> "Piece":
        """The same on `device`."""
        row = (self.cu_seqlens.to(device), self.positions.to(device))
        return Piece(self.group, self.batch.to(device), *row, self.num_rows, self.scan)

    @property
    def labels(self) -> Tensor:
        """`[1, T / P]`."""
        return self.batch.labels

    @property
    def rows(self) -> Tensor:
        """Which row of the batch each token of the piece is of `[T / P]`."""
        length = self.positions.shape[1]
        here = torch.arange(self.labels.shape[1], device=self.labels.device)
        return (here + self.group.rank * length // self.group.size) * self.num_rows // length

    @property
    def num_targets(self) -> int:
        """Tokens of the piece that count in the loss."""
        return self.batch.num_targets

    @property
    def continues(self) -> bool:
        """Whether the first document began on an earlier rank."""
        return int(self.batch.positions[0, 0]) > 0

    @property
    def spans(self) -> bool:
        """Whether one document began on an earlier rank and does not end here, so that its state passes through."""
        return self.continues and len(self.batch.cu_seqlens) == 2


def cut(batch: Batch, group: Group, scan: str = "all_gather") -> Piece:
    """This rank's piece of a batch, its rows laid end to end; raises ValueError if the ranks cannot share it evenly."""
    row = Batch(*(part.flatten()[None] for part in batch))
    length = row.inputs.shape[1]
    if length % group.size:
        raise ValueError(f"{length} tokens cannot be cut into {group.size} equal pieces")
    here = slice(group.rank * length // group.size, (group.rank + 1) * length // group.size)
    return Piece(group, Batch(*(part[:, here] for part in row)), batch.cu_seqlens, row.positions, batch.num_rows, scan)


class StatesAcrossRanks:
    """What the model is given as its cache: one carrier a state, made for one piece."""

    def __init__(self, model: Any, piece: Piece):
        self.states = [_layer_states(layer, model.dtype, piece) for layer in model.model.layers]

    def begin(self, rows: int, device: torch.device) -> None:
        """Nothing is allocated."""

    def advance(self, states: list[LayerState], num_tokens: Any, columns: int) -> None:
        """Nothing is kept: a piece is read once."""


def _layer_states(layer: Any, dtype: torch.dtype, piece: Piece) -> dict[str, Carrier]:
    return {spec.name: make_carrier(state_kind(layer, spec), spec, piece) for spec in layer.state_specs(dtype)}


def state_kind(layer: Any, spec: StateSpec) -> str:
    """The `kind` of the mixer whose state this is; a neuron's membrane is serial."""
    own = spec.name.removeprefix("mlp.")
    block, mixer = layer.mixer if own == spec.name else layer.mlp, own.partition(".")[0]
    return block.get_submodule(mixer).kind if mixer in block.names else "serial"


def make_carrier(kind: str, spec: StateSpec, piece: Piece) -> Carrier:
    """The carrier for a state of a mixer of this kind."""
    if spec.kind == "ring":
        return WindowHalo(piece)
    if spec.kind == "growing":
        return HeadExchange(piece)
    if spec.kind == "conv":
        return InputHalo(piece)
    return COMPOSED.get(kind, Relay)(piece, spec)


def _first_states(first: Tensor, documents: int) -> Tensor:
    """States `[documents, ...]`: the first document's, then zeros."""
    return torch.cat([first[None], first.new_zeros(documents - 1, *first.shape)])


class Relay(Carrier):
    """A state that does not compose: each rank waits for the one before it. Received: one state, forward and back."""

    def __init__(self, piece: Piece, spec: StateSpec):
        self.piece, self.spec = piece, spec

    def carry(self, op: Callable[..., Any], *args: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        """Wait, run, hand on."""
        like = torch.zeros(self.spec.shape, dtype=self.spec.dtype, device=args[0].device)
        before = receive_state(like, args[0], self.piece.group) * self.piece.continues
        first = _first_states(before, len(self.piece.batch.cu_seqlens) - 1)
        out, after = op(*args, **{**kwargs, "state": first})
        return hand_on(out, after[-1].to(like.dtype), self.piece.group), self


class DiagonalScan(Relay):
    """Gated linear attention: the update is S <- diag(a) S + B, so (a, B) of each rank compose (arXiv 2502.07563).

    Received forward: (P - 1) H K (V + 1) numbers by all-gather, H K V pipelined; the same backward. Other ops of a
    mixer of this kind are relayed.
    """

    def carry(self, op: Callable[..., Any], *args: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        """Run on the piece alone, then add what the state before it gives to the first document's tokens."""
        if op.__name__ != "gated_linear":
            return super().carry(op, *args, **kwargs)
        out, after = op(*args, **kwargs)
        query, _, _, log_decay = args
        decay = log_decay[0].to(after.dtype).expand(-1, -1, after.shape[2])
        update = after[-1]
        keep = decay.sum(0).exp() if self.piece.spans else decay.sum(0) * 0
        before = self._scan(keep, update) * self.piece.continues
        first = int(self.piece.batch.cu_seqlens[1])
        reach = decay[:first].cumsum(0).exp()[:, :, None]
        reader = query[0, :first].to(after.dtype).unflatten(1, (after.shape[1], -1)) * reach
        given = kwargs["scale"] * torch.einsum("thgk,hkv->thgv", reader, before).flatten(1, 2)
        head = out[:, :first] + given.to(out.dtype)
        return torch.cat([head, out[:, first:]], dim=1), self

    def _scan(self, keep: Tensor, update: Tensor) -> Tensor:
        group = self.piece.group
        if self.piece.scan == "pipelined":
            return pipelined_scan(keep, update, SCAN_BLOCKS, group)
        everything = all_gather(torch.cat([keep[..., None], update], dim=-1), group)
        state = everything[0, ..., 1:] * 0
        for rank in range(group.rank):
            state = everything[rank, ..., :1] * state + everything[rank, ..., 1:]
        return state


class DenseScan(Relay):
    """The delta rule: S <- M S + B with a K x K matrix M, what the op makes of the identity when it writes nothing.

    Received forward: (P - 1) H K (K + V) numbers; the same backward. Other ops of such a mixer are relayed.
    """

    def carry(self, op: Callable[..., Any], *args: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        """Find the piece's map, compose those before it, run the piece from the state they give."""
        if op.__name__ != "gated_delta":
            return super().carry(op, *args, **kwargs)
        _, after = op(*args, **kwargs)
        everything = all_gather(torch.cat([self._map(op, after, *args, **kwargs), after[-1]], dim=-1), self.piece.group)
        width = after.shape[2]
        state = everything[0, ..., width:] * 0
        for rank in range(self.piece.group.rank):
            state = everything[rank, ..., :width] @ state + everything[rank, ..., width:]
        first = _first_states(state * self.piece.continues, len(after))
        return op(*args, **{**kwargs, "state": first})[0], self

    def _map(self, op: Callable[..., Any], after: Tensor, *args: Tensor, **kwargs: Any) -> Tensor:
        identity = torch.eye(after.shape[2], dtype=after.dtype, device=after.device).expand(1, after.shape[1], -1, -1)
        if not self.piece.spans:
            return identity[0] * 0
        query, key, value, *rest = args
        nothing = value.new_zeros(*value.shape[:3], key.shape[3])
        return op(query, key, nothing, *rest, **{**kwargs, "state": identity.contiguous()})[1][0]


class WindowHalo(Carrier):
    """Window attention: the keys and values of the window - 1 tokens before the piece, from the ranks that have them.

    Received forward: 2 min(window - 1, tokens before the piece) H_kv D numbers.
    """

    def __init__(self, piece: Piece):
        self.piece = piece

    def carry(self, op: Callable[..., Any], *args: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        """The first document reads the halo from a ring; the documents after it need none."""
        ring = self._ring(torch.stack(args[1:], dim=2)[0], kwargs["window"])
        first, edges = int(self.piece.batch.cu_seqlens[1]), kwargs["cu_seqlens"]
        positions, length = kwargs["positions"], args[0].shape[1]
        head = {**kwargs, "positions": positions[:, :first], "cu_seqlens": edges[:2], "state": ring}
        outputs = [op(*(x[:, :first] for x in args), **head)[0]]
        if first < length:
            tail = {**kwargs, "positions": positions[:, first:], "cu_seqlens": edges[1:] - first}
            outputs.append(op(*(x[:, first:] for x in args), **tail)[0])
        return torch.cat(outputs, dim=1), self

    def _ring(self, entries: Tensor, window: int) -> Tensor:
        """The ring `[1, window, 2, H_kv, D]` before the piece from each rank's `entries [T, 2, H_kv, D]`."""
        before = halo(entries, window, self.piece)
        position = int(self.piece.batch.positions[0, 0])
        place = torch.arange(position - len(before), position, device=entries.device)
        capacity = min(window, self.piece.positions.shape[1])
        ring = entries.new_zeros(1, capacity, *entries.shape[1:])
        return ring.index_put((torch.zeros_like(place), place % capacity), before)


class InputHalo(Carrier):
    """A short convolution: the last inputs before the piece. Received forward: at most (N - 1) C numbers, N taps."""

    def __init__(self, piece: Piece):
        self.piece = piece

    def carry(self, op: Callable[..., Any], *args: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        """Run on the piece with the inputs before it as its first document's state."""
        x, weight = args
        before = halo(x[0], weight.shape[1], self.piece)
        first = pad(before, (0, 0, weight.shape[1] - 1 - len(before), 0))
        states = _first_states(first, len(self.piece.batch.cu_seqlens) - 1)
        return op(*args, **{**kwargs, "state": states})[0], self


def halo(entries: Tensor, window: int, piece: Piece) -> Tensor:
    """What the ranks before have of the first document's last `window - 1` `entries [T, ...]` before the piece."""
    group, length = piece.group, len(entries)
    counts = halo_counts(window, length, group.size)
    send = [counts.get(rank - group.rank, 0) for rank in range(group.size)]
    receive = [counts.get(group.rank - rank, 0) for rank in range(group.size)]
    received = exchange(torch.cat([entries[length - count :] for count in send]), send, receive, group)
    return received[len(received) - min(int(piece.batch.positions[0, 0]), window - 1) :]


def halo_counts(window: int, length: int, size: int) -> dict[int, int]:
    """How many of its last tokens a rank gives to the one so many places after it; ranks have `length` tokens."""
    behind = {hop: min(length, window - 1 - (hop - 1) * length) for hop in range(1, size)}
    return {hop: count for hop, count in behind.items() if count > 0}


class HeadExchange(Carrier):
    """Softmax attention: each rank gets some heads of all tokens (DeepSpeed-Ulysses, arXiv 2309.14509) and gives back.

    Query heads are padded to a multiple of the ranks; a rank receives only the key heads that its query heads read.
    Received forward: (P - 1) T / P (2 h + 2 m) D numbers, h query and m key heads a rank.
    """

    def __init__(self, piece: Piece):
        self.piece = piece

    def carry(self, op: Callable[..., Any], *args: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        """Tokens for heads, attend over the whole row, heads for tokens."""
        query, key, value = args
        queries, keys, reads = head_shares(query.shape[2], key.shape[2], self.piece.group.size)
        mine = reads[self.piece.group.rank].to(key.device)
        query = self._to_heads(query, queries)
        key, value = (self._to_heads(x, keys)[:, :, mine] for x in (key, value))
        whole = {**kwargs, "positions": self.piece.positions, "cu_seqlens": self.piece.cu_seqlens}
        if kwargs.get("sinks") is not None:
            whole["sinks"] = kwargs["sinks"][:, :, keys.to(mine.device)[self.piece.group.rank][mine]]
        out, _ = op(query, key, value, **whole)
        return self._to_tokens(out)[:, :, : args[0].shape[2]], self

    def _to_heads(self, x: Tensor, heads: Tensor) -> Tensor:
        """`[1, T / P, H, D]` -> `[1, T, h, D]`; `heads [P, h]` says which rank gets which."""
        size = self.piece.group.size
        blocks = x[0, :, heads.flatten().to(x.device)].unflatten(1, heads.shape).transpose(0, 1)
        return _swap(blocks.reshape(size, -1, *blocks.shape[2:]), self.piece.group).flatten(0, 1)[None]

    def _to_tokens(self, x: Tensor) -> Tensor:
        """`[1, T, h, V]` -> `[1, T / P, P h, V]`."""
        blocks = _swap(x[0].unflatten(0, (self.piece.group.size, -1)), self.piece.group)
        return blocks.transpose(0, 1).flatten(1, 2)[None]


def _swap(blocks: Tensor, group: Group) -> Tensor:
    """Block p of `blocks [P, ...]` to rank p."""
    return exchange(blocks, [1] * group.size, [1] * group.size, group)


def head_shares(query_heads: int, key_heads: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query heads `[P, h]` and key heads `[P, m]` of each rank, and which of its m keys each query reads `[P, h]`."""
    share = -(-query_heads // size)
    queries = torch.arange(size * share).clamp(max=query_heads - 1).view(size, share)
    wanted = [sorted(set(row)) for row in (queries // (query_heads // key_heads)).tolist()]
    most = max(map(len, wanted))
    keys = torch.tensor([row + row[-1:] * (most - len(row)) for row in wanted])
    groups = (queries // (query_heads // key_heads)).tolist()
    reads = torch.tensor([[row.index(head) for head in heads] for row, heads in zip(wanted, groups, strict=True)])
    return queries, keys, reads


def received_numbers(model: Any, length: int, size: int, scan: str, width: int) -> int:
    """Bytes that a rank in the middle receives in one forward pass, `length` tokens a rank; the same backward.

    States are fp32; what is exchanged by token has `width` bytes a number.
    """
    return sum(
        _received(state_kind(layer, spec), spec, model.config, length, size, scan, width)
        for layer in model.model.layers
        for spec in layer.state_specs(model.dtype)
    )


def _received(kind: str, spec: StateSpec, config: Any, length: int, size: int, scan: str, width: int) -> int:
    numbers = math.prod(spec.shape)
    if spec.kind == "growing":
        queries, keys, _ = head_shares(config.num_attention_heads, config.num_key_value_heads, size)
        return width * (size - 1) * length * 2 * (queries.shape[1] + keys.shape[1]) * config.head_dim
    if spec.kind == "ring":
        return width * sum(halo_counts(spec.shape[0], length, size).values()) * math.prod(spec.shape[1:])
    if spec.kind == "conv":
        return width * numbers
    if len(spec.shape) != 3 or (kind == "diagonal" and scan == "pipelined"):
        return STATE_BYTES * numbers
    if kind == "diagonal":
        return STATE_BYTES * (size - 1) * (numbers + math.prod(spec.shape[:2]))
    if kind == "dense":
        return STATE_BYTES * (size - 1) * (numbers + math.prod(spec.shape[:2]) * spec.shape[1])
    return STATE_BYTES * numbers


COMPOSED: dict[str, Any] = {"diagonal": DiagonalScan, "dense": DenseScan}
