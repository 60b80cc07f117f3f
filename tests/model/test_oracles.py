"""Our neurons against what spikingjelly and snntorch computed (tests/oracles/libraries.py), forward and gradient."""

from pathlib import Path

import pytest
import torch
from conftest import relative_rms
from safetensors.torch import load_file

from spikingbrain import registry

FROZEN = load_file(Path(__file__).parents[1] / "golden" / "oracles" / "neurons.safetensors")
EXACT = 1e-12
LIF = {"tau": 2.5, "v_th": 0.7}
CASES = {
    f"lif.{reset}.{decay_input}.{surrogate}": (
        "lif",
        {**LIF, "reset": reset, "decay_input": decay_input, "surrogate": surrogate},
    )
    for reset in ("hard", "soft")
    for decay_input in (True, False)
    for surrogate in ("atan", "sigmoid", "triangle")
}
CASES["plif"] = ("plif", LIF)
# spikingjelly's I-LIF keeps 1 - 1 / tau of the membrane and counts up to 4.
CASES["ni_lif"] = ("ni_lif", {"decay": 1 - 1 / 2.5, "two_sided": False})


def counts_of(neuron, params):
    made = registry.load("neurons", neuron).Neuron(FROZEN["x"].shape[2], **params).double()
    x = FROZEN["x"].transpose(0, 1).requires_grad_()
    return made, x, made(x).counts.transpose(0, 1)


@pytest.mark.parametrize("name", CASES)
def test_neurons_are_those_of_spikingjelly(name):
    neuron, x, counts = counts_of(*CASES[name])
    assert torch.equal(counts, FROZEN[f"{name}.spikes"])
    assert 0 < counts.count_nonzero() < counts.numel()
    counts.backward(FROZEN["gradient"])
    assert relative_rms(x.grad.transpose(0, 1), FROZEN[f"{name}.to_x"]) < EXACT
    for parameter, tensor in neuron.named_parameters():
        assert relative_rms(tensor.grad, FROZEN[f"{name}.to_{parameter}"]) < EXACT


@pytest.mark.parametrize("reset", ["hard", "none"])
def test_leaky_neurons_fire_as_those_of_snntorch(reset):
    _, _, counts = counts_of("lif", {**LIF, "reset": reset, "decay_input": False})
    assert torch.equal(counts, FROZEN[f"snntorch.{reset}.spikes"])


def test_every_frozen_case_is_compared():
    names = {name.rpartition(".")[0] for name in FROZEN} - {""}
    assert names == set(CASES) | {f"snntorch.{reset}" for reset in ("hard", "none")}
