"""Packed products: every level against the reference; a row's bits depend on nothing beside it."""

import ctypes

import pytest
import torch
from conftest import at_level, relative_rms
from devices import threads

from spikingbrain_kernels import BackendError, linear, pack, pack_codes, spike_linear
from spikingbrain_kernels.library import levels, library, missing
from spikingbrain_kernels.native import products
from spikingbrain_kernels.packed import KINDS

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"native {missing()}")

# The last has so many inputs that threads share them instead of its outputs.
SIZES = [(1, 1), (70, 130), (600, 300), (64, 129), (200, 2100)]


def spikes(*shape, silent=0.7, largest=9):
    counts = torch.randint(-largest, largest + 1, shape).float()
    return counts.masked_fill(torch.rand(shape) < silent, 0)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("rows", [1, 2, 7, 30])
@pytest.mark.parametrize(("out_features", "in_features"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_products_equal_the_reference(kind, out_features, in_features, rows):
    packed, bias = pack(torch.randn(out_features, in_features), kind), torch.randn(out_features)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
        x = torch.randn(rows, in_features).to(dtype)
        out = linear(x, packed, bias, backend="native")
        assert out.dtype == dtype
        assert relative_rms(out, linear(x.double(), packed, bias, backend="reference")) < tolerance


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("silent", [0.0, 0.25, 0.35, 0.45, 0.9])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_spikes_times_floats_have_the_bits_of_the_dense_product(kind, silent):
    # Where few channels are silent all are read, else those that fired.
    for outputs in (200, 3000):
        packed, counts = pack(torch.randn(outputs, 300), kind), spikes(1, 300, silent=silent)
        out = spike_linear(counts, torch.ones(1, 1), packed, backend="native")
        assert torch.equal(out, linear(counts, packed, backend="native"))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("silent", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16], ids=str)
def test_spikes_times_int8_are_the_exact_integer_product(dtype, silent, rows):
    packed = pack(torch.randn(200, 300), "int8")
    counts, scale, bias = spikes(rows, 300, silent=silent).to(dtype), torch.rand(rows, 1), torch.randn(200)
    out = spike_linear(counts, scale, packed, bias, backend="native")
    assert torch.equal(out, spike_linear(counts, scale, packed, bias, backend="reference"))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("largest", [1023, 1025, 32767])
def test_large_counts_of_channels_that_all_fire_are_exact_integers_too(largest):
    # Sums of 128 products with codes of up to 127 reach 2^24, beyond which floats leave out integers, at 1,032.
    packed = pack(torch.full((70, 260), 127.0) - torch.arange(70)[:, None], "int8")
    counts = torch.full((1, 260), float(largest)) - torch.randint(0, 2, (1, 260))
    out = spike_linear(counts, torch.ones(1, 1), packed, backend="native")
    assert torch.equal(out, spike_linear(counts, torch.ones(1, 1), packed, backend="reference"))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("largest", [1, 63, 64, 127, 128, 5000])
@pytest.mark.parametrize("silent", [0.5, 0.9])
@pytest.mark.parametrize("rows", [1, 40])
def test_products_with_the_extreme_codes_are_exact_for_counts_of_any_size(rows, silent, largest):
    # Of one row, sums of four products of codes and counts of up to 63 are kept in 16 bits, larger counts are several;
    # of many rows, counts of up to 127 are bytes.
    codes = torch.randint(-128, 128, (200, 300)).to(torch.int8)
    codes[::3], codes[1::3, ::2] = -128, 127
    packed, scale = pack_codes(codes, torch.rand(200, 3)), torch.ones(rows, 1)
    for counts in (
        spikes(rows, 300, silent=silent, largest=largest),
        spikes(rows, 300, silent=silent).sign() * -largest,
    ):
        out = spike_linear(counts, scale, packed, backend="native")
        assert torch.equal(out, spike_linear(counts, scale, packed, backend="reference"))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("kind", KINDS)
def test_leaving_out_silent_channels_changes_no_bit(kind, monkeypatch):
    packed, counts, scale = pack(torch.randn(130, 500), kind), spikes(5, 500), torch.ones(5, 1)
    results = []
    for break_even in (0.0, 100.0):
        monkeypatch.setattr(products, "BREAK_EVEN_ROWS", break_even)
        results.append(spike_linear(counts, scale, packed, backend="native"))
    assert torch.equal(*results)
    if kind != "int8":
        assert torch.equal(results[0], linear(counts, packed, backend="native"))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spiking", [False, True], ids=["dense", "spiking"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", [150, 2100])
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_number_of_threads(inputs, kind, spiking, dtype):
    packed, x = pack(torch.randn(200, inputs), kind), spikes(512, inputs) if spiking else torch.randn(512, inputs)
    x = x.to(dtype)
    scale = torch.rand(512, 1)

    def product(first, last):
        if spiking:
            return spike_linear(x[first:last], scale[first:last], packed, backend="native")
        return linear(x[first:last], packed, backend="native")

    whole = product(0, 512)
    for size in (1, 2, 5, 6, 7, 24, 25, 31, 257, 511):
        assert torch.equal(product(100, min(512, 100 + size)), whole[100 : 100 + size])
    for count in (1, 2, 3, 4, 5):
        with threads(count):
            assert torch.equal(product(0, 512), whole)
            for last in (8, 9, 20):
                assert torch.equal(product(7, last), whole[7:last])


def test_integer_results_are_the_same_at_every_level():
    packed, counts, scale = pack(torch.randn(200, 300), "int8"), spikes(9, 300), torch.rand(9, 1)
    results = []
    for name in levels():
        with at_level(name):
            results.append(spike_linear(counts, scale, packed, backend="native"))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6, 0.5], ids=["nan", "inf", "too large", "no count"])
def test_counts_that_do_not_fit_are_multiplied_as_floats_and_disturb_no_other_row(bad):
    packed, counts, scale = pack(torch.randn(100, 200), "int8"), spikes(4, 200), torch.rand(4, 1)
    good = spike_linear(counts, scale, packed, backend="native")
    counts[2, 17] = bad
    out = spike_linear(counts, scale, packed, backend="native")
    assert torch.equal(out[[0, 1, 3]], good[[0, 1, 3]])
    expected = spike_linear(counts[2:3], scale[2:3], packed, backend="reference")
    assert torch.allclose(out[2:3], expected, rtol=1e-5, atol=1e-3, equal_nan=True)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_row(kind, bad):
    packed, x = pack(torch.randn(100, 200), kind), torch.randn(10, 200)
    x[3, 5] = bad
    out, expected = (linear(x, packed, backend=backend) for backend in ("native", "reference"))
    assert torch.equal(out.isnan(), expected.isnan())
    assert bool(out[[0, 1, 2, 4]].isfinite().all())


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("kind", KINDS)
def test_misaligned_and_empty_inputs(kind):
    packed, x = pack(torch.randn(70, 90), kind), torch.randn(3, 91)
    memory = torch.empty(3 * 90 + 1)
    memory[1:] = x[:, :90].flatten()
    misaligned = memory[1:].view(3, 90)
    assert misaligned.data_ptr() % 64 == 4
    assert torch.equal(linear(misaligned, packed), linear(x[:, :90], packed))
    assert linear(x[:0, :90], packed).shape == (0, 70)
    assert linear(x[:, None, :90], packed).shape == (3, 1, 70)


def test_packing_keeps_every_weight():
    weight = torch.randn(700, 130)
    assert torch.equal(pack(weight, "fp32").dense()[0], weight)
    assert torch.equal(pack(weight, "bf16").dense()[0], weight.bfloat16())
    codes, scale = pack(weight, "int8").dense()
    repacked = pack_codes(codes, scale).dense()
    assert torch.equal(repacked[0], codes)
    assert torch.equal(repacked[1], scale)
    error = (codes * scale.repeat_interleave(128, dim=1)[:, :130] - weight).abs()
    assert bool((error <= scale.repeat_interleave(128, dim=1)[:, :130] * 0.5001).all())


def test_a_group_of_zeros_packs_to_zeros():
    assert torch.equal(linear(torch.ones(1, 128), pack(torch.zeros(3, 128), "int8")), torch.zeros(1, 3))


def test_what_cannot_be_packed_or_multiplied_is_one_clear_error():
    with pytest.raises(ValueError, match="fp32, bf16, int8"):
        pack(torch.ones(2, 2), "int4")
    with pytest.raises(ValueError, match="finite"):
        pack(torch.full((2, 2), float("nan")), "fp32")
    with pytest.raises(ValueError, match="need scales"):
        pack_codes(torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 2))
    packed = pack(torch.ones(2, 3), "fp32")
    with pytest.raises(ValueError, match="4 inputs do not fit weights of 3"):
        linear(torch.ones(1, 4), packed)
    with pytest.raises(ValueError, match=r"not torch\.int64"):
        spike_linear(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 1), packed)
    with pytest.raises(BackendError, match="no gradients"):
        linear(torch.ones(1, 3, requires_grad=True), packed, backend="native")
    with pytest.raises(BackendError, match=r"not in torch\.float64"):
        linear(torch.ones(1, 3, dtype=torch.float64), packed, backend="native")
    with pytest.raises(BackendError, match="baseline"):
        library("avx1024")


def test_the_library_names_every_function_of_every_level():
    for name in levels():
        assert isinstance(library(name).linear, ctypes._CFuncPtr)
