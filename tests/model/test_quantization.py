"""int8 weights: exact, really stored as int8, and the window layers that go with them."""

import json

import pytest
import torch
from conftest import relative_rms
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from spikingbrain import InputError
from spikingbrain.mixers.spiking_window import quantized
from spikingbrain.quantization import QuantizedLinear, UnquantizedLinear, int8_tensors
from spikingbrain.spiking import SpikingLinear
from spikingbrain_kernels.library import missing
from spikingbrain_kernels.quantized import dequantize, pack_parts, quantize, spike_linear, spike_linear_parts

from .conftest import VOCABULARY, tiny_config, tiny_model


def weight_with_outliers(rows=24, columns=48, group=16, share=0.01):
    """Codes of which `share` lie in +-[129, 173], and their scales."""
    codes = torch.randint(-127, 128, (rows, columns)).float()
    outside = torch.rand(rows, columns) < share
    codes[outside] = torch.randint(129, 174, (int(outside.sum()),)).float() * torch.randn(int(outside.sum())).sign()
    scale = torch.rand(rows, columns // group) * 0.01 + 1e-4
    return codes, scale


@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
def test_codes_are_exact_also_beyond_int8(share):
    codes, scale = weight_with_outliers(share=share)
    weight = (codes.view(24, 3, 16) * scale[..., None]).view(24, 48)
    int8 = quantize(weight, scale)
    assert int8.codes.dtype == torch.int8
    assert torch.equal(dequantize(int8), weight)
    assert (int8.outlier_index is None) == (share == 0)
    assert torch.equal(dequantize(quantize(dequantize(int8), scale)), weight)


def test_weights_that_have_no_code_raise():
    with pytest.raises(ValueError, match="not finite"):
        quantize(torch.ones(2, 16), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="outside int16"):
        quantize(torch.full((2, 16), 1e6), torch.ones(2, 1))


def test_the_product_is_that_of_the_dequantised_weight():
    codes, scale = weight_with_outliers(share=0.05)
    weight = quantize((codes.view(24, 3, 16) * scale[..., None]).view(24, 48), scale)
    counts, threshold = torch.randint(-400, 401, (2, 5, 48)).double(), torch.rand(2, 5, 1).double()
    bias = torch.randn(24).double()
    expected = (counts * threshold) @ dequantize(weight, torch.float64).T + bias
    assert relative_rms(spike_linear(counts, threshold, weight, bias), expected) < 1e-12
    assert relative_rms(spike_linear(counts.float(), threshold.float(), weight, bias.float()), expected) < 1e-6


@pytest.mark.skipif(missing() is not None, reason=f"native {missing()}")
@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
def test_the_product_of_packed_parts_is_the_same(share):
    codes, scale = weight_with_outliers(70, 256, group=128, share=share)
    weight = quantize((codes.unflatten(1, (-1, 128)) * scale[..., None]).flatten(1), scale)
    counts, threshold, bias = torch.randint(-400, 401, (2, 5, 256)).float(), torch.rand(2, 5, 1), torch.randn(70)
    expected = spike_linear(counts.double(), threshold.double(), weight, bias.double())
    parts = pack_parts(weight)
    assert len(parts) == (1 if share == 0 else 2)
    assert relative_rms(spike_linear_parts(counts, threshold, parts, bias), expected) < 1e-6


def test_groups_and_codes_that_the_packed_form_has_no_room_for_have_no_parts():
    scale = torch.ones(24, 2)
    assert pack_parts(quantize(torch.full((24, 256), 255.0), scale)) is None
    assert pack_parts(quantize(torch.full((24, 256), 254.0), scale)) is not None
    assert pack_parts(quantize(torch.full((24, 256), -256.0), scale)) is not None
    assert pack_parts(quantize(torch.ones(24, 256), torch.ones(24, 4))) is None


def saved(tmp_path, exclude=("down_proj",), share=0.01):
    """A spiking model with weights on a grid of codes, some of them beyond int8; the directory holds it as int8."""
    options = {"gate": {"rank": None}, "spiking": {"exclude": list(exclude)}, "num_hidden_layers": 2}
    model = tiny_model(["gla", "spiking_window"], **options)
    int8 = {"quant_method": "spikingbrain_int8", "group_size": 16, "exclude": list(exclude)}
    tensors = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, SpikingLinear):
            codes, scale = weight_with_outliers(*module.weight.shape, share=share)
            module.weight.data = (codes.double().unflatten(1, (-1, 16)) * scale[..., None]).flatten(1)
            tensors.update(int8_tensors(name, module.weight.data, scale))
        elif name.endswith("down_proj"):
            tensors[f"{name}.weight_scale"] = torch.rand(module.out_features, module.in_features // 16)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = tiny_config(["gla", "spiking_window"], quantization_config=int8, **options)
    config.architectures = ["SpikingBrainForCausalLM"]
    config.save_pretrained(tmp_path)
    return model


@torch.no_grad()
@pytest.mark.parametrize("exclude", [("down_proj",), ()], ids=["code", "paper"])
def test_int8_gives_the_logits_of_the_same_weights_in_fp32(tmp_path, exclude):
    dense = saved(tmp_path, exclude)
    ids = torch.randint(0, VOCABULARY, (2, 23))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert relative_rms(model(ids).logits, dense(ids).logits) < 1e-10
    base = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert relative_rms(base(ids)[0], dense.model(ids)[0]) < 1e-10
    kinds = {name.rpartition(".")[2]: type(m) for name, m in model.named_modules() if hasattr(m, "weight_scale")}
    assert kinds.pop("down_proj") is (UnquantizedLinear if exclude else QuantizedLinear)
    assert set(kinds) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_stay_int8_and_scales_fp32_whatever_the_model_is_loaded_in(tmp_path, dtype):
    saved(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    linear = model.model.layers[0].mlp.up_proj
    assert linear.weight.dtype == torch.int8
    assert linear.weight_scale.dtype == torch.float32
    assert linear.weight_outlier_code.dtype == torch.int16
    assert model.model.norm.weight.dtype == dtype
    assert bool(model(torch.randint(0, VOCABULARY, (1, 9))).logits.isfinite().all())


def test_saved_again_it_is_the_same_to_the_bit(tmp_path):
    saved(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    first, again = (load_file(path / "model.safetensors") for path in (tmp_path, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert model.config.quantization_config.to_dict() == {
        "quant_method": "spikingbrain_int8",
        "group_size": 16,
        "exclude": ["down_proj"],
    }


def change_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(UP), f"missing: {UP}"),
        (lambda t: t.pop(f"{UP}_scale"), f"missing: {UP}_scale"),
        (lambda t: t.pop(f"{UP}_outlier_code"), f"missing: {UP}_outlier_code"),
        (lambda t: t.update({f"{UP}_zero": t[f"{UP}_scale"].clone()}), f"unexpected: {UP}_zero"),
        (lambda t: t.update({f"{UP}_scale": torch.ones(48, 3)}), f"mismatched: .*{UP}_scale"),
    ],
    ids=["codes", "scale", "outliers", "extra", "shape"],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, change, message):
    saved(tmp_path)
    change_tensors(tmp_path, change)
    with pytest.raises(InputError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_settings_that_do_not_fit_are_refused(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        ({"spiking": None}, "takes no spikes"),
        ({"quantization_config": {"quant_method": "spikingbrain_int8", "exclude": []}}, "whole groups of 128"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(InputError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_queries_keys_and_values_of_spiking_windows_have_few_levels():
    x = torch.randn(2, 5, 3, 16)
    levels = quantized(x) / (x.abs().amax(-1, keepdim=True) / 127)
    assert relative_rms(levels, levels.round()) < 1e-5
    assert bool(((quantized(x) - x).abs() <= x.abs().amax(-1, keepdim=True) / 254 + 1e-6).all())
    assert torch.equal(quantized(torch.zeros(1, 4)), torch.zeros(1, 4))
    assert torch.equal(quantized(x)[:1, :2], quantized(x[:1, :2]))


def test_gradients_pass_straight_through_the_quantisation():
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn_like(x)
    quantized(x).backward(gradient)
    assert torch.equal(x.grad, gradient)
