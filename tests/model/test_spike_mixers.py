"""The mixers of spikes against attention written out."""

import torch
from conftest import relative_rms

from spikingbrain import registry
from spikingbrain.mixers.sdsa import DECAY

from .conftest import tiny_config


def projected(mixer):
    torch.manual_seed(3)
    config = tiny_config([mixer])
    q, k, v = (torch.randn(2, 19, heads * config.head_dim, dtype=torch.float64) for heads in (4, 2, 2))
    made = registry.load("mixers", mixer).Mixer(config).double()
    out, state = made.mix({"q_proj": q, "k_proj": k, "v_proj": v}, {}, positions=None, cu_seqlens=None, mask=None)
    assert state == {}
    heads = [x.unflatten(-1, (-1, config.head_dim)).repeat_interleave(n, dim=2) for x, n in ((q, 1), (k, 2), (v, 2))]
    return made, out.unflatten(-1, (-1, config.head_dim)), *heads


def test_sdsa_is_the_gated_running_sum_of_coincidences():
    made, out, q, k, v = projected("sdsa")
    sums, expected = torch.zeros_like(q[:, 0]), []
    for t in range(q.shape[1]):
        sums = DECAY * sums + (k[:, t] >= 0) * (v[:, t] >= 0)
        expected.append((q[:, t] >= 0) & (sums >= made.theta))
    expected = torch.stack(expected, 1).double()
    assert torch.equal(out, expected)
    assert 0 < expected.mean() < 1


def test_hamming_is_attention_by_the_share_of_channels_that_agree():
    made, out, q, k, v = projected("hamming")
    agree = ((q >= 0)[:, :, None] == (k >= 0)[:, None]).double().mean(-1)
    lag = torch.arange(19)[:, None] - torch.arange(19)
    weights = agree * torch.where(lag >= 0, DECAY ** lag.clamp(min=0).double(), 0.0)[None, :, :, None]
    expected = made.g_norm(torch.einsum("btsh,bshd->bthd", weights, v))
    assert relative_rms(out, expected) < 1e-12
