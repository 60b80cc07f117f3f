"""The decoder as vLLM runs it: our layers, the same functions, on vLLM's parallel layers and blocks of state."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsMambaPrefixCaching, SupportsPP
from vllm.model_executor.models.utils import make_empty_intermediate_tensors_factory
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from spikingbrain.errors import InputError
from spikingbrain.model import MixerBlock, SpikingBrainModel
from spikingbrain.quantization import METHOD
from spikingbrain.spiking import SpikeEncoder

from .blocks import make_stateful
from .experts import fuse_experts
from .loading import Target, by_vllm, group_size, load, projection_targets, sharded, unused, whole
from .projections import gather_before_encoding, make_parallel
from .quantization import SpikeInt8Config
from .states import LayerStates, page_bytes, page_layout

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Stage:
    """The layers `[first, end)` of this pipeline stage, and which tensors are another stage's."""

    def __init__(self, num_layers: int):
        group = get_pp_group()
        self.is_first, self.is_last = group.is_first_rank, group.is_last_rank
        self.first, self.end = get_pp_indices(num_layers, group.rank_in_group, group.world_size)

    def is_elsewhere(self, name: str) -> bool:
        """Whether tensor `name` (ours) belongs to another stage."""
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer:
            return not self.first <= int(layer[1]) < self.end
        # Norms are small: every stage has them.
        return (name == EMBEDDING and not self.is_first) or (name.startswith("lm_head.") and not self.is_last)


@support_torch_compile
class SpikingBrainDecoder(nn.Module):
    """Embedding, this stage's layers, norm; the tokens of all requests lie in one row.

    `targets`: what a checkpoint's tensors, by our names, are loaded into.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: Any = vllm_config.model_config.hf_config
        _check(config, vllm_config)
        body = _without_memory(config)
        (self.page_bytes,) = _page_shape(body, vllm_config)
        self.stage = Stage(config.num_hidden_layers)
        self.layers = nn.ModuleList(body.layers[self.stage.first : self.stage.end])
        self.targets: dict[str, Target] = {}
        body.add_module("embed_tokens", nn.Identity())
        body.layers = nn.ModuleList()
        if self.stage.is_first:
            self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed")
            shape = torch.Size([config.vocab_size, config.hidden_size])
            self.targets[EMBEDDING] = by_vllm(self.embed_tokens.weight, shape)
        for number, layer in enumerate(self.layers, self.stage.first):
            self.targets |= _place_layer(layer, vllm_config, self.page_bytes, f"model.layers.{number}")
        self.targets |= _materialise(body, "model", {})
        self.body = body
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.hidden_size
        )

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """Tokens `[T]` -> hidden states `[T, D]`, after the norm on the last stage."""
        if intermediate_tensors is not None:
            hidden = intermediate_tensors["hidden_states"][None]
        else:
            embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            hidden = self.body.enter(embedded[None])
        for layer in self.layers:
            hidden, _ = layer(hidden, {}, positions=positions[None], cu_seqlens=None, mask=None)
        if not self.stage.is_last:
            return IntermediateTensors({"hidden_states": hidden[0]})
        return self.body.norm(hidden)[0]


class SpikingBrainForVLLM(nn.Module, HasInnerState, IsHybrid, SupportsMambaPrefixCaching, SupportsPP):
    """Every family's causal language model."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: Any = vllm_config.model_config.hf_config
        self.config = config
        self.model = SpikingBrainDecoder(vllm_config=vllm_config, prefix=f"{prefix}model")
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        self.logits_processor = LogitsProcessor(config.vocab_size)
        if self.model.stage.is_last:
            self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=f"{prefix}lm_head")
            self._target_head(torch.Size([config.vocab_size, config.hidden_size]))
            self.head_encoder = self._add_encoder() if config.spiking and config.spiking["head"] else None

    def _target_head(self, shape: torch.Size) -> None:
        targets = self.model.targets
        if not self.config.tie_word_embeddings:
            targets[HEAD] = by_vllm(self.lm_head.weight, shape)
            return
        targets[HEAD] = unused(shape)
        if self.model.stage.is_first:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        else:
            targets[EMBEDDING] = by_vllm(self.lm_head.weight, shape)

    def _add_encoder(self) -> SpikeEncoder:
        with torch.device("meta"):
            encoder = SpikeEncoder(self.config.spiking, self.config.hidden_size).requires_grad_(False).eval()
        self.model.targets |= _materialise(encoder, "lm_head.encoder", {})
        return encoder

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """One page of bytes a layer."""
        return (_page_shape(_without_memory(vllm_config.model_config.hf_config), vllm_config),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:  # noqa: ARG003
        """Bytes."""
        return (torch.int8,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        """A page is copied as a whole."""
        return (get_temporal_copy_spec,)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Tokens `[T]` -> `[T, D]`."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **_unused: Any,
    ) -> Tensor | IntermediateTensors:
        """Tokens `[T]` -> last hidden states `[T, D]`."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """`[N, D]` -> `[N, vocabulary]`."""
        if self.head_encoder is None:
            return self.logits_processor(self.lm_head, hidden_states)
        spikes = self.head_encoder(hidden_states)
        logits = self.logits_processor(self.lm_head, spikes.counts)
        return None if logits is None else logits * spikes.scale.to(logits.dtype)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint; raises `InputError` naming every tensor that does not fit."""
        load(self.config, self.model.targets, self.model.stage.is_elsewhere, weights)
        return {name for name, _ in self.named_parameters()}


def _check(config: Any, vllm_config: VllmConfig) -> None:
    """Raise `InputError` unless whole heads go to each rank and weights are as they are or int8 for spikes."""
    quant, ranks = vllm_config.quant_config, get_tensor_model_parallel_world_size()
    if quant is not None and not isinstance(quant, SpikeInt8Config):
        raise InputError(f"quantisation {quant.get_name()} knows no spikes; {METHOD} does")
    heads = {name: getattr(config, name) for name in ("num_attention_heads", "num_key_value_heads")}
    odd = [f"{name} {count}" for name, count in heads.items() if count % ranks]
    if odd:
        raise InputError(f"tensor parallel size {ranks} does not divide {', '.join(odd)}")
    if vllm_config.parallel_config.enable_expert_parallel and current_platform.is_cpu():
        # vLLM 0.32's kernel there takes an expert's number for its place among those of the rank.
        raise InputError("vLLM has no expert parallelism on a CPU: leave out --enable-expert-parallel")


def _without_memory(config: Any) -> SpikingBrainModel:
    """Our own model, whose tensors have shapes only."""
    with torch.device("meta"):
        return SpikingBrainModel(config).requires_grad_(False).eval()


def _page_shape(body: SpikingBrainModel, vllm_config: VllmConfig) -> tuple[int, ...]:
    model, ranks = vllm_config.model_config, vllm_config.parallel_config.tensor_parallel_size
    return (page_bytes(body, model.dtype, ranks, model.max_model_len),)


def _place_layer(layer: Any, vllm_config: VllmConfig, num_bytes: int, name: str) -> dict[str, Target]:
    """Put vLLM's layers into one of ours and give its other tensors memory; returns what to load where."""
    model, quant, ranks = vllm_config.model_config, vllm_config.quant_config, get_tensor_model_parallel_world_size()
    layout = page_layout(layer, model.dtype, ranks, model.max_model_len)
    targets = fuse_experts(layer, quant, model.hf_config, name)
    blocks = {n: block for n, block in layer.named_modules() if isinstance(block, MixerBlock)}
    dims: dict[str, int] = {}
    for block_name, block in blocks.items():
        linears: dict[str, Any] = {projection: block.get_submodule(projection) for projection in block.projections}
        for projection, piece in make_parallel(block, quant, f"{name}.{block_name}").items():
            full_name = f"{name}.{block_name}.{projection}"
            targets.update(projection_targets(full_name, piece, linears[projection], group_size(model.hf_config)))
        for mixer in block.names:
            cut = getattr(block.get_submodule(mixer), "shard_dims", {})
            dims |= {f"{name}.{block_name}.{mixer}.{parameter}": dim for parameter, dim in cut.items()}
    targets |= _materialise(layer, name, dims)
    states = LayerStates(layout, num_bytes, f"{name}.states") if layout else None
    make_stateful(layer, states, model.hf_config, vllm_config.cache_config, name)
    for block in blocks.values():
        gather_before_encoding(block)
    return targets


def _materialise(module: nn.Module, name: str, dims: dict[str, int]) -> dict[str, Target]:
    """Give tensors without memory theirs, cut along `dims`; returns what to load into them, by name."""
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    targets = {}
    for owner_name, owner in module.named_modules():
        for group in (owner._parameters, owner._buffers):
            for key, tensor in list(group.items()):
                if tensor is None or not tensor.is_meta:
                    continue
                full_name = ".".join(part for part in (name, owner_name, key) if part)
                dim, shape = dims.get(full_name), list(tensor.shape)
                if dim is not None:
                    shape[dim] //= ranks
                real = torch.empty(shape, dtype=tensor.dtype)
                group[key] = nn.Parameter(real, requires_grad=False) if group is owner._parameters else real
                local = group[key]
                targets[full_name] = whole(local) if dim is None else sharded(local, tensor.shape, dim, rank)
    return targets
