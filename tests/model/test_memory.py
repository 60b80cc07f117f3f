"""Constant memory is constant: nothing that is alive grows with the tokens read."""

import gc

import torch

from .conftest import VOCABULARY, tiny_model

MIXERS = ["gla+sliding_window", "metala", "gated_delta", "rwkv"]


def living_bytes() -> int:
    """Bytes of all tensors that anything refers to."""
    gc.collect()
    return sum(x.untyped_storage().nbytes() for x in gc.get_objects() if type(x) is torch.Tensor)


@torch.no_grad()
def test_twenty_thousand_tokens_grow_no_tensor():
    options = {"channel_mixers": ["swiglu", "swiglu", "swiglu", "rwkv"], "num_hidden_layers": 4}
    model = tiny_model(MIXERS, dtype=torch.float32, **options)
    assert model.is_constant_memory
    cache, states, living = None, set(), set()
    for size in [900] * 22 + [1] * 200:
        ids = torch.randint(0, VOCABULARY, (1, size))
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        states.add(tuple(tensor.shape for layer in cache.states for tensor in layer.values()))
        if cache.get_seq_length() in (900, 9_000, 20_000):
            del ids, out
            living.add(living_bytes())
    assert cache.get_seq_length() == 20_000
    assert len(states) == 1
    assert len(living) == 1
