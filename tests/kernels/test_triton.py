"""Triton kernels where the shared tests of ops do not look: on a GPU compiled, else in Triton's interpreter."""

import pytest
import torch
from conftest import Asks, relative_rms
from devices import backends, device_of
from test_ops import assert_results_and_gradients_are_the_reference_s

import spikingbrain_kernels as kernels
from spikingbrain_kernels import Slots, pack, pack_codes

DEVICE = device_of("triton")
(TRITON,) = (backend for backend in backends.BACKENDS if backend.name == "triton")
pytestmark = pytest.mark.skipif(TRITON.missing(DEVICE) is not None, reason=f"triton {TRITON.missing(DEVICE)}")
PAIR = ("triton", "reference")


@pytest.fixture(autouse=True)
def _device():
    with torch.device(DEVICE):
        yield


def calls(x):
    """Every elementwise op on x `[3, 5, 4, 10]`, some of it as views with gaps."""
    part = x.flatten(2)[..., 3:30]
    positions = torch.arange(5) * 9001 + torch.tensor([[0], [3], [77]])
    encoding, weight = {"low": 1e-5, "high": 1e4, "k": 3.0}, torch.arange(10) + 0.5
    zone, k = {"least_k": 0.5, "low": 1e-5, "high": 1e4}, torch.tensor([3.0])
    frequencies = 10000 ** (-torch.arange(5) / 5)
    return {
        "rms_norm": lambda backend: kernels.rms_norm(x, weight, 1e-6, backend=backend),
        "counts": lambda backend: kernels.encode_adaptive(x, **encoding, backend=backend)[0],
        "threshold": lambda backend: kernels.encode_adaptive(x, **encoding, backend=backend)[1],
        "dead zone": lambda backend: kernels.encode_dead_zone(x, weight / 10, k, **zone, backend=backend)[0],
        "dead zone's scale": lambda backend: kernels.encode_dead_zone(x, weight / 10, k, **zone, backend=backend)[1],
        "fused counts": lambda backend: kernels.rms_norm_encode(x, weight, 1e-6, **encoding, backend=backend)[0],
        "fused threshold": lambda backend: kernels.rms_norm_encode(x, weight, 1e-6, **encoding, backend=backend)[1],
        "swiglu": lambda backend: kernels.swiglu(part, x.flatten(2)[..., 7:34], backend=backend),
        "log_sigmoid": lambda backend: kernels.log_sigmoid(part * 20, 16.0, backend=backend),
        "rotary": lambda backend: kernels.rotary(x[:, :, 1:3], positions, frequencies, 1.5, backend=backend),
    }


NAMES = list(calls(torch.zeros(3, 5, 4, 10)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_elementwise_ops_equal_the_reference(dtype, name):
    call = calls(torch.randn(3, 5, 4, 10, dtype=dtype))[name]
    out, expected = (call(backend) for backend in PAIR)
    assert out.dtype == expected.dtype
    assert relative_rms(out, expected) < (3e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_elementwise_ops_treat_nan_and_inf_as_the_reference_does(name, bad):
    x = torch.randn(3, 5, 4, 10)
    x[1, 2, 1, 3] = bad
    out, expected = (calls(x)[name](backend) for backend in PAIR)
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("x", [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 8388607.0, 12345678.0])
def test_counts_are_rounded_half_to_even(x):
    counts, _ = kernels.encode_adaptive(torch.full((1, 3), x), k=1.0, low=1.0, high=1.0, backend="triton")
    assert counts[0].tolist() == [round(x)] * 3


@pytest.mark.parametrize("shape", [(1, 128, 64), (5, 130, 70), (70, 300, 1000)], ids=str)
@pytest.mark.parametrize("largest", [3, 127, 128, 20000, 32767])
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32], ids=str)
def test_counts_times_int8_weights_are_exact(dtype, largest, shape):
    rows, inputs, outputs = shape
    counts = torch.randint(-largest, largest + 1, (rows, inputs)).to(dtype)
    codes = torch.randint(-127, 128, (outputs, inputs)).to(torch.int8)
    packed = pack_codes(codes, torch.rand(outputs, -(-inputs // 128)))
    scale, bias = torch.rand(rows, 1), torch.randn(outputs)
    out, expected = (kernels.spike_linear(counts, scale, packed, bias, backend=backend) for backend in PAIR)
    assert torch.equal(out, expected)


def test_counts_that_are_no_numbers_of_16_bits_are_floats_and_disturb_no_other_row():
    packed, scale = pack(torch.randn(70, 300), "int8"), torch.rand(4, 1)
    counts = torch.randint(-40000, 40000, (4, 300)).clamp(-32768, 32767).float()
    whole = kernels.spike_linear(counts, scale, packed, backend="triton")
    counts[1, 3], counts[2, 200], counts[3, 0] = 0.5, 70000.0, float("nan")
    out, expected = (kernels.spike_linear(counts, scale, packed, backend=backend) for backend in PAIR)
    assert torch.equal(out[0], whole[0])
    assert relative_rms(out[:3], expected[:3]) < 1e-6
    assert bool(out[3].isnan().all())


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_with_packed_weights_equal_the_reference(dtype, kind):
    packed, bias = pack(torch.randn(600, 200), kind), torch.randn(600)
    x, scale = torch.randn(2, 9, 200).to(dtype), torch.rand(2, 9, 1)
    results = [kernels.linear(x, packed, bias, backend=backend) for backend in PAIR]
    results += [kernels.spike_linear(x.round(), scale, packed, bias, backend=backend) for backend in PAIR]
    for out, expected in (results[:2], results[2:]):
        assert out.dtype == expected.dtype == dtype
        assert relative_rms(out, expected) < (1e-5 if dtype == torch.float32 else 5e-3)


SHAPES = {
    "7 heads a state": (7, 1, 32, 32),
    "huge heads": (2, 1, 130, 70),
    "18 heads a state": (18, 1, 9, 9),
    "odd": (9, 1, 3, 5),
    "one": (1, 1, 1, 1),
}


def tensors(batch, length, heads, groups, key, value, dtype=torch.float32):
    q, k = (torch.randn(batch, length, n, key).to(dtype) for n in (heads, groups))
    v, decay = torch.randn(batch, length, groups, value).to(dtype), -torch.rand(batch, length, groups, key) * 2
    return q, k, v, decay


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("length", [1, 37])
def test_gated_linear_of_any_head_size_equals_the_reference(shape, length):
    x, state = tensors(2, length, *shape), torch.randn(2, shape[1], shape[2], shape[3])
    results, expected = (kernels.gated_linear(*x, scale=0.3, state=state, backend=name) for name in PAIR)
    for result, reference in zip(results, expected, strict=True):
        assert relative_rms(result, reference) < 1e-5


def test_chunks_with_strong_decay_neither_overflow_nor_give_nan():
    q, k, v, decay = tensors(1, 70, 4, 2, 8, 8)
    results, expected = (kernels.gated_linear(q, k, v, decay * 200, scale=1.0, backend=name) for name in PAIR)
    for result, reference in zip(results, expected, strict=True):
        assert relative_rms(result, reference) < 1e-5


RAGGED = {
    "rows": {},
    "packed": {"cu_seqlens": torch.tensor([0, 3, 40, 40, 70])},
    "masked": {"mask": torch.arange(70)[None] >= 9},
}


def assert_gradients_equal(x, state, tolerance=1e-5, **options):
    assert_results_and_gradients_are_the_reference_s("gated_linear", "triton", x, state, (tolerance,) * 2, **options)


@pytest.mark.parametrize("shape", [(7, 1, 32, 32), (4, 2, 8, 100), (18, 1, 9, 9), (2, 2, 40, 5)], ids=str)
@pytest.mark.parametrize("length", [1, 37, 100])
def test_gradients_in_triton_chunks_equal_the_reference(length, shape):
    assert_gradients_equal(tensors(2, length, *shape), torch.randn(2, *shape[1:]))


@pytest.mark.parametrize("ragged", RAGGED)
def test_gradients_in_triton_chunks_of_ragged_rows_equal_the_reference(ragged):
    options = {name: value.to(DEVICE) for name, value in RAGGED[ragged].items()}
    documents = len(options["cu_seqlens"]) - 1 if "cu_seqlens" in options else 1
    assert_gradients_equal(tensors(1, 70, 4, 2, 16, 16), torch.randn(documents, 2, 16, 16), **options)


def test_gradients_in_triton_chunks_of_one_decay_a_head_and_of_strong_ones():
    q, k, v, decay = tensors(1, 70, 4, 2, 16, 16)
    state = torch.randn(1, 2, 16, 16)
    assert_gradients_equal((q, k, v, decay[..., :1]), state)
    # A decay's gradient is a difference of two that are nearly the same here.
    assert_gradients_equal((q, k, v, decay * 200), state, tolerance=1e-3)


def test_gradients_in_triton_chunks_of_bf16_stay_within_their_tolerance():
    x = tensors(1, 70, 14, 2, 32, 32, dtype=torch.bfloat16)
    assert_gradients_equal(x, torch.randn(1, 2, 32, 32), tolerance=1e-2)


def test_gradients_in_triton_of_wide_keys_and_of_no_tokens_are_right():
    assert_gradients_equal(tensors(1, 20, 2, 1, 130, 16), torch.randn(1, 1, 130, 16))
    q, k, v, decay = tensors(2, 0, 4, 2, 8, 8)
    state = torch.randn(2, 2, 8, 8, requires_grad=True)
    _, after = kernels.gated_linear(q, k, v, decay, scale=1.0, state=state, backend="triton")
    assert torch.equal(torch.autograd.grad(after.sum(), state)[0], torch.ones_like(state))


def test_projections_that_lie_side_by_side_need_no_copy():
    joined = torch.randn(2, 37, 8, 8)
    q, k, v = joined.split([4, 2, 2], dim=2)
    decay = -torch.rand(2, 37, 2, 8)
    results, expected = (kernels.gated_linear(q, k, v, decay, scale=0.3, backend=name) for name in PAIR)
    assert relative_rms(results[0], expected[0]) < 1e-5
    assert q.data_ptr() == joined.data_ptr()


@pytest.mark.parametrize(
    ("capacity", "sinks", "position"),
    [(11, 0, 0), (11, 3, 4), (11, 70, 1300), (600, 0, 4), (600, 3, 599), (600, 70, 1300)],
)
def test_a_decode_step_over_a_ring_equals_the_reference(capacity, sinks, position):
    q, k, v, _ = tensors(3, 1, 14, 2, 12, 12)
    options = {"sinks": torch.randn(sinks, 2, 2, 12)} if sinks else {}
    pool, slots = torch.randn(5, capacity, 2, 2, 12), torch.tensor([4, -1, 2])
    options |= {"window": capacity - 2, "positions": torch.tensor([[position], [position + 1], [7]])}
    pools = [pool.clone(), pool.clone()]
    outs = [
        kernels.window_attention_step_(q, k, v, pool=own, slots=slots, **options, backend=name)
        for own, name in zip(pools, PAIR, strict=True)
    ]
    assert relative_rms(*outs) < 1e-5
    assert torch.equal(*pools)
    assert torch.equal(pools[0][[0, 1, 3]], pool[[0, 1, 3]])


@pytest.mark.parametrize("heads", [(14, 2, 64), (4, 2, 200), (3, 1, 5)], ids=str)
@pytest.mark.parametrize("window", [1, 30, 10**18])
def test_window_attention_of_any_head_size_equals_the_reference(heads, window):
    q, k, v, _ = tensors(1, 75, heads[0], heads[1], heads[2], heads[2])
    options = {"window": window, "positions": torch.arange(75)[None], "sinks": torch.randn(2, 2, *heads[1:])}
    results = [kernels.window_attention(q, k, v, **options, backend=name)[0] for name in PAIR]
    assert relative_rms(*results) < 1e-5


def test_no_tokens_leave_the_states_as_they_were():
    x, state, ring = tensors(2, 0, 4, 2, 8, 8), torch.randn(2, 2, 8, 8), torch.randn(2, 11, 2, 2, 8)
    out, after = kernels.gated_linear(*x, scale=1.0, state=state, backend="triton")
    options = {"window": 9, "positions": torch.zeros(2, 0, dtype=torch.long), "state": ring}
    attended, ring_after = kernels.window_attention(*x[:3], **options, backend="triton")
    assert out.shape == attended.shape == (2, 0, 4, 8)
    assert torch.equal(after, state)
    assert torch.equal(ring_after, ring)
    assert kernels.linear(torch.randn(0, 8), pack(torch.randn(5, 8), "fp32"), backend="triton").shape == (0, 5)


def test_bf16_chunks_stay_within_their_tolerance():
    shape = (14, 2, 32, 32)
    x, state = tensors(1, 70, *shape, dtype=torch.bfloat16), torch.randn(1, shape[1], shape[2], shape[3])
    results, expected = (kernels.gated_linear(*x, scale=0.1, state=state, backend=name) for name in PAIR)
    assert relative_rms(results[0], expected[0]) < 1e-2
    assert relative_rms(results[1], expected[1]) < 1e-2


def test_a_long_delta_rule_is_left_to_the_next_backend_and_written_to_the_pool():
    q, k, v, decay = tensors(2, 40, 4, 2, 8, 8)
    x = (q, k / k.norm(dim=-1, keepdim=True), v, torch.rand(2, 40, 2, 1), decay[..., :1])
    pools, slots = [torch.ones(3, 2, 8, 8), torch.ones(3, 2, 8, 8)], torch.tensor([2, 0])
    outs = [
        kernels.gated_delta_step_(*x, scale=1.0, pool=pool, slots=slots, backend=name)
        for pool, name in zip(pools, PAIR, strict=True)
    ]
    assert relative_rms(*outs) < 1e-5
    assert relative_rms(*pools) < 1e-5


def steps():
    """Every op on one more token of four sequences."""
    q, k, v, decay = tensors(4, 1, 14, 2, 16, 16)
    x, slots = torch.randn(4, 1, 24), torch.tensor([3, -1, 0, 5])
    state, channel = {"slots": slots, "pool": torch.randn(6, 2, 16, 16)}, torch.randn(24)
    ring = {"slots": slots, "pool": torch.randn(6, 9, 2, 2, 16)}
    neuron = {"tau": 2.0, "v_th": 1.0, "v_reset": 0.0, "decay_input": True}
    one = decay[..., :1]
    return {
        "gated_linear": lambda: kernels.gated_linear_step_(q, k, v, decay, scale=1.0, **state, backend="triton"),
        "gated_delta": lambda: kernels.gated_delta_step_(q, k, v, -one, one, scale=1.0, **state, backend="triton"),
        "wkv": lambda: kernels.wkv_step_(
            x, x, channel, channel, slots=slots, pool=torch.rand(6, 3, 24), backend="triton"
        ),
        "lif_scan": lambda: kernels.lif_scan_step_(x, **neuron, slots=slots, pool=torch.zeros(6, 24), backend="triton"),
        "short_conv": lambda: kernels.short_conv_step_(
            x, torch.randn(24, 4), slots=slots, pool=torch.zeros(6, 3, 24), backend="triton"
        ),
        "window_attention": lambda: kernels.window_attention_step_(
            q, k, v, window=9, positions=torch.arange(4)[:, None], **ring, backend="triton"
        ),
    }


@pytest.mark.parametrize("name", ["gated_linear", "gated_delta", "wkv", "lif_scan", "short_conv", "window_attention"])
def test_a_decode_step_reads_nothing_back_from_the_device(name):
    step = steps()[name]
    with Asks() as asks:
        step()
    assert asks.found == []


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("op", ["gated_linear", "window_attention"])
def test_a_captured_step_follows_the_slots_it_finds(op):
    q, k, v, decay = tensors(2, 1, 14, 2, 16, 16)
    pool = torch.randn(6, 2, 16, 16) if op == "gated_linear" else torch.randn(6, 9, 2, 2, 16)
    slots, positions = torch.tensor([3, 1]), torch.tensor([[12], [4]])

    def step(pool, slots, backend):
        if op == "gated_linear":
            return kernels.gated_linear(q, k, v, decay, scale=1.0, state=Slots(pool, slots), backend=backend)[0]
        options = {"window": 9, "positions": positions, "state": Slots(pool, slots), "backend": backend}
        return kernels.window_attention(q, k, v, **options)[0]

    step(pool.clone(), slots, "triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(pool, slots, "triton")
    for order in ([3, 1], [0, 5], [5, -1]):
        slots.copy_(torch.tensor(order))
        expected_pool = pool.clone()
        expected = step(expected_pool, slots, "reference")
        graph.replay()
        assert relative_rms(out, expected) < 1e-5
        assert relative_rms(pool, expected_pool) < 1e-5
