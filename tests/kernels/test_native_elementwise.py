"""What lies between the products, at every level against the reference."""

import pytest
import torch
from conftest import relative_rms

from spikingbrain_kernels import (
    encode_adaptive,
    encode_dead_zone,
    log_sigmoid,
    rms_norm,
    rotary,
    swiglu,
)
from spikingbrain_kernels.library import missing

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=f"native {missing()}"),
    pytest.mark.usefixtures("level"),
]


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
