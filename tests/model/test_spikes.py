"""The contracts of neurons and codes, of the projections they drive, and of the figures told about them."""

import pytest
import torch
from conftest import relative_rms
from transformers import AutoModel, AutoModelForCausalLM

from spikingbrain import InputError, SpikingBrainConfig, record_spikes, registry
from spikingbrain.codes import decode, encode
from spikingbrain.spiking import SpikeEncoder, SpikeRecord, SpikingHead, SpikingLinear, readers, weights_read_by
from spikingbrain.statistics import (
    baseline_statistics,
    readings,
    recorded_statistics,
    spike_statistics,
    statistics_by_kind,
)

from .conftest import LAYOUTS, VOCABULARY, tiny_model

NEURONS = registry.names("neurons")
CODES = registry.names("codes")
SIGNED_CODES = [name for name in CODES if registry.load("codes", name).SIGNED]


LARGEST = 300
# Their counts are x in units of the scale, rounded, where they fire; others saturate or remember.
ROUNDING = ["adaptive", "dead_zone", "gif", "int8"]
PARALLEL = [name for name in NEURONS if registry.load("neurons", name).Neuron(1).parallel]


def make_neuron(name, channels, **params):
    return registry.load("neurons", name).Neuron(channels, **params)


@pytest.mark.parametrize("name", NEURONS)
def test_counts_are_whole_and_stand_for_the_input(name):
    x = torch.randn(2, 5, 64)
    spikes = make_neuron(name, 64)(x)
    assert torch.equal(spikes.counts, spikes.counts.round())
    assert spikes.scale.shape == (2, 5, 1)
    assert float((spikes.counts * x).sum()) > 0
    if name in ROUNDING:
        fired = spikes.counts != 0
        assert bool(((spikes.counts * spikes.scale - x).abs() <= spikes.scale / 2 + 1e-6)[fired].all())


@pytest.mark.parametrize("name", PARALLEL)
def test_a_threshold_depends_on_one_token_only(name):
    neuron, x = make_neuron(name, 32), torch.randn(3, 7, 32)
    whole = neuron(x)
    for row in range(3):
        for t in range(7):
            alone = neuron(x[row : row + 1, t : t + 1])
            assert torch.equal(alone.counts[0, 0], whole.counts[row, t])
            assert torch.equal(alone.scale[0, 0], whole.scale[row, t])


@pytest.mark.parametrize("name", NEURONS)
def test_zero_and_huge_inputs_are_ordinary_inputs(name):
    neuron = make_neuron(name, 8)
    assert not neuron(torch.zeros(1, 1, 8)).counts.any()
    assert bool(neuron(torch.full((1, 1, 8), 1e6)).counts.isfinite().all())


def test_adaptive_is_its_equation():
    x = torch.randn(4, 100, dtype=torch.float64)
    threshold = x.abs().mean(-1, keepdim=True) / 2.5
    spikes = make_neuron("adaptive", 100, k=2.5)(x)
    assert torch.equal(spikes.counts, torch.round(x / threshold))
    assert torch.equal(spikes.scale, threshold)


def test_adaptive_passes_gradients_straight_through():
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    layer = SpikingLinear(16, 8).double()
    gradient = torch.randn(3, 8, dtype=torch.float64)
    layer(make_neuron("adaptive", 16)(x)).backward(gradient)
    assert relative_rms(x.grad, gradient @ layer.weight) < 1e-12


def test_adaptive_refuses_k_of_zero():
    with pytest.raises(InputError, match="k must be above 0"):
        SpikingBrainConfig(spiking={"neuron": "adaptive", "params": {"k": 0.0}})


@pytest.mark.parametrize("name", CODES)
def test_codes_are_exact_for_every_count_of_their_range(name):
    code = registry.load("codes", name)
    counts = torch.arange(-LARGEST if code.SIGNED else 0, LARGEST + 1)
    planes = encode(code, counts)
    assert torch.equal(decode(code, planes), counts)
    assert set(planes.unique().tolist()) <= set(code.SPIKES)
    assert len(planes) == code.num_steps(LARGEST)
    # More steps than needed; integers of 64 bits have no place for more than 62.
    longer = len(planes) + (13 if len(planes) < 50 else 0)
    assert torch.equal(decode(code, encode(code, counts, longer)), counts)
    for largest in (1, 2, 7, 8, 127, 128):
        ends = torch.tensor([-largest, largest] if code.SIGNED else [0, largest])
        assert torch.equal(decode(code, encode(code, ends)), ends)


def test_the_first_step_of_two_s_complement_is_negative():
    code = registry.load("codes", "twos_complement")
    assert code.weights(5).tolist() == [-16, 8, 4, 2, 1]
    planes = encode(code, torch.tensor([5, -5, 0, 1, -8]))
    assert planes.T.tolist() == [[0, 0, 1, 0, 1], [1, 1, 0, 1, 1], [0] * 5, [0, 0, 0, 0, 1], [1, 1, 0, 0, 0]]
    for ordinary in (torch.zeros(3), torch.tensor([3, 1, 2])):
        assert torch.equal(decode(code, encode(code, ordinary)), ordinary.long())


def test_time_to_first_spike_fires_once_and_phases_repeat():
    planes = encode(registry.load("codes", "time_to_first_spike"), torch.tensor([4, -1, 0, 2]))
    assert planes.T.tolist() == [[1, 0, 0, 0], [0, 0, 0, -1], [0] * 4, [0, 0, 1, 0]]
    phase = registry.load("codes", "phase")
    assert phase.weights(10).tolist() == [128, 64, 32, 16, 8, 4, 2, 1, 128, 64]
    assert len(encode(phase, torch.tensor([256]))) == 16


@pytest.mark.parametrize("name", CODES)
def test_the_sum_over_planes_is_the_product_of_the_counts(name):
    code = registry.load("codes", name)
    counts = torch.randint(-9 if code.SIGNED else 0, 10, (5, 33))
    weight = torch.randint(-128, 128, (33, 7))
    planes = encode(code, counts)
    by_step = torch.stack([plane.long() @ weight for plane in planes])
    assert torch.equal(decode(code, by_step), counts @ weight)


@pytest.mark.parametrize("name", CODES)
def test_counts_outside_the_range_and_broken_counts_raise(name):
    code = registry.load("codes", name)
    with pytest.raises(InputError, match="need"):
        encode(code, torch.tensor([9]), steps=2)
    with pytest.raises(InputError, match="whole"):
        encode(code, torch.tensor([0.5]))
    assert encode(code, torch.zeros(3)).shape == (0, 3)
    if not code.SIGNED:
        with pytest.raises(InputError, match="negative"):
            encode(code, torch.tensor([-1]))


def test_an_unsigned_code_for_a_signed_neuron_is_refused_with_the_choices():
    with pytest.raises(InputError, match=", ".join(SIGNED_CODES)):
        SpikingBrainConfig(spiking={"neuron": "adaptive", "code": "binary"})
    with pytest.raises(InputError, match="adaptive"):
        SpikingBrainConfig(spiking={"neuron": "lief"})
    with pytest.raises(InputError, match="unknown keys nuron"):
        SpikingBrainConfig(spiking={"nuron": "adaptive"})
    with pytest.raises(InputError, match="do not fit neuron"):
        SpikingBrainConfig(spiking={"params": {"kay": 1}})


def spiking_model(mixers=("gla", "sliding_window"), **options):
    return tiny_model(list(mixers), dtype=torch.float32, spiking={"neuron": "adaptive", "code": "bitwise", **options})


def calls_of(model, kind):
    calls = {}
    for name, module in model.named_modules():
        if isinstance(module, kind):
            calls[name] = 0

            def count(_module, _inputs, _output, name=name):
                calls[name] += 1

            module.register_forward_hook(count)
    return calls


@pytest.mark.parametrize("neuron", sorted(set(NEURONS) - set(PARALLEL)))
def test_quantised_windows_refuse_a_neuron_with_a_memory(neuron):
    with pytest.raises(InputError, match=f"spiking_window: {neuron} has a memory"):
        spiking_model(["spiking_window"], neuron=neuron)


@pytest.mark.parametrize(
    ("layout", "neuron"),
    [(layout, neuron) for layout in LAYOUTS for neuron in NEURONS if layout != "spiking_window" or neuron in PARALLEL],
)
def test_every_spiking_linear_and_encoder_runs_once_a_forward_pass(layout, neuron):
    model = spiking_model([layout], neuron=neuron)
    linears, encoders = calls_of(model, SpikingLinear), calls_of(model, SpikeEncoder)
    model(input_ids=torch.randint(0, VOCABULARY, (1, 9)))
    blocks = [block for layer in model.model.layers for block in (layer.mixer, layer.mlp)]
    assert len(linears) == sum(len(block.projections) for block in blocks)
    assert len(encoders) == sum(len({p.source for p in block.projections.values()}) for block in blocks)
    assert set(linears.values()) == {1}
    assert set(encoders.values()) == {1}


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("neuron", PARALLEL)
def test_a_head_that_reads_spikes_runs_once_and_survives_saving(neuron, tied, tmp_path):
    torch.manual_seed(0)
    spiking = {"neuron": neuron, "head": True}
    model = tiny_model(["gla"], dtype=torch.float32, spiking=spiking, tie_word_embeddings=tied)
    calls, ids = calls_of(model.lm_head, (SpikingLinear, SpikeEncoder)), torch.randint(0, VOCABULARY, (2, 9))
    logits = model(ids).logits
    assert calls == {"": 1, "encoder": 1}
    hidden = model.model(ids).last_hidden_state
    spikes = model.lm_head.encoder(hidden)
    by_hand = spikes.counts @ model.lm_head.weight.T * spikes.scale
    assert relative_rms(logits, by_hand) < 1e-6
    assert weights_read_by(model)["lm_head.encoder"] == model.lm_head.weight.numel()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert torch.equal(again(ids).logits, logits)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state, hidden)


@torch.no_grad()
def test_a_vocabulary_of_another_size_keeps_the_spikes_before_the_head():
    model = tiny_model(["gla"], dtype=torch.float32, spiking={"head": True})
    ids = torch.randint(0, VOCABULARY, (1, 7))
    before = model(ids).logits
    model.resize_token_embeddings(VOCABULARY + 3)
    after = model(ids).logits
    assert after.shape[-1] == VOCABULARY + 3 == model.lm_head.out_features
    assert relative_rms(after[..., :VOCABULARY], before) < 1e-6
    assert isinstance(model.lm_head, SpikingHead)


def test_a_head_is_refused_to_neurons_with_a_memory_and_to_other_values_than_true_and_false():
    for neuron in set(NEURONS) - set(PARALLEL):
        with pytest.raises(InputError, match=f"{neuron}.*memory"):
            SpikingBrainConfig(spiking={"neuron": neuron, "code": "twos_complement", "head": True})
    with pytest.raises(InputError, match="true or false, got 'yes'"):
        SpikingBrainConfig(spiking={"head": "yes"})


@pytest.mark.parametrize("neuron", PARALLEL)
@pytest.mark.parametrize("score", ["softmax", "spike"])
def test_every_spiking_linear_of_every_expert_runs_once_a_forward_pass(neuron, score):
    options = {"channel_mixers": ["moe"], "moe": {"num_experts": 3, "top_k": 2, "score": score}}
    model = tiny_model(["gla"], dtype=torch.float32, spiking={"neuron": neuron}, **options)
    linears = calls_of(model, SpikingLinear)
    model(input_ids=torch.randint(0, VOCABULARY, (1, 9)))
    assert sum(".experts." in name for name in linears) == 3 * 3 * 3
    assert set(linears.values()) == {1}


@torch.no_grad()
@pytest.mark.parametrize("neuron", NEURONS)
def test_every_projection_reads_whole_counts_and_residuals_carry_membrane_values(neuron):
    model = spiking_model(["gla"], neuron=neuron)
    read, carried = [], []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: carried.append(output[0]))
        for block in (layer.mixer, layer.mlp):
            for name in block.projections:
                block.get_submodule(name).register_forward_pre_hook(
                    lambda _module, inputs: read.append(inputs[0].counts)
                )
    model(input_ids=torch.randint(0, VOCABULARY, (1, 9)))
    assert len(read) == sum(len(b.projections) for layer in model.model.layers for b in (layer.mixer, layer.mlp))
    assert all(torch.equal(counts, counts.round()) for counts in read)
    assert not any(torch.equal(hidden, hidden.round()) for hidden in carried)


def test_excluded_projections_stay_dense():
    model = spiking_model(exclude=["down_proj", "o_proj"])
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert type(model.model.layers[0].mlp.up_proj) is SpikingLinear
    assert list(model.model.layers[0].mlp.encoders) == ["hidden"]


@torch.no_grad()
def test_fine_spikes_give_the_dense_model():
    dense = tiny_model(["gla", "sliding_window"])
    fine = tiny_model(["gla", "sliding_window"], spiking={"params": {"k": 1e6}})
    ids = torch.randint(0, VOCABULARY, (2, 20))
    assert relative_rms(fine(ids).logits, dense(ids).logits) < 1e-4


@torch.no_grad()
def test_the_recorder_gives_counts_and_planes_by_module_name():
    model = spiking_model()
    ids = torch.randint(0, VOCABULARY, (2, 11))
    with record_spikes(model) as record:
        model(ids)
        model(ids)
    name = "model.layers.1.mlp.encoders.mixed"
    assert len(record.counts[name]) == 2
    assert record.counts[name][0].shape == (2, 11, 48)
    code = registry.load("codes", "bitwise")
    assert torch.equal(decode(code, record.planes(name)), record.counts[name][1].long())
    model(ids)
    assert len(record.counts[name]) == 2


def test_statistics_are_what_their_names_say():
    counts = torch.tensor([[0, 1, -3, 4]])
    figures = spike_statistics(counts, "bitwise")
    assert figures == {
        "silent_channels": 0.25,
        "mean_spikes": 2.0,
        "steps": 3,
        "slot_sparsity": 1 - 4 / 12,
        "spikes_per_channel": 1.0,
    }


def test_noise_at_k_3_is_silent_in_a_tenth_to_a_seventh_of_its_channels():
    figures = baseline_statistics(SpikeEncoder({"neuron": "adaptive", "params": {"k": 3.0}}, 1024), "bitwise")
    # Rounding an exponential of mean 3 gives 1 / (2 sinh(1 / 6)) on average.
    for name, silent, mean, sent in (("gaussian", 0.106, 3.0, 1.30), ("laplace", 0.153, 2.986, 1.22)):
        assert figures[name]["silent_channels"] == pytest.approx(silent, abs=0.002)
        assert figures[name]["mean_spikes"] == pytest.approx(mean, abs=0.01)
        assert figures[name]["spikes_per_channel"] == pytest.approx(sent, abs=0.01)


def test_the_readings_of_sparsity_differ_on_the_same_counts():
    figures = readings(torch.tensor([[0, 1, -3, 4]]))
    assert figures == {
        "silent channels (zero counts)": 0.25,
        "mean |count|": 2.0,
        "mean spikes a channel (bitwise)": 1.0,
        "1 - mean / 3": 1 - 1 / 3,
        "1 - mean / 4": 0.75,
        "slots the tensor needs (T)": 3,
        "empty slots at that T": 1 - 4 / 12,
    }


def test_statistics_by_kind_of_token_are_those_of_its_tokens():
    record = SpikeRecord("bitwise", {"one": [torch.tensor([[[0, 2], [0, 0], [4, 1]]])]})
    figures = statistics_by_kind(record, torch.tensor([[0, 2, 0]]), ["word", "number", "space"])
    assert figures == {
        "word": {"tokens": 2, "silent_channels": 0.25, "mean_spikes": 1.75},
        "space": {"tokens": 1, "silent_channels": 1.0, "mean_spikes": 0.0},
    }


@torch.no_grad()
def test_recorded_statistics_count_synaptic_operations_by_hand():
    model = spiking_model(exclude=["k_proj"], head=True)
    with record_spikes(model) as record:
        model(torch.randint(0, VOCABULARY, (1, 8)))
    figures = recorded_statistics(model, record)
    expected = 0.0
    for name, (counts,) in record.counts.items():
        planes = encode(registry.load("codes", "bitwise"), counts)
        reached = sum(linear.out_features for linear in readers(model, name).values())
        expected += float(planes.count_nonzero()) * reached / 8
    assert figures["synaptic_operations_per_token"] == pytest.approx(expected)
    weights = weights_read_by(model)
    unread = sum(weights[name] * float((counts == 0).float().mean()) for name, (counts,) in record.counts.items())
    assert figures["unread_weights"] == pytest.approx(unread / sum(weights.values()))
    assert sum(figures["encoders"]["model.layers.1.mlp.encoders.mixed"]["histogram"]) == pytest.approx(1.0)
    blocks = [block for layer in model.model.layers for block in (layer.mixer, layer.mlp)]
    projections = [p for block in blocks for name, p in block.projections.items() if name != "k_proj"]
    dense = sum(p.in_features * p.out_features for p in projections) + model.lm_head.weight.numel()
    assert figures["dense_operations_per_token"] == dense
