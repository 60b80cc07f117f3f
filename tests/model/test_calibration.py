"""Turning spikes on: thresholds from texts, targets of silence met and spread by sensitivity, wrong targets refused."""

import pytest
import torch
from conftest import relative_rms

from spikingbrain import InputError, record_spikes
from spikingbrain.calibration import calibrate, check_target, spiking_model, turn_on_spikes
from spikingbrain.checkpoint import load_model
from spikingbrain.energy import Constants, energy_table
from spikingbrain.integer import ternary
from spikingbrain.quantization import quantize_projections
from spikingbrain.spiking import SpikingLinear, collect_silence, encoders, weights_read_by
from spikingbrain.statistics import recorded_statistics
from spikingbrain_kernels.quantized import dequantize

from .conftest import VOCABULARY, tiny_model

SPIKING = {"neuron": "dead_zone", "code": "bitwise", "params": {"k": 6.0}, "exclude": []}


@pytest.fixture
def rows():
    return torch.randint(0, VOCABULARY, (24, 33))


@pytest.fixture
def model():
    return tiny_model(["gla", "sliding_window"], dtype=torch.float32, spiking=SPIKING)


@torch.no_grad()
def unread(model, ids):
    with record_spikes(model) as record:
        model(ids)
    return recorded_statistics(model, record)


@pytest.mark.parametrize("target", [0.3, 0.65])
def test_the_share_of_weights_not_read_is_the_target_and_differs_between_layers(model, rows, target):
    calibrate(model, rows, target)
    figures = unread(model, rows[:, :-1])
    # Silence in one layer changes what the next ones read.
    assert figures["unread_weights"] == pytest.approx(target, abs=0.1)
    shares = [layer["silent_channels"] for layer in figures["encoders"].values()]
    assert max(shares) - min(shares) > 0.1
    calibrate(model, rows, target)
    assert unread(model, rows[:, :-1])["unread_weights"] == figures["unread_weights"]


def test_a_low_rank_gate_is_not_silenced_as_nothing_is_saved_there(model, rows):
    calibrate(model, rows, 0.9)
    thetas = {name: encoder.neuron.theta for name, encoder in encoders(model).items()}
    assert sum("gate_down" in name for name in thetas) == 2
    assert all(bool(theta.any()) != ("gate_down" in name) for name, theta in thetas.items())


def test_calibration_leaves_gradients_and_weights_alone(model, rows):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".neuron." not in name}
    calibrate(model, rows, 0.5)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_collected_silence_is_the_recorded_one_and_trains_thresholds(model, rows):
    with collect_silence(model) as silence:
        model(rows[:4, :-1])
    share = silence.share()
    assert float(share) == pytest.approx(unread(model, rows[:4, :-1])["unread_weights"], abs=1e-6)
    (-share).backward()
    # A threshold also changes what later layers read, so single gradients may have either sign.
    assert all(bool(encoder.neuron.theta.grad.any()) for encoder in encoders(model).values())
    assert sum(weights_read_by(model).values()) == sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if name.endswith("_proj") or "gate_down" in name
        if hasattr(module, "weight")
    )


def test_a_calibrated_model_saves_and_loads_with_its_thresholds(model, rows, tmp_path):
    calibrate(model, rows, 0.5)
    model.save_pretrained(tmp_path / "spiking")
    loaded = load_model(tmp_path / "spiking")
    again = spiking_model(tmp_path / "spiking", SPIKING)
    for other in (loaded, again):
        assert all(torch.equal(t, other.state_dict()[name]) for name, t in model.state_dict().items())
    plain = spiking_model(tmp_path / "spiking", {"neuron": "adaptive"})
    assert not any(".neuron." in name for name in plain.state_dict())


def test_ternary_weights_have_three_values_a_row_and_stay_what_they_are(model, tmp_path):
    weight = torch.tensor([[0.1, -1.0, 2.0, -0.2], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(ternary(weight), torch.tensor([[0, -1.5, 1.5, 0], [0, 0, 0, 0]]))
    model.save_pretrained(tmp_path / "model")
    turn_on_spikes(tmp_path / "model", tmp_path / "out", SPIKING, weights="ternary")
    for name, module in load_model(tmp_path / "out").named_modules():
        if isinstance(module, SpikingLinear):
            assert all(len(row.unique()) <= 3 for row in module.weight), name
            assert torch.allclose(ternary(module.weight), module.weight)


@torch.no_grad()
def test_int8_weights_are_saved_as_codes_that_are_the_weights_to_half_a_step(tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "dtype": torch.float32}
    model = tiny_model(["gla", "sliding_window"], spiking={"neuron": "adaptive"}, **sizes)
    model.save_pretrained(tmp_path / "model")
    turn_on_spikes(tmp_path / "model", tmp_path / "out", model.config.spiking, weights="int8")
    loaded = load_model(tmp_path / "out")
    kept = [f"model.layers.{layer}.mixer.gate_proj" for layer in (0, 2)]
    assert loaded.config.quantization_config.exclude == kept
    for name, module in model.named_modules():
        if isinstance(module, SpikingLinear) and name not in kept:
            codes = loaded.get_submodule(name).quantized_weight
            assert codes.codes.dtype == torch.int8
            half = codes.scale.repeat_interleave(128, 1) / 2
            assert bool(((dequantize(codes) - module.weight).abs() <= half * 1.001).all())
            module.weight.copy_(dequantize(codes))
    ids = torch.randint(0, VOCABULARY, (2, 9))
    assert relative_rms(loaded(ids).logits, model(ids).logits) < 1e-4
    with pytest.raises(InputError, match="no spiking projection has whole groups"):
        quantize_projections(tiny_model(["gla"], spiking={"neuron": "adaptive"}))


@pytest.mark.parametrize(
    ("neuron", "target", "why"),
    [
        ("dead_zone", 1.0, "nothing would be computed"),
        ("dead_zone", 0.0, "above 0"),
        ("adaptive", 0.5, "choose from dead_zone"),
    ],
)
def test_wrong_targets_are_refused_with_the_reason(neuron, target, why):
    with pytest.raises(InputError, match=why):
        check_target(neuron, target)


def test_a_target_without_texts_is_refused(model):
    with pytest.raises(InputError, match="measured on texts"):
        calibrate(model, None, 0.5)


def test_energy_is_counts_times_constants(model, rows):
    figures = unread(model, rows[:, :-1])
    constants = Constants().changed(["add_int8=2", "dram_byte=10"])
    table = {row["network"]: row for row in energy_table(model, figures, constants)}
    weights = figures["dense_operations_per_token"]
    spikes = table["spikes"]
    assert spikes["compute"] == pytest.approx(2 * figures["synaptic_operations_per_token"])
    assert spikes["weight_bytes"] == pytest.approx(weights * (1 - figures["unread_weights"]))
    assert table["fp16"]["compute"] == pytest.approx(1.5 * weights)
    memory = 10 * weights + 2 * 1.25 * figures["membrane_updates_per_token"]
    assert table["int8"]["memory"] == pytest.approx(memory)
    assert len(table) == 4
    for wrong in ("dram=1", "dram_byte=-1", "dram_byte"):
        with pytest.raises(InputError, match="constant"):
            Constants().changed([wrong])
