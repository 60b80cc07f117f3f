"""What spikingjelly and snntorch compute where they have our neurons, and what NeuroBench counts where it can.

Run by `make test-oracles` in an environment of its own, which has these packages and ours:
`python -m tests.oracles.libraries` writes what they compute to tests/golden/oracles (`make test` compares our neurons
with it), `python -m pytest tests/oracles/libraries.py` compares the packages of the day with those files and ours.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spikingbrain import record_spikes, registry
from spikingbrain.codes import encode
from spikingbrain.nir_graph import export_nir
from spikingbrain.spiking import readers
from spikingbrain.statistics import recorded_statistics
from tests.model.conftest import tiny_model

FROZEN = Path(__file__).parents[1] / "golden" / "oracles" / "neurons.safetensors"
TAU, V_TH, SHAPE = 2.5, 0.7, (13, 2, 6)


def spikingjelly_cases():
    """Nodes of spikingjelly, by the name that tests/model/test_oracles.py gives our settings."""
    from spikingjelly.activation_based import neuron, surrogate

    surrogates = {"atan": surrogate.ATan(), "sigmoid": surrogate.Sigmoid(), "triangle": surrogate.PiecewiseQuadratic()}
    options = {"tau": TAU, "v_threshold": V_TH, "step_mode": "m"}
    for reset, v_reset in (("hard", 0.0), ("soft", None)):
        for decay_input in (True, False):
            for name, function in surrogates.items():
                node = neuron.LIFNode(decay_input=decay_input, v_reset=v_reset, surrogate_function=function, **options)
                yield f"lif.{reset}.{decay_input}.{name}", node
    learned = {**options, "init_tau": options["tau"]}
    del learned["tau"]
    yield "plif", neuron.ParametricLIFNode(v_reset=0.0, surrogate_function=surrogate.ATan(), **learned)
    yield "ni_lif", neuron.ILIFNode(tau=TAU, v_threshold=1.0, step_mode="m")


def snntorch_cases():
    """Spikes of snntorch's `Leaky`, whose resets carry no gradient: forward only.

    Its soft reset is another one: it subtracts once where a membrane stays above the threshold.
    """
    import snntorch

    for reset, theirs in (("hard", "zero"), ("none", "none")):
        leaky = snntorch.Leaky(1 - 1 / TAU, V_TH, reset_mechanism=theirs, reset_delay=False).double()
        membrane, spikes = leaky.reset_mem().double(), []
        for x in inputs()[0]:
            spike, membrane = leaky(x, membrane)
            spikes.append(spike)
        yield f"snntorch.{reset}", torch.stack(spikes)


def inputs():
    """Currents `[T, B, C]` and the gradient of the spikes, always the same."""
    generator = torch.Generator().manual_seed(0)
    return [1.5 * torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2)]


def compute():
    """All cases: spikes, and the gradients of the input and of what is learned."""
    x, gradient = inputs()
    made = {"x": x, "gradient": gradient}
    for name, node in spikingjelly_cases():
        node, current = node.double(), x.clone().requires_grad_()
        spikes = node(current)
        spikes.backward(gradient)
        made |= {f"{name}.spikes": spikes.detach(), f"{name}.to_x": current.grad}
        made |= {f"{name}.to_{n}": p.grad.reshape(1) for n, p in node.named_parameters()}
    made |= {f"{name}.spikes": spikes.detach().double() for name, spikes in snntorch_cases()}
    return {name: tensor.contiguous() for name, tensor in made.items()}


def test_the_packages_still_compute_what_is_frozen():
    made, frozen = compute(), load_file(FROZEN)
    assert made.keys() == frozen.keys()
    for name, tensor in frozen.items():
        assert torch.allclose(made[name], tensor, rtol=1e-12, atol=1e-14), name


@torch.no_grad()
@pytest.mark.parametrize("decay_input", [True, False])
def test_spikingjelly_reads_our_nir_graphs_as_the_same_function(decay_input, tmp_path):
    import nir
    from spikingjelly.activation_based import nir_exchange

    params = {"tau": 3.0, "v_th": 0.7, "decay_input": decay_input}
    model = tiny_model(["sliding_window"], spiking={"neuron": "lif", "params": params, "exclude": ["k_proj", "v_proj"]})
    block = model.model.layers[1].mixer
    nir.write(tmp_path / "graph.nir", export_nir(model, "model.layers.1.mixer.encoders.hidden"))
    theirs = nir_exchange.import_from_nir(tmp_path / "graph.nir", dtype=torch.float64, step_mode="m")
    x = 2 * torch.randn(2, 15, 32, dtype=torch.float64)
    ours = block.q_proj(block.encoders["hidden"](x))
    out = theirs(x.transpose(0, 1))
    out = (out[0] if isinstance(out, tuple) else out).transpose(0, 1)
    assert torch.allclose(out, ours, rtol=1e-6, atol=1e-9)


@torch.no_grad()
def test_neurobench_counts_the_synaptic_operations_and_the_silence_that_we_count():
    from neurobench.metrics.workload import ActivationSparsity, SynapticOperations
    from neurobench.models import TorchModel

    model = tiny_model(["sliding_window"], dtype=torch.float32, spiking={"neuron": "adaptive", "params": {"k": 3.0}})
    with record_spikes(model) as record:
        model(torch.randint(0, 61, (1, 9)), use_cache=False)
    ours = recorded_statistics(model, record)
    accumulated, silent, channels = 0.0, 0.0, 0.0
    for name, (counts,) in record.counts.items():
        outputs = sum(linear.out_features for linear in readers(model, name).values())
        planes = encode(registry.load("codes", "bitwise"), counts).float().flatten(0, -2)
        net = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(counts.shape[-1], outputs, bias=False))
        bench = TorchModel(net)
        bench.add_activation_module(torch.nn.Identity)
        bench.register_hooks()
        bench.net(planes)
        operations = SynapticOperations()(bench, None, (planes,))
        accumulated += operations["Effective_ACs"] * len(planes) / 9
        assert operations["Effective_MACs"] == 0
        bench.cleanup_hooks()
        bench.register_hooks()
        bench.net(counts.float())
        width = counts.shape[-1]
        silent, channels = silent + ActivationSparsity()(bench, None, None) * width, channels + width
    assert accumulated == pytest.approx(ours["synaptic_operations_per_token"])
    assert silent / channels == pytest.approx(ours["overall"]["silent_channels"])


if __name__ == "__main__":
    save_file(compute(), FROZEN)
