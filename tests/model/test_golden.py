"""The released 7B's architecture against logits of its authors' own code, and its files against themselves."""

from pathlib import Path

import pytest
import torch
from conftest import relative_rms
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from spikingbrain import InputError
from spikingbrain.families.gla_swa import GLAswaConfig, GLAswaForCausalLM

GOLDEN = Path(__file__).parent.parent / "golden" / "spikingbrain1"
LIMIT = 1e-4


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(GOLDEN, dtype=torch.float32).eval()


@torch.no_grad()
def test_whole_sequence(model, golden):
    out = model(input_ids=golden["input_ids"], labels=golden["input_ids"])
    assert relative_rms(out.logits, golden["logits"]) < LIMIT
    assert relative_rms(out.loss, golden["loss"]) < LIMIT


@torch.no_grad()
def test_step_by_step(model, golden):
    ids, first = golden["input_ids"], int(golden["decode_from"])
    out = model(input_ids=ids[:, :first], use_cache=True)
    logits = [out.logits[:, -1]]
    for t in range(first, ids.shape[1]):
        out = model(input_ids=ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[:, -1])
    assert relative_rms(torch.stack(logits, 1), golden["decode_logits"]) < LIMIT


@torch.no_grad()
def test_left_padded(model, golden):
    mask = golden["padded_attention_mask"]
    logits = model(input_ids=golden["padded_input_ids"], attention_mask=mask).logits
    assert relative_rms(logits[mask.bool()], golden["padded_logits"][mask.bool()]) < LIMIT


@torch.no_grad()
def test_recurrent_state_is_stored_once_a_group(model, golden):
    state = model(input_ids=golden["input_ids"], use_cache=True).past_key_values.states[0]["gla.recurrent"]
    expected = golden["final_recurrent_state_layer0"]
    assert state.shape[1] * 2 == expected.shape[1]
    assert relative_rms(state.repeat_interleave(2, dim=1), expected) < LIMIT


def test_saved_files_are_the_released_ones_to_the_bit(model, tmp_path):
    model.save_pretrained(tmp_path)
    saved, original = load_file(tmp_path / "model.safetensors"), load_file(GOLDEN / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in saved)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}


def test_a_7b_has_395_tensors_and_7616542976_parameters():
    keys = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
    config = GLAswaConfig.from_dict(
        {**keys, "num_attention_heads": 28, "num_key_value_heads": 4, "model_type": "gla_swa"}
    )
    with torch.device("meta"):
        model = GLAswaForCausalLM(config)
    assert len(model.state_dict()) == 395
    assert model.num_parameters() == 7_616_542_976


def rewritten(tmp_path, change) -> Path:
    tensors = load_file(GOLDEN / "model.safetensors")
    change(tensors)
    (tmp_path / "config.json").write_text((GOLDEN / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda t: t.pop("model.layers.2.attn.gk_proj.1.bias"), "missing: model.layers.2.mixer.gate_proj.bias"),
        (lambda t: t.update({"model.extra": t["model.norm.weight"].clone()}), "unexpected: model.extra"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:5].clone()}), "mismatched: .*lm_head.weight"),
    ],
    ids=["missing", "extra", "wrong shape"],
)
def test_a_tensor_that_does_not_fit_is_an_error_that_names_it(tmp_path, change, names):
    with pytest.raises(InputError, match=names):
        AutoModelForCausalLM.from_pretrained(rewritten(tmp_path, change))


def test_settings_no_released_checkpoint_has_are_refused():
    with pytest.raises(InputError, match="use_short_conv must be False"):
        GLAswaConfig.from_dict({"use_short_conv": True})
    with pytest.raises(InputError, match="cannot express this model's mixers"):
        GLAswaConfig(num_hidden_layers=4, mixers=["gla"], qkv_bias=True).to_diff_dict()
