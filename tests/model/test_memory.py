"""Constant memory is constant: nothing that is alive grows with the tokens read."""

import gc

import pytest
import torch
from transformers import AutoModelForCausalLM

from spikingbrain.families import recognise

from .conftest import SPIKING, VOCABULARY, tiny_model
from .test_golden_families import GOLDEN

SPIKEGPT = GOLDEN / "spikegpt" / "model.pth"

MODELS = {
    "windows, convolutions and recurrences": lambda: tiny_model(
        ["gla+sliding_window", "metala", "gated_delta", "rwkv"],
        channel_mixers=["swiglu", "swiglu", "swiglu", "rwkv"],
        num_hidden_layers=4,
        dtype=torch.float32,
    ),
    "running sums and spiking windows": lambda: tiny_model(
        ["sdsa", "hamming", "spiking_window"], num_hidden_layers=3, dtype=torch.float32
    ),
    "membranes of encoders": lambda: tiny_model(
        ["gla"], spiking=SPIKING["remembering"], num_hidden_layers=1, dtype=torch.float32
    ),
    "spikegpt": lambda: AutoModelForCausalLM.from_config(recognise(SPIKEGPT).read(SPIKEGPT).config).eval(),
}


def living_bytes() -> int:
    """Bytes of all tensors that anything refers to."""
    gc.collect()
    return sum(x.untyped_storage().nbytes() for x in gc.get_objects() if type(x) is torch.Tensor)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_twenty_thousand_tokens_grow_no_tensor(name):
    model = MODELS[name]()
    assert model.is_constant_memory
    cache, states, living = None, set(), set()
    for size in ([900] * 11 + [1] * 100) * 2:
        ids = torch.randint(0, VOCABULARY, (1, size))
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        states.add(tuple(tensor.shape for layer in cache.states for tensor in layer.values()))
        if cache.get_seq_length() in (10_000, 20_000):
            del ids, out
            living.add(living_bytes())
    assert cache.get_seq_length() == 20_000
    assert len(states) == 1
    assert any(states)
    assert len(living) == 1
