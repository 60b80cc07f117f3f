"""A decoder's recorded steps are the model's own, bit for bit, for every mixer and neuron."""

import pytest
import torch

from spikingbrain import registry
from spikingbrain.decoding import MAX_RECORDED_ROWS, Decoder
from spikingbrain.packing import prepare
from spikingbrain.state import StatePool
from spikingbrain_kernels.library import missing

from .conftest import tiny_model

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"native {missing()}")

STEPS = 4


def decoded(model, pool, step, rows):
    """The hidden states of `rows` sequences over some steps whose slots change places."""
    slots = [pool.allocate() for _ in range(rows)]
    found = []
    for number in range(STEPS):
        order = slots[number % rows :] + slots[: number % rows]
        tokens = [(7 * slot + 3 * number) % model.config.vocab_size for slot in order]
        found.append(step(tokens, [number] * rows, order).clone())
    return found


@torch.inference_mode()
def same(model, rows=2):
    """Decode twice, recorded and as it is; gives the decoder."""
    pools = [StatePool(model.state_specs(), rows, "cpu", capacity=16) for _ in range(2)]
    recorded, plain = (Decoder(model, pool) for pool in pools)
    expected = decoded(model, pools[1], lambda *inputs: plain.plain(*map(torch.tensor, inputs)), rows)
    for one, other in zip(decoded(model, pools[0], recorded, rows), expected, strict=True):
        assert torch.equal(one, other)
    return recorded


@pytest.mark.parametrize("packed", [False, True])
def test_every_mixer_repeats_its_steps(mixers, packed):
    model = tiny_model(mixers, dtype=torch.float32)
    why_not = same(prepare(model) if packed else model).why_not
    # Its states grow: whether a position still fits is looked up in every step.
    assert (why_not is not None) == ("softmax" in mixers[0])


@pytest.mark.parametrize("neuron", registry.names("neurons"))
def test_every_neuron_repeats_its_steps(neuron):
    model = tiny_model(["gla", "sliding_window"], dtype=torch.float32, spiking={"neuron": neuron})
    # Those over time go through the documents of a batch in Python.
    assert (same(prepare(model)).why_not is not None) == (neuron in ("lif", "plif"))


def test_a_batch_of_each_size_has_a_recording_of_its_own_and_large_ones_have_none():
    model = prepare(tiny_model(["gla"], dtype=torch.float32))
    for rows in (1, 3, MAX_RECORDED_ROWS, MAX_RECORDED_ROWS + 1):
        assert len(same(model, rows)._recordings) == (rows <= MAX_RECORDED_ROWS)


def test_a_model_whose_steps_depend_on_data_is_decoded_as_it_is():
    model = tiny_model(["gla"], channel_mixers=["moe"], moe={"num_experts": 3})
    assert "depends on data" in same(model).why_not
