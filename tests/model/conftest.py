"""Tiny models of every mixer, in fp64 so that equality means equality."""

import pytest
import torch

from spikingbrain import SpikingBrainConfig, SpikingBrainForCausalLM, registry

VOCABULARY = 61
# Mixers that come with a channel mixer, norms and neurons of their own.
COMPANIONS = {"rwkv": {"channel_mixers": ["rwkv"], "norm": "layer_norm", "embedding_norm": True}}


# Layouts that are more than a name of mixers.
SINKS = "gla+sliding_window with sinks and a tied gate"
VARIANTS = {SINKS: {"mixers": ["gla+sliding_window"], "num_sinks": 5, "gate": {"tied": True}}}


def tiny_config(mixers: list[str], **options) -> SpikingBrainConfig:
    options = {"mixers": mixers, **VARIANTS.get(mixers[0], {}), **options}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return SpikingBrainConfig(
        **{
            **sizes,
            "vocab_size": VOCABULARY,
            "num_hidden_layers": 3,
            "max_position_embeddings": 256,
            "qkv_bias": True,
            "window": 7,
            "initializer_range": 0.3,
            **COMPANIONS.get(mixers[0], {}),
            **options,
        }
    )


def tiny_model(mixers: list[str], *, dtype=torch.float64, seed: int = 0, **options) -> SpikingBrainForCausalLM:
    torch.manual_seed(seed)
    model = SpikingBrainForCausalLM(tiny_config(mixers, **options)).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith(("bias", "sinks")):
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return model


LAYOUTS = [*registry.names("mixers"), "gla+sliding_window", "gla+softmax", "gla+gated_delta", SINKS]


@pytest.fixture(params=LAYOUTS)
def mixers(request) -> list[str]:
    return [request.param]


SPIKING = {
    "dense": None,
    "spiking": {"neuron": "adaptive", "params": {"k": 3.0}},
    "remembering": {"neuron": "ni_lif", "params": {"v_th": 0.02, "levels": 63, "decay": 0.5}},
}


@pytest.fixture(params=SPIKING)
def spiking(request, mixers) -> dict | None:
    chosen = SPIKING[request.param]
    if request.param == "remembering" and "spiking_window" in mixers:
        # Its queries fire token by token: the same neuron without its memory.
        return {**chosen, "params": {**chosen["params"], "decay": 0.0}}
    return chosen
