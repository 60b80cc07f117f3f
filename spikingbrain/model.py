"""The one decoder: every layer projects, mixes and projects back; training, generate() and the engines call `step`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from . import registry
from .config import SpikingBrainConfig
from .errors import InputError
from .lif import LIF
from .mixers import Projection
from .neurons import Spikes
from .norm import make_norm, threshold_gain
from .spiking import SpikeEncoder, SpikingHead, SpikingLinear
from .state import LayerState, StateCache, StateSpec, owned, part
from .surrogates import atan, heaviside


class MixerBlock(nn.Module):
    """Projections, one mixer or several in parallel (`"a+b"`), and the projection back.

    Parallel mixers read the same projections; the mean of their outputs, each normalised by head, is projected back
    (arXiv 2509.05276, eq. 6). A spiking model encodes what a group of projections reads once for the group.
    """

    def __init__(self, config: SpikingBrainConfig, folder: str, names: str):
        super().__init__()
        self.names = names.split("+")
        modules = {name: registry.load(folder, name).Mixer for name in self.names}
        self.projections = _shared(names, [mixer.projections(config) for mixer in modules.values()])
        for name, mixer in modules.items():
            self.add_module(name, mixer(config))
        if len(self.names) > 1:
            norm = {name: nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) for name in self.names}
            self.branch_norm = nn.ModuleDict(norm)
        self._add_projections(config)
        self.lif = LIF(config) if config.lif else None
        # Looked up here, as a decode step has no time to.
        sources = dict.fromkeys(projection.source for projection in self.projections.values())
        self._before = tuple(source for source in sources if source != "mixed")
        self._after = tuple(source for source in sources if source == "mixed")
        self._readers = {s: tuple(n for n, p in self.projections.items() if p.source == s) for s in sources}
        self._encoded = frozenset(self.encoders)
        self._with_sources = tuple(name for name, mixer in modules.items() if hasattr(mixer, "sources"))
        self._with_finish = tuple(name for name, mixer in modules.items() if hasattr(mixer, "finish"))

    def _add_projections(self, config: SpikingBrainConfig) -> None:
        exclude = config.spiking["exclude"] if config.spiking else []
        self.encoders = nn.ModuleDict()
        self.packed = nn.ModuleDict()
        for name, projection in self.projections.items():
            spiking = config.spiking is not None and name not in exclude
            shape = (projection.in_features, projection.out_features, projection.bias)
            self.add_module(name, SpikingLinear(*shape, config.spiking["weights"]) if spiking else nn.Linear(*shape))
            if spiking and projection.source not in self.encoders:
                self.encoders[projection.source] = SpikeEncoder(config.spiking, projection.in_features)

    def readers(self, source: str) -> dict[str, SpikingLinear]:
        """The projections, by name, that read the spikes of one source; raises `InputError` where they are packed."""
        if source in self.packed:
            raise InputError(f"the projections of {source!r} are packed: count what they read before packing")
        linears = {name: self.get_submodule(name) for name, p in self.projections.items() if p.source == source}
        return {name: linear for name, linear in linears.items() if isinstance(linear, SpikingLinear)}

    def _mixer(self, name: str) -> Any:
        return self._modules[name]

    def state_specs(self, dtype: torch.dtype) -> list[StateSpec]:
        """The states of its mixers and of its neurons, named `mixer.state` and `neurons.source.state`."""
        parts = {name: self._mixer(name) for name in self.names}
        parts |= {f"neurons.{source}": encoder.neuron for source, encoder in self.encoders.items()}
        parts |= {"lif": self.lif} if self.lif is not None else {}
        return [
            replace(spec, name=f"{name}.{spec.name}")
            for name, module in parts.items()
            for spec in module.state_specs(dtype)
        ]

    def _project(
        self, inputs: dict[str, Tensor], state: LayerState, context: dict[str, Any], *, mixed: bool
    ) -> tuple[dict[str, Tensor], LayerState]:
        """Apply the projections before (or, `mixed`, after) the mixing; a result can be another one's source.

        Returns the results and the new states of the neurons.
        """
        results: dict[str, Tensor] = {}
        after: LayerState = {}
        for source in self._after if mixed else self._before:
            x = inputs[source] if source in inputs else results[source]
            spikes = None
            if source in self._encoded:
                place = f"neurons.{source}"
                spikes = self.encoders[source](x, part(state, place), **context)
                after.update(owned(place, spikes.state))
            results.update(self._read(source, x, spikes))
        return results, after

    def _read(self, source: str, x: Tensor, spikes: Spikes | None) -> dict[str, Tensor]:
        """All projections that read `x`, or its spikes."""
        packed: Any = self.packed
        results: dict[str, Tensor] = packed[source].by_name(x if spikes is None else spikes) if source in packed else {}
        for name in self._readers[source]:
            if name not in results:
                linear = self.get_submodule(name)
                results[name] = linear(spikes if isinstance(linear, SpikingLinear) else x)
        return results

    def forward(
        self, hidden: Tensor, state: LayerState, *, positions: Tensor, **documents: Any
    ) -> tuple[Tensor, LayerState]:
        """`hidden [B, T, D]` -> `[B, T, D]` and the new state."""
        after: LayerState = {}

        def apply(name: str, function: Callable[..., Any], x: Any, **context: Any) -> Any:
            result, own = function(x, part(state, name), **context)
            after.update(owned(name, own))
            return result

        context = {"positions": positions, **documents}
        mixers = {name: self._mixer(name) for name in self.names}
        inputs = {"hidden": hidden}
        for name in self._with_sources:
            inputs |= apply(name, mixers[name].sources, hidden, **documents)
        p, fired = self._project(inputs, state, context, mixed=False)
        after.update(fired)
        p |= inputs
        mixed = self._merge([apply(name, mixer.mix, p, **context) for name, mixer in mixers.items()])
        back, fired = self._project({"mixed": mixed}, state, context, mixed=True)
        after.update(fired)
        out = next(iter(back.values()), mixed)
        for name in self._with_finish:
            out = mixers[name].finish(p, out)
        if self.lif is not None:
            out = apply("lif", self.lif, out, **documents)
        return out, after

    def _merge(self, outputs: list[Tensor]) -> Tensor:
        if len(outputs) == 1:
            return outputs[0]
        norms: list[Any] = [self.branch_norm[name] for name in self.names]
        by_head = [norm(x.unflatten(-1, (-1, *norm.normalized_shape))) for norm, x in zip(norms, outputs, strict=True)]
        return torch.stack(by_head).mean(0).flatten(-2)


def _shared(names: str, sets: list[dict[str, Projection]]) -> dict[str, Projection]:
    """The projections of mixers in parallel; those of one name are one. Raises `InputError` where they differ."""
    shared: dict[str, Projection] = {}
    for projections in sets:
        differ = [name for name in projections if shared.get(name, projections[name]) != projections[name]]
        if differ:
            raise InputError(f"{names} cannot run in parallel: they differ in {', '.join(differ)}")
        shared = {**projections, **shared}
    back = [name for name, projection in shared.items() if projection.source == "mixed"]
    if len(back) > 1:
        raise InputError(f"{names} cannot run in parallel: more than one projection back ({', '.join(back)})")
    return shared


class DecoderLayer(GradientCheckpointingLayer):
    """x + mixer(norm x), then x + mlp(norm x)."""

    def __init__(self, config: SpikingBrainConfig, layer: int):
        super().__init__()
        start = threshold_gain(config)
        self.input_layernorm = make_norm(config, start)
        self.mixer = MixerBlock(config, "mixers", config.mixers[layer])
        self.post_attention_layernorm = make_norm(config, start)
        self.mlp = MixerBlock(config, "channel_mixers", config.channel_mixers[layer])

    def state_specs(self, dtype: torch.dtype) -> list[StateSpec]:
        """What the layer remembers of a sequence; the channel mixer's part is named `mlp.mixer.state`."""
        mlp = [replace(spec, name=f"mlp.{spec.name}") for spec in self.mlp.state_specs(dtype)]
        return self.mixer.state_specs(dtype) + mlp

    def forward(self, hidden: Tensor, state: LayerState, **context: Any) -> tuple[Tensor, LayerState]:
        """`hidden [B, T, D]` -> the same and the new state."""
        mixed, after = self.mixer(self.input_layernorm(hidden), state, **context)
        hidden = hidden + mixed
        mixed, after_mlp = self.mlp(self.post_attention_layernorm(hidden), part(state, "mlp"), **context)
        return hidden + mixed, {**after, **owned("mlp", after_mlp)}


class SpikingBrainPreTrainedModel(PreTrainedModel):
    """What Hugging Face needs to know; loading fails where a tensor is missing, left over or of another shape."""

    config_class = SpikingBrainConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    supports_cu_seqlens = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _is_stateful = True

    def _init_weights(self, module: Any) -> None:
        """As transformers does; norms before neurons of a fixed threshold start where `spiking.gain` says."""
        super()._init_weights(module)
        start = getattr(module, "start", None)
        if start is not None:
            init.constant_(module.weight, start)

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        """As `PreTrainedModel.from_pretrained`; raises `InputError` naming every tensor that does not fit."""
        # transformers would stop at the first kind of problem; asked to ignore them it reports all.
        loaded: Any = super().from_pretrained(
            path, *args, output_loading_info=True, **{**kwargs, "ignore_mismatched_sizes": True}
        )
        model, info = loaded
        if kwargs.get("ignore_mismatched_sizes"):
            info["mismatched_keys"] = set()
        problems = [
            f"{kind.removesuffix('_keys')}: {', '.join(sorted(map(str, keys)))}" for kind, keys in info.items() if keys
        ]
        if problems:
            raise InputError(f"{path} does not fit {cls.__name__}: " + "; ".join(problems))
        return (model, info) if output_loading_info else model


class SpikingBrainModel(SpikingBrainPreTrainedModel):
    """Embedding, layers, norm."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: SpikingBrainConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers: Any = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.embedding_norm = make_norm(config) if config.embedding_norm else None
        self.gradient_checkpointing = False
        self.post_init()

    def state_specs(self) -> list[list[StateSpec]]:
        """What one sequence's state consists of, layer by layer."""
        return [layer.state_specs(self.dtype) for layer in self.layers]

    def enter(self, hidden: Tensor) -> Tensor:
        """Embeddings `[B, T, D]` -> what the first layer gets: their signs and their norm, where the config says so."""
        if self.config.spike_embedding:
            hidden = heaviside(hidden, atan)
        return hidden if self.embedding_norm is None else self.embedding_norm(hidden)

    def step(
        self,
        hidden: Tensor,
        states: list[LayerState] | None,
        *,
        positions: Tensor,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[list[Tensor], list[LayerState]]:
        """Run T more tokens through all layers.

        `hidden [B, T, D]`: embeddings. `states`: one a layer; None remembers nothing. `positions [B, T]`: index in the
        document. `mask [B, T]` (False: no token) or `cu_seqlens [N + 1]` (B = 1 holds N documents). Returns the hidden
        states before each layer and, last, after the final norm; and the new states.
        """
        hidden = self.enter(hidden)
        trace, after = [hidden], []
        for number, layer in enumerate(self.layers):
            state = {} if states is None else states[number]
            hidden, state = layer(hidden, state, positions=positions, cu_seqlens=cu_seqlens, mask=mask)
            trace.append(hidden)
            after.append(state)
        trace[-1] = self.norm(hidden)
        return trace, after

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **_unused: Any,
    ) -> BaseModelOutputWithPast:
        """Hugging Face's forward; `cu_seqlens [N + 1]` marks the documents of a packed row."""
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rows, columns = hidden.shape[:2]
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        cache = past_key_values
        if cache is None and use_cache and cu_seqlens is None:
            cache = StateCache(self.state_specs())
        if cache is not None:
            cache.begin(rows, hidden.device)
        mask = _token_mask(attention_mask, columns)
        if position_ids is None:
            position_ids = _positions(hidden, cache, mask, cu_seqlens)
        states = None if cache is None else cache.states
        trace, states = self.step(hidden, states, positions=position_ids, cu_seqlens=cu_seqlens, mask=mask)
        if cache is not None:
            cache.advance(states, columns if mask is None else mask.sum(1), columns)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=trace[-1],
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(trace) if wanted else None,
        )


def _token_mask(attention_mask: Tensor | None, columns: int) -> Tensor | None:
    """The newest columns of a 2-D mask as booleans, or None where every token is real."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must be [B, T]; got {tuple(attention_mask.shape)}; documents need cu_seqlens")
    mask = attention_mask[:, -columns:].bool()
    return None if bool(mask.all()) else mask


def _positions(hidden: Tensor, cache: StateCache | None, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Each token's index in its document `[B, T]`."""
    rows, columns = hidden.shape[:2]
    index = torch.arange(columns, device=hidden.device)
    if cu_seqlens is not None:
        return (index - torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff()))[None]
    index = index.expand(rows, columns) if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)
    return index if cache is None else index + cache.num_tokens[:, None]


class SpikingBrainForCausalLM(SpikingBrainPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SpikingBrainConfig):
        super().__init__(config)
        self.model = SpikingBrainModel(config)
        sizes = (config.hidden_size, config.vocab_size)
        reads_spikes = config.spiking is not None and config.spiking["head"]
        self.lm_head = SpikingHead(config.spiking, *sizes) if reads_spikes else nn.Linear(*sizes, bias=False)
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """As Hugging Face asks for where the vocabulary changes its size; a head that reads spikes stays one."""
        if isinstance(self.lm_head, SpikingHead):
            self.lm_head.weight, self.lm_head.out_features = new_embeddings.weight, new_embeddings.out_features
        else:
            self.lm_head = new_embeddings

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`generate` is not to make a cache of keys and values."""
        return False

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:  # type: ignore[override]
        """Give `generate` our cache where it asked for one and was given none."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = StateCache(self.state_specs())

    @property
    def is_constant_memory(self) -> bool:
        """Whether no state grows with the sequence."""
        return all(spec.kind != "growing" for layer in self.state_specs() for spec in layer)

    def state_specs(self) -> list[list[StateSpec]]:
        """What one sequence's state consists of, layer by layer."""
        return self.model.state_specs()

    def step(
        self, input_ids: Tensor, states: list[LayerState] | None, **context: Any
    ) -> tuple[Tensor, list[LayerState]]:
        """`input_ids [B, T]` and states -> last hidden states `[B, T, D]`, new states; see `SpikingBrainModel.step`."""
        trace, states = self.model.step(self.model.embed_tokens(input_ids), states, **context)
        return trace[-1], states

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[B, T or logits_to_keep, vocabulary]`; `labels [B, T]`: the input's tokens, -100 left out."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            if cu_seqlens is not None:
                labels = labels.index_fill(1, cu_seqlens[:-1].long(), -100)
            items = {key: kwargs[key] for key in ("num_items_in_batch",) if key in kwargs}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **items)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
