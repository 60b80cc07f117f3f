"""A recorded run gives, repeated, what the function gives, bit for bit; what cannot be repeated is named."""

import gc
import threading

import pytest
import torch

from spikingbrain_kernels import gated_linear, linear, pack, rms_norm
from spikingbrain_kernels.library import missing
from spikingbrain_kernels.recording import Recording
from spikingbrain_kernels.slots import Slots

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"native {missing()}")


@pytest.fixture
def layer():
    """Native calls, torch ops, views, a state in a pool and an op in place."""
    packed, weight = pack(torch.randn(96, 32), "fp32"), torch.rand(32)
    pool, total = torch.zeros(3, 2, 16, 16), torch.zeros(1)

    def run(x, slots):
        q, k, v = linear(rms_norm(x, weight, 1e-6), packed).unflatten(-1, (6, 16)).split(2, -2)
        out, _ = gated_linear(q, k.relu(), v, -k.abs(), scale=0.25, state=Slots(pool, slots))
        total.add_(1)
        return out.flatten(-2) + x * total, pool

    return run, pool, total


def test_a_recorded_run_repeats_every_bit_on_other_inputs_and_goes_on_with_the_state(layer):
    run, pool, total = layer
    steps = [(torch.randn(2, 1, 32), torch.tensor(slots)) for slots in ([0, 2], [2, 1], [0, 1], [1, 0])]
    expected = [run(*step)[0].clone() for step in steps]
    states = pool.clone()
    pool.zero_()
    total.zero_()
    recording = Recording(run, *steps[0])
    found = [recording.outputs[0].clone(), *(recording(*step)[0].clone() for step in steps[1:])]
    assert recording.why_not is None
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(pool, states)


def test_a_constant_that_is_kept_for_later_calls_is_not_made_again():
    kept = []

    def run(x):
        with torch.inference_mode(False):
            kept.append(torch.arange(4.0) * 2)
        return x + kept[-1]

    recording = Recording(run, torch.zeros(4))
    kept[0].add_(1)
    assert torch.equal(recording(torch.ones(4)), torch.tensor([2.0, 4.0, 6.0, 8.0]))


def test_nothing_that_a_recording_reads_is_freed(layer):
    run, pool, total = layer
    x, slots = torch.randn(1, 1, 32), torch.tensor([0])
    recording = Recording(run, x, slots)
    pool.zero_()
    total.zero_()
    expected = run(x, slots)[0].clone()
    gc.collect()
    others = [torch.full((size,), torch.nan) for size in range(1, 3000)]
    pool.zero_()
    total.zero_()
    assert torch.equal(recording(x, slots)[0], expected)
    assert len(others) == 2999


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda x: x if bool(x.sum() > 0) else -x, "is_nonzero"),
        (lambda x: x * x.tolist()[0], "resolve"),
        (lambda x: x * float(x[0]), "item"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "index"),
    ],
)
def test_what_depends_on_data_is_named_and_the_run_was_right(function, named):
    x = torch.tensor([1.0, -2.0, 3.0])
    recording = Recording(function, x)
    assert named in recording.why_not
    assert torch.equal(recording.outputs, function(x))


def test_calls_of_another_thread_are_not_recorded(layer):
    run, *_ = layer
    weight, x = torch.rand(32), torch.randn(1, 1, 32)

    def with_a_neighbour(x, slots):
        thread = threading.Thread(target=lambda: [rms_norm(x, weight, 1e-6) for _ in range(50)])
        thread.start()
        thread.join()
        return run(x, slots)

    run(x, torch.tensor([0]))  # what is made once and kept is not recorded
    alone = Recording(run, x, torch.tensor([0]))
    beside = Recording(with_a_neighbour, x, torch.tensor([0]))
    assert [count for count, _ in alone._parts] == [count for count, _ in beside._parts]
