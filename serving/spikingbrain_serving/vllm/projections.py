"""A block's projections on vLLM's parallel linears.

Column-parallel where heads or channels are cut, replicated where `shard` says so, row-parallel after the mixing.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

from spikingbrain.errors import InputError
from spikingbrain.mixers import Projection
from spikingbrain.model import MixerBlock
from spikingbrain.neurons import Spikes
from spikingbrain.quantization import METHOD
from spikingbrain.spiking import SpikingLinear
from spikingbrain.state import LayerState

from .quantization import SpikeInt8Config


class Piece(NamedTuple):
    """Where this rank's part of one projection lies: the rows and columns of its weight `[out, in]` as (first, count).

    `linear` holds it from row `offset` on, as number `shard` (None: it is the only one).
    """

    linear: Any
    shard: int | None
    offset: int
    rows: tuple[int, int]
    columns: tuple[int, int]


class ParallelProjections(nn.Module):
    """Projections that read the same input; those that are cut alike are one product."""

    def __init__(self, projections: dict[str, Projection], spiking: bool, quant: SpikeInt8Config | None, name: str):
        super().__init__()
        self.groups: list[dict[str, Projection]] = []
        self.linears = nn.ModuleList()
        if not spiking:
            for n in projections:
                refuse_dense(f"{name}.{n}", quant)
        keys = {n: (_cut(p), _is_quantised(f"{name}.{n}", quant)) for n, p in projections.items()}
        for key in dict.fromkeys(keys.values()):
            group = {n: projection for n, projection in projections.items() if keys[n] == key}
            self.groups.append(group)
            self.linears.append(_linear(group, spiking, quant if key[1] else None, f"{name}.{'_'.join(group)}"))

    def by_name(self, x: Tensor | Spikes) -> dict[str, Tensor]:
        """Each projection's local part of the output `[B, T, out / ranks]`."""
        results: dict[str, Tensor] = {}
        for group, linear in zip(self.groups, self.linears, strict=True):
            out = _spike_product(linear, x) if isinstance(x, Spikes) else linear(x)[0]
            widths = [local_width(projection) for projection in group.values()]
            results.update(zip(group, out.split(widths, dim=-1), strict=True))
        return results

    def forward(self, x: Tensor | Spikes) -> Tensor:
        """The output of a single projection."""
        (out,) = self.by_name(x).values()
        return out

    def pieces(self) -> dict[str, Piece]:
        """What of each projection's weight this rank loads, and where to."""
        pieces = {}
        for group, linear in zip(self.groups, self.linears, strict=True):
            offset = 0
            for index, (name, projection) in enumerate(group.items()):
                pieces[name] = _piece(linear, index, offset, projection)
                offset += pieces[name].rows[1]
        return pieces


class GatheredEncoder(nn.Module):
    """An encoder of what is spread over the ranks: a token's threshold depends on all its channels."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, state: LayerState | None = None, **context: Any) -> Spikes:
        """`x [B, T, C / ranks]` -> spikes of all C channels, the same on every rank."""
        if not x.numel():  # an expert without a token, on every rank: vLLM's gathering on a CPU would divide by zero
            x = x.new_empty(*x.shape[:-1], x.shape[-1] * get_tensor_model_parallel_world_size())
        else:
            x = tensor_model_parallel_all_gather(x)
        return self.encoder(x, state, **context)


def make_parallel(block: MixerBlock, quant: SpikeInt8Config | None, name: str) -> dict[str, Piece]:
    """Put vLLM's linears in place of a block's; returns what to load into them, by projection."""
    pieces: dict[str, Piece] = {}
    for source in dict.fromkeys(projection.source for projection in block.projections.values()):
        here = {n: p for n, p in block.projections.items() if p.source == source}
        takes_spikes = {n for n in here if isinstance(block.get_submodule(n), SpikingLinear)}
        for projection_name in here:
            delattr(block, projection_name)
        dense = {n: p for n, p in here.items() if n not in takes_spikes}
        if takes_spikes:
            spiking = {n: here[n] for n in here if n in takes_spikes}
            block.packed[source] = ParallelProjections(spiking, True, quant, name)
            pieces |= block.packed[source].pieces()  # type: ignore[operator]
            # What reads the values themselves goes beside the spikes' product.
            for projection_name, projection in dense.items():
                module = ParallelProjections({projection_name: projection}, False, quant, name)
                block.add_module(projection_name, module)
                pieces |= module.pieces()
        else:
            block.packed[source] = ParallelProjections(dense, False, quant, name)
            pieces |= block.packed[source].pieces()  # type: ignore[operator]
    return pieces


def gather_before_encoding(block: MixerBlock) -> None:
    """Let the encoder of what is projected back see it whole."""
    if "mixed" in block.encoders:
        block.encoders["mixed"] = GatheredEncoder(block.encoders["mixed"])


def local_width(projection: Projection) -> int:
    """Outputs of a projection on this rank."""
    whole = projection.source == "mixed" or projection.shard == "replicate"
    return projection.out_features if whole else projection.out_features // get_tensor_model_parallel_world_size()


def _cut(projection: Projection) -> tuple[bool, bool, bool]:
    return projection.source == "mixed", projection.shard == "replicate", projection.bias


def refuse_dense(name: str, quant: SpikeInt8Config | None) -> None:
    """Raise `InputError` where projection `name`, which takes no spikes, were to have int8 weights."""
    if _is_quantised(name, quant):
        raise InputError(f"{METHOD}: {name} takes no spikes; name it in exclude or turn spikes on")


def _is_quantised(name: str, quant: SpikeInt8Config | None) -> bool:
    return quant is not None and not any(f".{name}".endswith(f".{end}") for end in quant.exclude)


def _linear(group: dict[str, Projection], spiking: bool, quant: SpikeInt8Config | None, name: str) -> nn.Module:
    first, *_ = group.values()
    # A spike's worth is multiplied in before the bias is added.
    common = {"bias": first.bias, "skip_bias_add": spiking, "quant_config": quant, "prefix": name}
    if first.source == "mixed":
        return RowParallelLinear(first.in_features, first.out_features, input_is_parallel=not spiking, **common)
    widths = [projection.out_features for projection in group.values()]
    return MergedColumnParallelLinear(first.in_features, widths, disable_tp=first.shard == "replicate", **common)


def _spike_product(linear: nn.Module, spikes: Spikes) -> Tensor:
    out, bias = linear(spikes.counts)
    out = out * spikes.scale.to(out.dtype)
    return (out if bias is None else out + bias).to(spikes.counts.dtype)


def _piece(linear: nn.Module, index: int, offset: int, projection: Projection) -> Piece:
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    width, columns = local_width(projection), projection.in_features
    if projection.source == "mixed":
        return Piece(linear, None, 0, (0, width), (rank * (columns // ranks), columns // ranks))
    first = 0 if projection.shard == "replicate" else rank * width
    return Piece(linear, index, offset, (first, width), (0, columns))
