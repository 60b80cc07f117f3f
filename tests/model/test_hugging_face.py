"""What anyone who calls AutoModelForCausalLM expects of a model."""

import pytest
import torch
from conftest import relative_rms
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from spikingbrain import InputError, SpikingBrainConfig, SpikingBrainModel

from .conftest import LAYOUTS, VOCABULARY, tiny_model

GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(params=LAYOUTS)
def model(request):
    return tiny_model([request.param])


def tokens(rows=2, length=12):
    return torch.randint(1, VOCABULARY, (rows, length))


def test_cached_and_uncached_greedy_tokens_are_equal(model):
    ids = tokens()
    cached = model.generate(ids, max_new_tokens=15, **GREEDY)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=15, use_cache=False, **GREEDY))


def test_a_left_padded_batch_generates_what_each_row_does_alone(model):
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=10, **GREEDY)
    assert torch.equal(batch[1, 12:], model.generate(ids[1:, 5:], max_new_tokens=10, **GREEDY)[0, 7:])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_beams_with_a_cache_equal_beams_without(model, options):
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    cached = model.generate(ids, attention_mask=mask, max_new_tokens=8, **GREEDY, **options)
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=8, use_cache=False, **GREEDY, **options)
    assert torch.equal(cached, plain)


def test_a_cache_goes_on_with_several_tokens(model):
    first = model.generate(tokens(), max_new_tokens=5, return_dict_in_generate=True, **GREEDY)
    longer = torch.cat([first.sequences, tokens(2, 4)], dim=1)
    # Without a mask, generate() would take a generated token 0 for padding.
    options = {"attention_mask": torch.ones_like(longer), "max_new_tokens": 6, **GREEDY}
    with_cache = model.generate(longer, past_key_values=first.past_key_values, **options)
    assert torch.equal(with_cache, model.generate(longer, **options))


def test_chunked_prefill_by_generate_gives_the_same_tokens(model):
    ids = tokens()
    chunked = model.generate(ids, max_new_tokens=6, prefill_chunk_size=5, **GREEDY)
    assert torch.equal(chunked, model.generate(ids, max_new_tokens=6, **GREEDY))


def test_an_assistant_model_is_refused_where_a_state_cannot_roll_back():
    model = tiny_model(["gla"])
    with pytest.raises(ValueError, match="stateful"):
        model.generate(tokens(), assistant_model=tiny_model(["gla"]), max_new_tokens=2, **GREEDY)
    cache = model(tokens(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="no way back"):
        cache.crop(1)


@torch.no_grad()
def test_logits_to_keep_gives_the_last_ones():
    model, ids = tiny_model(["gla", "sliding_window"]), tokens()
    whole = model(ids).logits
    assert relative_rms(model(ids, logits_to_keep=3).logits, whole[:, -3:]) < 1e-12
    assert relative_rms(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, whole[:, [0, 5]]) < 1e-12


@torch.no_grad()
def test_hidden_states_on_request():
    model, ids = tiny_model(["gla", "sliding_window"]), tokens()
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert relative_rms(model.lm_head(out.hidden_states[-1]), out.logits) < 1e-12
    assert model(ids).hidden_states is None


def test_loss_is_that_of_the_next_token_and_ends_at_a_document():
    model, ids = tiny_model(["gla"]), tokens(1, 10)
    logits = model(ids).logits
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert relative_rms(model(ids, labels=ids).loss, expected) < 1e-6
    cu_seqlens = torch.tensor([0, 4, 10])
    packed = model(ids, labels=ids, cu_seqlens=cu_seqlens).loss
    parts = [model(ids[:, a:b], labels=ids[:, a:b]).loss * (b - a - 1) for a, b in ((0, 4), (4, 10))]
    assert relative_rms(packed, sum(parts) / 8) < 1e-6


def test_auto_classes_make_the_model_from_its_config():
    config = AutoConfig.for_model(
        "spikingbrain", num_hidden_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=7
    )
    assert isinstance(AutoModel.from_config(config), SpikingBrainModel)
    assert AutoModelForCausalLM.from_config(config).config.mixers == ["gla", "sliding_window"]


def test_the_config_has_no_attribute_by_which_others_choose_caches():
    config = SpikingBrainConfig(num_hidden_layers=2)
    assert not any(hasattr(config, name) for name in ("layer_types", "sliding_window", "attn_type_list"))


def test_config_errors_name_the_choices():
    with pytest.raises(InputError, match="unknown config keys mixrs; .*mixers"):
        SpikingBrainConfig(mixrs=["gla"])
    with pytest.raises(InputError, match="choose from .*gla.*softmax"):
        SpikingBrainConfig(mixers=["glaa"])
    with pytest.raises(InputError, match="names 3 layers, the model has 2"):
        SpikingBrainConfig(mixers=["gla"] * 3, num_hidden_layers=2)
    with pytest.raises(InputError, match="feature_map"):
        tiny_model(["gla"], gate={"feature_map": "tanh"})


def test_device_map_places_the_layers(tmp_path):
    model = tiny_model(["gla", "sliding_window"], dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    ids = tokens()
    assert torch.equal(
        loaded.generate(ids, max_new_tokens=4, **GREEDY), model.generate(ids, max_new_tokens=4, **GREEDY)
    )


def test_a_model_that_served_first_can_be_trained_in_the_same_process():
    # Of a base of its own, so that nothing is kept from other tests.
    model = tiny_model(["gla", "sliding_window"], dtype=torch.float32, rope_parameters={"rope_theta": 12_345.0})
    ids = torch.randint(0, VOCABULARY, (2, 13))
    with torch.inference_mode():
        model(input_ids=ids)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
