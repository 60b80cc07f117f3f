"""A packed model says what the model it was made from says."""

import copy

import pytest
import torch
from conftest import relative_rms

from spikingbrain import InputError, prepare, record_spikes
from spikingbrain.spiking import weights_read_by
from spikingbrain_kernels.library import missing

from .conftest import tiny_model

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"native {missing()}")

SPIKING = {"neuron": "adaptive", "params": {"k": 3.0}}
PROMPT = torch.arange(22).view(2, 11) * 5 % 61


def pair(kind, **options):
    model = tiny_model(["gla", "sliding_window", "gla+sliding_window"], dtype=torch.float32, **options)
    return model, prepare(copy.deepcopy(model), kind)


def greedy(model):
    return model.generate(PROMPT, max_new_tokens=30, do_sample=False, pad_token_id=0)


OPTIONS = {
    "dense": {},
    "spiking": {"spiking": SPIKING},
    "spiking, the head too": {"spiking": {**SPIKING, "head": True}},
    "qk_norm": {"qk_norm": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_greedy_tokens_equal_those_of_the_model_it_was_made_from(options):
    model, packed = pair("fp32", **options)
    with torch.no_grad():
        assert relative_rms(packed(PROMPT).logits, model(PROMPT).logits) < 1e-5
    assert torch.equal(greedy(packed), greedy(model))


@pytest.mark.parametrize(("kind", "tolerance"), [("bf16", 2e-2), ("int8", 5e-2)])
def test_rounded_weights_stay_close(kind, tolerance):
    model, packed = pair(kind)
    with torch.no_grad():
        assert relative_rms(packed(PROMPT).logits, model(PROMPT).logits) < tolerance


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_all_at_once_in_chunks_and_token_by_token_give_the_same_bits(kind, options):
    _, packed = pair(kind, **options)
    with torch.no_grad():
        whole = packed(PROMPT).logits
        for size in (1, 4):
            cache, parts = None, []
            for part in PROMPT.split(size, dim=1):
                out = packed(part, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
            assert torch.equal(torch.cat(parts, 1), whole)
        assert torch.equal(packed(PROMPT[:1]).logits, whole[:1])


def test_spikes_are_still_recorded():
    model, packed = pair("int8", spiking={**SPIKING, "head": True})
    with torch.no_grad(), record_spikes(model) as before, record_spikes(packed) as after:
        model(PROMPT)
        packed(PROMPT)
    assert before.counts.keys() == after.counts.keys()
    first = "model.layers.0.mixer.encoders.hidden"
    assert torch.equal(before.counts[first][0], after.counts[first][0])
    assert len(after.counts["lm_head.encoder"]) == 1


def test_a_packed_model_refuses_what_it_cannot_do(tmp_path):
    _, packed = pair("fp32")
    with pytest.raises(InputError, match="cannot be saved"):
        packed.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="packed already"):
        prepare(packed)
    _, spiking = pair("int8", spiking=SPIKING)
    with pytest.raises(InputError, match=r"'hidden' are packed: count what they read before packing"):
        weights_read_by(spiking)
    with pytest.raises(InputError, match=r"float64"):
        prepare(tiny_model(["gla"]))
    with pytest.raises(InputError, match="auto, fp32, bf16, int8"):
        prepare(tiny_model(["gla"], dtype=torch.float32), "int4")
