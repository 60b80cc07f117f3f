"""What lies between the products, and the recurrences where they are special, at every level against the reference."""

import pytest
import torch
from conftest import relative_rms
from devices import at_level

from spikingbrain_kernels import (
    Slots,
    encode_adaptive,
    encode_dead_zone,
    gated_linear,
    log_sigmoid,
    rms_norm,
    rotary,
    swiglu,
    window_attention,
)
from spikingbrain_kernels.library import levels, missing

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=f"native {missing()}"),
    pytest.mark.usefixtures("level"),
]


@pytest.fixture(params=levels() if missing() is None else [])
def level(request):
    """Every level this processor has, in turn, as the best one."""
    with at_level(request.param):
        yield


# Of a decode step the blocks of 64 keys that lie whole in the ring are read there: with 192 places all but the newest.
RINGS = [("gated_linear", 0, 0), ("window_attention", 70, 67), ("window_attention", 192, 150)]


def calls(x):
    """Every elementwise op on x `[3, 5, 4, 10]`, some of it as views with gaps."""
    part = x.flatten(2)[..., 3:30]
    positions = torch.arange(5) * 9001 + torch.tensor([[0], [3], [77]])
    options = {"low": 1e-5, "high": 1e4, "k": 3.0}
    frequencies = 10000 ** (-torch.arange(5) / 5)
    theta, finest, bounds = (
        torch.arange(10).to(x.dtype) / 8,
        torch.tensor([5.5], dtype=x.dtype),
        {"least_k": 0.5, "low": 1e-5, "high": 1e4},
    )
    return {
        "rms_norm": lambda backend: rms_norm(x, torch.arange(10) + 0.5, 1e-6, backend=backend),
        "counts": lambda backend: encode_adaptive(x, **options, backend=backend)[0],
        "dead_zone counts": lambda backend: encode_dead_zone(x, theta, finest, **bounds, backend=backend)[0],
        "dead_zone scale": lambda backend: encode_dead_zone(x, theta, finest, **bounds, backend=backend)[1],
        "threshold": lambda backend: encode_adaptive(x, **options, backend=backend)[1],
        "swiglu": lambda backend: swiglu(part, x.flatten(2)[..., 7:34], backend=backend),
        "swiglu of other strides": lambda backend: swiglu(part, part.clone(), backend=backend),
        "log_sigmoid": lambda backend: log_sigmoid(part * 20, 16.0, backend=backend),
        "rotary": lambda backend: rotary(x[:, :, 1:3], positions, frequencies, 1.5, backend=backend),
    }


@pytest.mark.parametrize("name", calls(torch.zeros(3, 5, 4, 10)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_elementwise_ops_equal_the_reference(dtype, name):
    call = calls(torch.randn(3, 5, 4, 10, dtype=dtype))[name]
    out, expected = call("native"), call("reference")
    assert out.dtype == expected.dtype
    assert relative_rms(out, expected) < (3e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("name", ["swiglu", "swiglu of other strides", "rotary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_equal_the_reference(dtype, name):
    x = torch.randn(3, 5, 4, 10, dtype=dtype).requires_grad_()
    call = calls(x)[name]
    weight = torch.randn_like(call("reference"))
    mine, expected = (torch.autograd.grad((call(backend) * weight).sum(), x)[0] for backend in ("native", "reference"))
    assert mine.dtype == expected.dtype
    assert relative_rms(mine, expected) < (3e-6 if dtype == torch.float32 else 1e-2)


def test_gradients_of_large_gates_are_those_of_the_reference():
    gate = torch.tensor([-200.0, -90, -1, 0, 1, 90, 200]).requires_grad_()
    up = torch.randn(7).requires_grad_()
    pair = [torch.autograd.grad(swiglu(gate, up, backend=name).sum(), (gate, up)) for name in ("native", "reference")]
    for mine, expected in zip(*pair, strict=True):
        assert torch.allclose(mine, expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("name", calls(torch.zeros(3, 5, 4, 10)))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_elementwise_ops_treat_nan_and_inf_as_the_reference_does(name, bad):
    x = torch.randn(3, 5, 4, 10)
    x[1, 2, 1, 3] = bad
    out, expected = (calls(x)[name](backend) for backend in ("native", "reference"))
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


SHAPES = {"7 heads a state": (14, 2, 64, 64), "huge heads": (2, 1, 260, 300), "odd": (9, 1, 3, 5), "one": (1, 1, 1, 1)}


def tensors(batch, length, heads, groups, key, value, dtype=torch.float32):
    q, k = (torch.randn(batch, length, n, key).to(dtype) for n in (heads, groups))
    v, decay = torch.randn(batch, length, groups, value).to(dtype), -torch.rand(batch, length, groups, key) * 2
    return q, k, v, decay


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("length", [1, 37])
def test_gated_linear_of_any_head_size_equals_the_reference(shape, length):
    x, state = tensors(2, length, *shape), torch.randn(2, shape[1], shape[2], shape[3])
    results, expected = (gated_linear(*x, scale=0.3, state=state, backend=name) for name in ("native", "reference"))
    for result, reference in zip(results, expected, strict=True):
        assert relative_rms(result, reference) < 1e-5


def test_no_tokens_leave_the_states_as_they_were():
    x, state, ring = tensors(2, 0, 4, 2, 8, 8), torch.randn(2, 2, 8, 8), torch.randn(2, 11, 2, 2, 8)
    out, after = gated_linear(*x, scale=1.0, state=state, backend="native")
    options = {"window": 9, "positions": torch.zeros(2, 0, dtype=torch.long), "state": ring}
    attended, ring_after = window_attention(*x[:3], **options, backend="native")
    assert out.shape == attended.shape == (2, 0, 4, 8)
    assert torch.equal(after, state)
    assert torch.equal(ring_after, ring)


@pytest.mark.parametrize("heads", [(14, 2, 64), (4, 2, 200), (3, 1, 5)], ids=str)
@pytest.mark.parametrize("window", [1, 70, 10**18])
def test_window_attention_of_any_head_size_equals_the_reference(heads, window):
    q, k, v, _ = tensors(2, 150, heads[0], heads[1], heads[2], heads[2])
    options = {"window": window, "positions": torch.arange(150)[None]}
    results = [window_attention(q, k, v, **options, backend=name)[0] for name in ("native", "reference")]
    assert relative_rms(*results) < 1e-5


@pytest.mark.parametrize("num_sinks", [1, 70])
def test_sinks_equal_the_reference(num_sinks):
    q, k, v, _ = tensors(2, 150, 4, 2, 12, 12)
    options = {"window": 9, "positions": torch.arange(150)[None], "sinks": torch.randn(num_sinks, 2, 2, 12)}
    results = [window_attention(q, k, v, **options, backend=name)[0] for name in ("native", "reference")]
    assert relative_rms(*results) < 1e-5


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(("op", "capacity", "window"), RINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_and_threads_change_no_bit(op, capacity, window, dtype):
    x = tensors(2, 150 if capacity < 150 else 330, 14, 2, 64, 64, dtype)
    length = x[0].shape[1]
    shape = (2, 2, 64, 64) if op == "gated_linear" else (2, capacity, 2, 2, 64)

    def run(sizes):
        state, outs, start = torch.zeros(*shape, dtype=torch.float32 if op == "gated_linear" else dtype), [], 0
        for size in sizes:
            part = [t[:, start : start + size] for t in x]
            positions = torch.arange(start, start + size).expand(2, -1)
            if op == "gated_linear":
                out, state = gated_linear(*part, scale=1.0, state=state, backend="native")
            else:
                options = {"window": window, "positions": positions, "state": state}
                out, state = window_attention(*part[:3], **options, backend="native")
            outs.append(out)
            start += size
        return torch.cat(outs, 1), state

    whole = run([length])
    threads = torch.get_num_threads()
    try:
        for count, sizes in ((1, [1] * length), (3, [64, 64, length - 128]), (5, [length - 1, 1])):
            torch.set_num_threads(count)
            for part, expected in zip(run(sizes), whole, strict=True):
                assert torch.equal(part, expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_disturbs_no_earlier_token_and_no_other_row(bad):
    q, k, v, decay = tensors(2, 40, 4, 2, 8, 8)
    for t in (q, k, v):
        t[0, 20] = bad
    positions = torch.arange(40)[None]
    for backend in ("native", "reference"):
        outs = [
            gated_linear(q, k, v, decay, scale=1.0, backend=backend)[0],
            window_attention(q, k, v, window=9, positions=positions, backend=backend)[0],
        ]
        for out in outs:
            assert bool(out[0, :20].isfinite().all())
            assert bool(out[1].isfinite().all())
            assert not bool(out[0, 20].isfinite().any())


@pytest.mark.parametrize("op", ["gated_linear", "window_attention"])
def test_torch_compile_takes_the_ops_without_a_break(op):
    q, k, v, decay = tensors(2, 3, 4, 2, 8, 8)
    pool = torch.randn(5, 2, 8, 8) if op == "gated_linear" else torch.randn(5, 11, 2, 2, 8)
    slots, positions = torch.tensor([4, 1]), torch.tensor([[4, 5, 6], [0, 1, 2]])

    def step(q, k, v, decay, pool, slots):
        state = Slots(pool, slots)
        if op == "gated_linear":
            return gated_linear(q, k, v, decay, scale=1.0, state=state, backend="native")[0] + 1
        return window_attention(q, k, v, window=9, positions=positions, state=state, backend="native")[0] + 1

    pools = [pool.clone(), pool.clone()]
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v, decay, pools[0], slots)
    assert torch.equal(out, step(q, k, v, decay, pools[1], slots))
    assert torch.equal(*pools)
