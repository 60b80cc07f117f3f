"""Weights of few bits and WAGE's arithmetic against their equations written out; norms that start at a threshold."""

import math

import pytest
import torch
from conftest import relative_rms

from spikingbrain import InputError, SpikingBrainConfig, SpikingBrainForCausalLM, prepare
from spikingbrain.integer import ternary
from spikingbrain.neurons import Spikes
from spikingbrain.spiking import SpikingLinear
from spikingbrain_kernels.library import missing

from .conftest import VOCABULARY, tiny_config, tiny_model

EXACT = 1e-12


def power_of_two(value):
    return 2.0 ** round(math.log2(value))


def few_bits(value, unit, bits):
    levels = 2 ** (bits - 1)
    return max(1 - levels, min(levels - 1, round(value / unit * levels))) * unit / levels


def by_hand(matrix, bits, unit):
    return torch.tensor([[few_bits(v, unit, bits) for v in row] for row in matrix.tolist()], dtype=torch.float64)


def test_wage_is_its_equations_forward_and_backward():
    layer = SpikingLinear(14, 9, bias=False, weights="wage").double()
    counts = torch.randint(-7, 8, (2, 3, 14)).double().requires_grad_()
    scale = torch.rand(2, 3, 1, dtype=torch.float64) + 0.5
    out = layer(Spikes(counts, scale))
    weight = by_hand(layer.weight.detach(), 2, power_of_two(4 * float(layer.weight.detach().abs().mean())))
    assert sorted(weight.unique().tolist()) == [-float(weight.max()), 0.0, float(weight.max())]
    assert relative_rms(out, counts @ weight.T * scale) < EXACT
    gradient = torch.randn(2, 3, 9, dtype=torch.float64)
    out.backward(gradient)
    error = (gradient * scale).flatten(0, 1)
    error = by_hand(error, 8, power_of_two(float(error.abs().max())))
    assert relative_rms(counts.grad.flatten(0, 1), error @ weight) < EXACT
    exact = error.T @ counts.detach().flatten(0, 1)
    assert relative_rms(layer.weight.grad, by_hand(exact, 8, power_of_two(float(exact.abs().max())))) < EXACT
    assert len(layer.weight.grad.unique()) < 256


def test_ternary_products_pass_gradients_straight_through():
    layer = SpikingLinear(14, 9, weights="ternary").double()
    counts = torch.randint(-7, 8, (5, 14)).double().requires_grad_()
    out = layer(Spikes(counts, torch.ones(5, 1, dtype=torch.float64)))
    assert relative_rms(out, counts @ ternary(layer.weight).T + layer.bias) < EXACT
    gradient = torch.randn(5, 9, dtype=torch.float64)
    out.backward(gradient)
    assert relative_rms(counts.grad, gradient @ ternary(layer.weight)) < EXACT
    assert relative_rms(layer.weight.grad, gradient.T @ counts.detach()) < EXACT


@torch.no_grad()
@pytest.mark.parametrize("weights", ["ternary", "wage"])
def test_a_model_of_few_bits_saves_loads_and_packs_as_itself(weights, tmp_path):
    spiking = {"neuron": "adaptive", "weights": weights}
    model = tiny_model(["gla", "sliding_window"], dtype=torch.float32, spiking=spiking)
    model.save_pretrained(tmp_path / "model")
    loaded = SpikingBrainForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.randint(0, VOCABULARY, (2, 9))
    expected = model(ids).logits
    assert torch.equal(loaded(ids).logits, expected)
    assert (
        relative_rms(tiny_model(["gla", "sliding_window"], spiking={"neuron": "adaptive"})(ids).logits, expected) > 0.1
    )
    if missing() is None:
        assert relative_rms(prepare(loaded)(ids).logits, expected) < 1e-4


@pytest.mark.parametrize(("alpha", "rate"), [(1.0, 0.144), (0.707, 0.076), (0.5, 0.024), (2.0, 0.280)])
def test_norms_start_where_the_threshold_gives_a_known_rate(alpha, rate):
    params = {"tau": 4 / 3, "v_th": 0.6, "decay_input": False}
    spiking = {"neuron": "lif", "params": params, "gain": alpha}
    model = SpikingBrainForCausalLM(tiny_config(["gla"], spiking=spiking, hidden_size=64))
    layer = model.model.layers[1]
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        assert torch.allclose(norm.weight, torch.full((64,), 0.6 * alpha))
    assert torch.equal(model.model.norm.weight, torch.ones(64))
    # STBP-tdBN: rates of neurons that keep a quarter of their membrane, for normal currents.
    x = layer.input_layernorm(torch.randn(8, 400, 64))
    assert float(layer.mixer.encoders["hidden"](x).counts.mean()) == pytest.approx(rate, abs=0.01)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"spiking": {"weights": "binary"}}, "choose from float, ternary, wage"),
        ({"spiking": {"gain": 1.0}}, "a neuron with a fixed threshold"),
        ({"spiking": {"neuron": "lif", "gain": 0}}, "above 0"),
        ({"spiking": {"neuron": "lif", "gain": 1.0}, "norm": "simple_rms_norm"}, "simple_rms_norm has none"),
    ],
)
def test_wrong_settings_are_refused_with_the_reason(options, why):
    with pytest.raises(InputError, match=why):
        SpikingBrainConfig(**options)
