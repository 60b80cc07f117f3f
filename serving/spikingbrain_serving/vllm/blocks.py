"""What stands in a block for a mixer or a neuron whose state vLLM keeps: the same functions on vLLM's pages."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.config import CacheConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention

from spikingbrain.channel_mixers.moe import Mixer as Mixture
from spikingbrain.lif import LIF
from spikingbrain.model import DecoderLayer, MixerBlock
from spikingbrain.neurons import Spikes
from spikingbrain.state import LayerState
from spikingbrain_kernels import state_dtype

from .projections import local_width
from .states import LayerStates, Part, is_paged


class PagedAttention(nn.Module):
    """A window or softmax mixer: its own heads, positions and quantisation, vLLM's attention."""

    def __init__(self, mixer: Any, cache: CacheConfig, prefix: str):
        super().__init__()
        self.mixer = mixer
        config, ranks = mixer.config, get_tensor_model_parallel_world_size()
        (spec,) = mixer.state_specs(torch.float32)
        self.attn = Attention(
            config.num_attention_heads // ranks,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=config.num_key_value_heads // ranks,
            cache_config=cache,
            per_layer_sliding_window=config.window if spec.kind == "ring" else None,
            prefix=f"{prefix}.attn",
        )

    def mix(
        self, p: dict[str, Tensor], state: LayerState, *, positions: Tensor, **_documents: Any
    ) -> tuple[Tensor, LayerState]:
        """As the mixer's; vLLM knows which requests the tokens are of."""
        q, k, v = (x.to(p["v_proj"].dtype).flatten(2)[0] for x in self.mixer.heads(p, positions))
        return self.attn(q, k, v)[None], state


class OpaqueMixer(nn.Module):
    """A mixer whose parts are opaque calls."""

    def __init__(self, mixer: Any, mix: Part, sources: Part | None):
        super().__init__()
        self.mixer, self.mixing, self.making = mixer, mix, sources
        if sources is not None:
            self.sources = self._sources
        if hasattr(mixer, "finish"):
            self.finish = mixer.finish

    def mix(
        self, p: dict[str, Tensor], state: LayerState, *, positions: Tensor, **_documents: Any
    ) -> tuple[Tensor, LayerState]:
        """As the mixer's."""
        return self.mixing(p, positions)["mixed"], state

    def _sources(self, hidden: Tensor, state: LayerState, **_documents: Any) -> tuple[dict[str, Tensor], LayerState]:
        return self.making({"hidden": hidden}, None), state  # type: ignore[misc]


class OpaqueEncoder(nn.Module):
    """An encoder whose neurons have a memory."""

    def __init__(self, encoder: nn.Module, fire: Part):
        super().__init__()
        self.encoder, self.fire = encoder, fire

    def forward(self, x: Tensor, _state: LayerState | None = None, **_context: Any) -> Spikes:
        """As the encoder's."""
        spikes = self.fire({"x": x}, None, state_dtype(x.dtype))
        return Spikes(spikes["counts"].to(x.dtype), spikes["scale"], {})


class OpaqueLIF(nn.Module):
    """The neurons that a block's output passes."""

    def __init__(self, lif: nn.Module, fire: Part):
        super().__init__()
        self.lif, self.fire = lif, fire

    def forward(self, x: Tensor, state: LayerState, **_documents: Any) -> tuple[Tensor, LayerState]:
        """As the neurons'."""
        return self.fire({"x": x}, None)["x"], state


class Place(NamedTuple):
    """Where a block is: its name in the model, the prefix of its states in its layer, and the layer's states."""

    name: str
    owner: str
    states: LayerStates | None


def make_stateful(layer: DecoderLayer, states: LayerStates | None, config: Any, cache: CacheConfig, name: str) -> None:
    """Let vLLM keep what a layer remembers, and run what no graph can hold."""
    _make_block_stateful(layer.mixer, Place(f"{name}.mixer", "", states), config, cache)
    _make_block_stateful(layer.mlp, Place(f"{name}.mlp", "mlp.", states), config, cache)


def _make_block_stateful(block: MixerBlock, place: Place, config: Any, cache: CacheConfig) -> None:
    for name in block.names:
        mixer: Any = block.get_submodule(name)
        if is_paged(mixer):
            block.add_module(name, PagedAttention(mixer, cache, f"{place.name}.{name}"))
        elif _is_opaque(mixer):
            block.add_module(name, _opaque_mixer(mixer, name, place, config))
    encoders: dict[str, Any] = dict(block.encoders.items())
    for source, encoder in encoders.items():
        if encoder.neuron.state_specs(torch.float32):
            block.encoders[source] = _opaque_encoder(encoder, f"neurons.{source}", place)
    if block.lif is not None:
        block.add_module("lif", _opaque_lif(block.lif, place))


def _is_opaque(mixer: Any) -> bool:
    """With a state, or with experts of our own: how many tokens one gets depends on values, which no graph can hold."""
    return bool(mixer.state_specs(torch.float32)) or isinstance(mixer, Mixture)


def _opaque_mixer(mixer: Any, name: str, place: Place, config: Any) -> OpaqueMixer:
    own, owner = mixer.projections(config), f"{place.owner}{name}"
    states = place.states if mixer.state_specs(torch.float32) else None

    def mix(p: dict[str, Tensor], state: LayerState, positions: Tensor, cu_seqlens: Tensor | None) -> Any:
        mixed, after = mixer.mix(p, state, positions=positions, cu_seqlens=cu_seqlens, mask=None)
        return {"mixed": mixed}, after

    def sources(p: dict[str, Tensor], state: LayerState, _positions: Tensor, cu_seqlens: Tensor | None) -> Any:
        return mixer.sources(p["hidden"], state, cu_seqlens=cu_seqlens, mask=None)

    read = {n: local_width(p) for n, p in own.items() if p.source != "mixed"} or {"hidden": config.hidden_size}
    back = [p.in_features // get_tensor_model_parallel_world_size() for p in own.values() if p.source == "mixed"]
    mixed = {"mixed": back[0] if back else config.hidden_size}
    made = {p.source: p.in_features for p in own.values() if p.source not in {"hidden", "mixed", *own}}
    making = Part(f"{place.name}.{name}.sources", sources, {"hidden": config.hidden_size}, made, states, owner)
    return OpaqueMixer(
        mixer, Part(f"{place.name}.{name}.mix", mix, read, mixed, states, owner), making if made else None
    )


def _opaque_encoder(encoder: Any, name: str, place: Place) -> OpaqueEncoder:
    def fire(p: dict[str, Tensor], state: LayerState, positions: Tensor, cu_seqlens: Tensor | None) -> Any:
        spikes = encoder(p["x"], state, positions=positions, cu_seqlens=cu_seqlens, mask=None)
        return {"counts": spikes.counts, "scale": spikes.scale}, spikes.state

    channels = encoder.neuron.channels
    widths = {"counts": channels, "scale": 1}
    return OpaqueEncoder(
        encoder, Part(f"{place.name}.{name}", fire, {"x": channels}, widths, place.states, f"{place.owner}{name}")
    )


def _opaque_lif(lif: LIF, place: Place) -> OpaqueLIF:
    def fire(p: dict[str, Tensor], state: LayerState, _positions: Tensor, cu_seqlens: Tensor | None) -> Any:
        x, after = lif(p["x"], state, cu_seqlens=cu_seqlens, mask=None)
        return {"x": x}, after

    width = {"x": lif.width}
    return OpaqueLIF(lif, Part(f"{place.name}.lif", fire, width, width, place.states, f"{place.owner}lif"))
