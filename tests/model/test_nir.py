"""Spiking sub-graphs go to NIR, through a file, and come back as the same function."""

import nir
import pytest
import torch
from conftest import relative_rms

from spikingbrain import InputError
from spikingbrain.neurons import Spikes
from spikingbrain.nir_graph import export_nir, import_nir

from .conftest import tiny_model

NAME = "model.layers.1.mixer.encoders.hidden"
NEURONS = {
    "decay on the input": {"neuron": "lif", "params": {"tau": 3.0, "v_th": 0.7}},
    "no decay on the input": {"neuron": "lif", "params": {"tau": 4.0, "v_th": 1.3, "decay_input": False}},
    "learned": {"neuron": "plif", "params": {"tau": 2.5}},
}


@torch.no_grad()
@pytest.mark.parametrize("spiking", NEURONS.values(), ids=NEURONS)
def test_a_sub_graph_read_back_from_a_file_is_the_same_function(spiking, tmp_path):
    model = tiny_model(["sliding_window"], spiking=spiking)
    nir.write(tmp_path / "graph.nir", export_nir(model, NAME))
    read = import_nir(nir.read(tmp_path / "graph.nir"))
    x = 2 * torch.randn(2, 15, 32, dtype=torch.float64)
    block = model.model.layers[1].mixer
    spikes, again = block.encoders["hidden"](x), read.neuron.double()(x)
    assert torch.equal(spikes.counts, again.counts)
    assert 0 < spikes.counts.mean() < 1
    assert set(read.projections) == {"q_proj", "k_proj", "v_proj"}
    for name, (weight, bias) in read.projections.items():
        expected = block.get_submodule(name)(Spikes(spikes.counts, spikes.scale))
        out = again.counts @ weight.T * again.scale + bias
        assert relative_rms(out, expected) < 1e-12


def test_what_nir_cannot_express_is_refused_with_the_reason():
    with pytest.raises(InputError, match="choose from model.layers.0.mixer.encoders.hidden"):
        export_nir(tiny_model(["gla"], spiking=NEURONS["learned"]), "model.layers.9")
    for spiking in ({"neuron": "adaptive"}, {"neuron": "lif", "params": {"reset": "soft"}}):
        with pytest.raises(InputError, match="with a hard reset only"):
            export_nir(tiny_model(["sliding_window"], spiking=spiking), NAME)
    graph = export_nir(tiny_model(["sliding_window"], spiking=NEURONS["learned"]), NAME)
    graph.nodes["neuron"].v_leak[:] = 1
    with pytest.raises(InputError, match="elsewhere than at 0"):
        import_nir(graph)
    del graph.nodes["neuron"]
    with pytest.raises(InputError, match="one LIF node"):
        import_nir(graph)
