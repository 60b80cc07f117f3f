"""The gate of linear attention that is tied to the key: what it computes, and what it refuses."""

import pytest
import torch
from conftest import relative_rms

from spikingbrain import InputError

from .conftest import tiny_config, tiny_model


@torch.no_grad()
def test_a_tied_gate_forgets_in_each_channel_what_the_key_writes():
    """S_t = diag(1 - k_t) S_{t-1} + k_t^T v_t with k = sigmoid, one token after the other."""
    model = tiny_model(["gla"], gate={"tied": True}, num_hidden_layers=1)
    block, hidden = model.model.layers[0].mixer, torch.randn(1, 9, 32, dtype=torch.float64)
    q, k = (torch.sigmoid(linear(hidden)).unflatten(-1, (-1, 8))[0] for linear in (block.q_proj, block.k_proj))
    v = block.v_proj(hidden).unflatten(-1, (-1, 8))[0]
    state, outputs = torch.zeros(2, 8, 8, dtype=torch.float64), []
    for t in range(9):
        state = (1 - k[t])[..., None] * state + k[t][..., None] * v[t][:, None]
        read = torch.einsum("hk,hkv->hv", q[t], state.repeat_interleave(2, 0)) / 8**0.5
        outputs.append(block.get_submodule("gla").g_norm(read).flatten())
    expected = block.o_proj(torch.stack(outputs))
    out, _ = block(hidden, {}, positions=torch.arange(9)[None], cu_seqlens=None, mask=None)
    assert relative_rms(out[0], expected) < 1e-12


def test_a_tied_gate_has_no_parameters_and_no_other_settings():
    config = tiny_config(["gla"], gate={"tied": True})
    assert config.gate == {"rank": None, "normalizer": 1.0, "feature_map": "sigmoid", "tied": True}
    names = [name for name, _ in tiny_model(["gla"], gate={"tied": True}).named_parameters()]
    assert not any("gate_" in name and "mixer" in name for name in names)
    with pytest.raises(InputError, match="a tied gate has no settings besides"):
        tiny_config(["gla"], gate={"tied": True, "rank": 4})
    with pytest.raises(InputError, match="num_sinks must not be negative"):
        tiny_config(["softmax"], num_sinks=-1)
