"""Experts that take no spikes in vLLM's fused ones, cut over tensor- or expert-parallel ranks; our router chooses.

An expert that takes spikes encodes what its activation gives before projecting it back, in the middle of vLLM's kernel,
and multiplies counts: such experts stay our own, on parallel linears.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEFactory

from spikingbrain.channel_mixers.moe import Mixer as Mixture
from spikingbrain.experts import run_expert
from spikingbrain.model import MixerBlock
from spikingbrain.spiking import SpikingLinear
from spikingbrain.state import LayerState, StateSpec

from .loading import Target, unused
from .projections import refuse_dense
from .quantization import SpikeInt8Config

# Of what vLLM's kernels compute, those that have the same name and meaning in `hidden_act`.
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
# vLLM's names: w1 and w3, one tensor `[experts, 2 inner, hidden]`, and w2.
SHARDS = {"gate_proj": ("w1", "w13"), "up_proj": ("w3", "w13"), "down_proj": ("w2", "w2")}


class FusedExperts(nn.Module):
    """A mixture of experts whose routed ones are one layer of vLLM's; the shared ones are our blocks."""

    kind = "diagonal"

    def __init__(self, mixture: Mixture, hidden_act: str, name: str):
        super().__init__()
        self.router, self.shared = mixture.router, mixture.shared
        expert: Any = mixture.experts[0]
        gate = expert.projections["gate_proj"]
        self.routed: Any = FusedMoEFactory(
            num_experts=len(mixture.experts),
            top_k=self.router.moe["top_k"],
            hidden_size=gate.in_features,
            intermediate_size=gate.out_features,
            custom_routing_function=self._choose,
            renormalize=False,
            activation=hidden_act,
            has_bias=gate.bias,
            prefix=name,
        )

    def state_specs(self, dtype: torch.dtype) -> list[StateSpec]:  # noqa: ARG002
        """Nothing is remembered."""
        return []

    def mix(self, p: dict[str, Tensor], state: LayerState, **_context: Any) -> tuple[Tensor, LayerState]:
        """As the mixture's."""
        (x,) = p["hidden"]
        # vLLM may use the memory of x.
        shared = [run_expert(expert, x) for expert in self.shared]
        return sum(shared, start=self.routed(x, self.router.logits(x)))[None], state

    def _choose(
        self,
        hidden_states: Tensor,  # noqa: ARG002
        gating_output: Tensor,
        topk: int,  # noqa: ARG002
        renormalize: bool,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """What vLLM asks for: weights and experts `[N, k]` from logits `[N, E]`."""
        routing = self.router.choose(gating_output)
        # vLLM has nobody to send a token to: in its place any expert, which counts nothing.
        nobody = routing.experts == gating_output.shape[-1]
        return routing.weights, routing.experts.masked_fill(nobody, 0)


def fuse_experts(layer: nn.Module, quant: SpikeInt8Config | None, config: Any, name: str) -> dict[str, Target]:
    """Put vLLM's experts in place of a layer's where they compute the same; returns what to load into them, by name."""
    targets: dict[str, Target] = {}
    blocks = {n: block for n, block in layer.named_modules() if isinstance(block, MixerBlock)}
    for block_name, block in blocks.items():
        for mixer_name in block.names:
            mixture: Any = block.get_submodule(mixer_name)
            full_name = f"{name}.{block_name}.{mixer_name}"
            if isinstance(mixture, Mixture) and _is_fusable(mixture, config.hidden_act):
                fused = FusedExperts(mixture, config.hidden_act, full_name)
                block.add_module(mixer_name, fused)
                targets |= _targets(full_name, mixture, fused.routed.routed_experts, quant)
    return targets


def _is_fusable(mixture: Mixture, hidden_act: str) -> bool:
    spiking = any(isinstance(module, SpikingLinear) for module in mixture.experts.modules())
    return not spiking and hidden_act in ACTIVATIONS


def _targets(name: str, mixture: Mixture, routed: Any, quant: SpikeInt8Config | None) -> Iterator[tuple[str, Target]]:
    """What is on disk of the experts, whose weights must not be int8."""
    for number, expert in enumerate(mixture.experts):
        for projection, (shard, stem) in SHARDS.items():
            linear, full_name = expert.get_submodule(projection), f"{name}.experts.{number}.{projection}"
            refuse_dense(full_name, quant)
            for kind, tensor in linear.named_parameters():
                load = partial(_load, routed, f"{stem}_{kind}", shard, number)
                yield f"{full_name}.{kind}", Target(tensor.shape, load)
            if quant is not None:
                # Scales that a checkpoint has beside dense projections too.
                rows, columns = linear.weight.shape
                yield f"{full_name}.weight_scale", unused(torch.Size([rows, columns // quant.group_size]))


def _load(routed: Any, name: str, shard: str, number: int, tensor: Tensor) -> None:
    """Give expert `number` its part of a tensor, if it has one on this rank."""
    if name == "w2_bias" and routed.moe_config.tp_rank:
        # What the ranks give is summed: one of them adds the bias.
        tensor = torch.zeros_like(tensor)
    parameter = getattr(routed, name)
    parameter.weight_loader(parameter, tensor, name, shard, number)
