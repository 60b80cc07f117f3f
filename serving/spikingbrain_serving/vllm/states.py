"""States in vLLM's blocks: what a layer remembers of a sequence is one page, read and written by opaque calls.

A page holds all of a layer's states one after the other; every layer's page has the same size, so that vLLM manages
them as one group. Softmax layers whose keys vLLM pages itself have no part in it.
"""

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase

# Registers torch.ops.vllm.linear_attention, which vLLM splits graphs at: it calls `_forward` of a layer by its name.
from vllm.model_executor.layers.mamba.linear import minimax_linear_attn  # noqa: F401
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.linear_attn import (
    LinearAttentionBackend,
    LinearAttentionMetadata,
    LinearAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from spikingbrain.model import DecoderLayer, SpikingBrainModel
from spikingbrain.state import LayerState, StateSpec
from spikingbrain_kernels import Slots

ALIGNMENT = 64

# (tensors by name `[B, T, width]`, state, positions `[B, T]`, cu_seqlens) -> tensors by name, new state.
Function = Callable[[dict[str, Tensor], LayerState, Tensor, Tensor | None], tuple[dict[str, Tensor], LayerState]]


class StateMetadataBuilder(LinearAttentionMetadataBuilder):
    """Clears the pages of sequences that begin: vLLM hands out blocks as their last owner left them.

    A prompt of one token counts as a decode, so that whether a request is being decoded does not tell.
    """

    # The calls run between the pieces of a graph, not in it.
    _cudagraph_support = AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LinearAttentionMetadata:
        """As vLLM's, once a batch and before it runs."""
        batch = super().build(common_prefix_len, common_attn_metadata, fast_build)
        # An upper bound, but exact where nothing was computed before; rows that pad the batch have no tokens.
        ends = common_attn_metadata.seq_lens_cpu_upper_bound
        begins = (ends == common_attn_metadata.query_start_loc_cpu.diff()) & (ends > 0)
        begin = begins.nonzero().squeeze(1)
        if len(begin):
            blocks = batch.state_indices_tensor[begin.to(batch.state_indices_tensor.device)]
            layers = self.vllm_config.compilation_config.static_forward_context
            for name in self.layer_names:
                layers[name].kv_cache[0][blocks] = 0
        return batch


class StateBackend(LinearAttentionBackend):
    """Names the builder."""

    @staticmethod
    def get_builder_cls() -> type[StateMetadataBuilder]:
        """The builder above."""
        return StateMetadataBuilder


def page_layout(layer: DecoderLayer, dtype: torch.dtype, ranks: int, max_tokens: int) -> list[StateSpec]:
    """What of one layer's states on one of `ranks` lies in a page; a growing one has room for `max_tokens`."""
    paged = {f"{name}." for name in layer.mixer.names if is_paged(layer.mixer.get_submodule(name))}
    specs = [spec for spec in layer.state_specs(dtype) if not spec.name.startswith(tuple(paged))]
    return [_local(spec, ranks, max_tokens) for spec in specs]


def is_paged(mixer: Any) -> bool:
    """Whether vLLM's attention computes this mixer and keeps its keys; it knows no learned sinks."""
    return mixer.kind == "attention" and mixer.sinks is None


def _local(spec: StateSpec, ranks: int, max_tokens: int) -> StateSpec:
    shape = list(spec.shape)
    if spec.kind == "growing":
        shape[0] = max_tokens
    if spec.shard_dim is not None:
        shape[spec.shard_dim] //= ranks
    return replace(spec, shape=tuple(shape))


def page_bytes(model: SpikingBrainModel, dtype: torch.dtype, ranks: int, max_tokens: int) -> int:
    """The size of every layer's page: that of the layer that remembers most."""
    layouts = (page_layout(layer, dtype, ranks, max_tokens) for layer in model.layers)
    return max(sum(_room(spec) for spec in layout) for layout in layouts)


def _room(spec: StateSpec) -> int:
    return -(-prod(spec.shape) * spec.dtype.itemsize // ALIGNMENT) * ALIGNMENT


class LayerStates(nn.Module, MambaBase):
    """The pages of one layer, as vLLM's cache manager sees them: one tensor of bytes a sequence."""

    def __init__(self, layout: list[StateSpec], num_bytes: int, prefix: str):
        super().__init__()
        self.layout = layout
        self.num_bytes = num_bytes
        self.prefix = prefix
        self.kv_cache = (torch.tensor([]),)
        get_current_vllm_config().compilation_config.static_forward_context[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """The kind of batch metadata."""
        return MambaAttentionBackendEnum.LINEAR

    def get_attn_backend(self) -> type[StateBackend]:
        """What builds the batch metadata."""
        return StateBackend

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """One tensor, so that vLLM copies a page as a whole."""
        return ((self.num_bytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Bytes."""
        return (torch.int8,)

    def pools(self, owner: str) -> dict[str, Tensor]:
        """Each of `owner`'s states in all blocks `[num_blocks, *shape]`, by name: views of the pages."""
        pages, start, pools = self.kv_cache[0], 0, {}
        for spec in self.layout:
            size = prod(spec.shape) * spec.dtype.itemsize
            pools[spec.name] = pages[:, start : start + size].view(spec.dtype).unflatten(1, spec.shape)
            start += _room(spec)
        return {name.removeprefix(f"{owner}."): pool for name, pool in pools.items() if name.startswith(f"{owner}.")}


class Part(nn.Module):
    """A function of a layer as one opaque call for torch.compile, which vLLM finds by its name.

    `inputs`, `outputs`: names and local widths of its tensors. `owner` prefixes the names of the states it updates;
    without `states` it runs on all tokens at once.
    """

    def __init__(
        self,
        name: str,
        function: Function,
        inputs: dict[str, int],
        outputs: dict[str, int],
        states: LayerStates | None = None,
        owner: str = "",
    ):
        super().__init__()
        self.name, self.function, self.inputs, self.outputs, self.owner = name, function, inputs, outputs, owner
        # Not a child: the states are the layer's.
        self._states = (states,)
        get_current_vllm_config().compilation_config.static_forward_context[name] = self

    def forward(
        self, tensors: dict[str, Tensor], positions: Tensor | None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Tensors `[1, T, width]` of all requests -> tensors of type `dtype`, or else of the first one's."""
        x = torch.cat([tensors[name][0] for name in self.inputs], dim=-1)
        out = torch.empty(x.shape[0], sum(self.outputs.values()), dtype=dtype or x.dtype, device=x.device)
        # The op takes positions in any case; x stands for them where they do not matter.
        torch.ops.vllm.linear_attention(x, out, x if positions is None else positions[0], self.name)
        return dict(zip(self.outputs, out[None].split(list(self.outputs.values()), dim=-1), strict=True))

    def _forward(self, hidden_states: Tensor, output: Tensor, positions: Tensor) -> None:
        """What vLLM's op calls."""
        (states,) = self._states
        metadata = get_forward_context().attn_metadata
        if states is None:
            output.copy_(self._run(hidden_states[None], positions[None], {}, None)[0])
        elif metadata is None:
            # Memory is being measured: there are no blocks yet.
            output.zero_()
        else:
            self._run_batch(hidden_states, output, positions, metadata[states.prefix], states)

    def _run_batch(
        self, x: Tensor, output: Tensor, positions: Tensor, batch: LinearAttentionMetadata, states: LayerStates
    ) -> None:
        """Tokens being decoded come first, a row each; prefills follow as documents of one row; then padding."""
        pools = states.pools(self.owner)
        blocks = batch.state_indices_tensor.long()
        decodes, first, end = batch.num_decodes, batch.num_decode_tokens, batch.num_decode_tokens
        end += batch.num_prefill_tokens
        if first:
            slots: LayerState = {name: Slots(pool, blocks[:decodes]) for name, pool in pools.items()}
            output[:first] = self._run(x[:first, None], positions[:first, None], slots, None)[:, 0]
        if end > first:
            last = decodes + batch.num_prefills
            edges = batch.query_start_loc[decodes : last + 1] - first
            slots = {name: Slots(pool, blocks[decodes:last]) for name, pool in pools.items()}
            output[first:end] = self._run(x[None, first:end], positions[None, first:end], slots, edges)[0]
        output[end:] = 0

    def _run(self, x: Tensor, positions: Tensor, state: LayerState, cu_seqlens: Tensor | None) -> Tensor:
        """`x [B, T, inputs]` -> `[B, T, outputs]`; the states are updated where they lie."""
        tensors = dict(zip(self.inputs, x.split(list(self.inputs.values()), dim=-1), strict=True))
        results, _ = self.function(tensors, state, positions, cu_seqlens)
        return torch.cat([results[name] for name in self.outputs], dim=-1)
