"""Every backend of every op against the reference: outputs, final state, gradients, ragged batches, pools."""

from dataclasses import replace

import pytest
import torch
from conftest import relative_rms
from devices import backends as table
from devices import device_of

import spikingbrain_kernels as kernels
from spikingbrain_kernels import (
    OPS,
    RECURRENT_OPS,
    BackendError,
    Slots,
    backends,
    gated_delta,
    gated_linear,
    lif_scan,
    short_conv,
    window_attention,
    wkv,
)

FP32 = 1e-5
WINDOW = 9
CAPACITY = 11
TAPS = 4
OPTIONS = {
    "gated_linear": {"scale": 0.3},
    "gated_delta": {"scale": 0.3},
    "lif_scan": {"tau": 2.0, "v_th": 1.0, "v_reset": 0.0, "decay_input": True},
    "window_attention": {"window": WINDOW},
}


def inputs(op, batch, length, *, heads=4, groups=2, key=8, value=8, dtype=torch.float32, scalar_decay=False):
    def randn(*shape):
        return torch.randn(*shape, dtype=dtype)

    if op == "wkv":
        return randn(batch, length, key) * 3, randn(batch, length, key), randn(key), randn(key)
    if op == "lif_scan":
        return (randn(batch, length, key) * 2,)
    if op == "short_conv":
        return randn(batch, length, key), randn(key, TAPS)
    q, k, v = randn(batch, length, heads, key), randn(batch, length, groups, key), randn(batch, length, groups, value)
    decay = -torch.rand(batch, length, groups, 1 if scalar_decay or op == "gated_delta" else key, dtype=dtype) * 2
    if op == "gated_delta":
        return q, k / k.norm(dim=-1, keepdim=True), v, torch.rand_like(decay), decay
    return (q, k, v, decay) if op == "gated_linear" else (q, k, v)


def state_of(op, rows, *, groups=2, key=8, value=8, dtype=torch.float32):
    shapes = {
        "gated_linear": (groups, key, value),
        "gated_delta": (groups, key, value),
        "wkv": (3, key),
        "lif_scan": (key,),
        "short_conv": (TAPS - 1, key),
        "window_attention": (CAPACITY, 2, groups, key),
    }
    state = torch.randn(rows, *shapes[op], dtype=dtype)
    if op == "wkv":
        state[:, 1] = 1 + state[:, 1].abs()
    return state


def call(op, tensors, backend, *, state=None, first=0, mask=None, cu_seqlens=None, function=None, **options):
    options = {**OPTIONS.get(op, {}), **options, "mask": mask, "cu_seqlens": cu_seqlens, "backend": backend}
    if state is not None:
        options["state"] = state
    if op == "window_attention":
        index = torch.arange(tensors[0].shape[1]).expand(tensors[0].shape[:2])
        if mask is not None:
            index = mask.long().cumsum(1) - 1
        if cu_seqlens is not None:
            index = index - torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())
        options["positions"] = index + first
    return (function or getattr(kernels, op))(*tensors, **options)


def cut(tensors, rows, columns):
    """The same tokens of every tensor that has tokens."""
    return [t[rows, columns] if t.dim() > 2 else t for t in tensors]


def assert_same(results, references, tolerance):
    for result, reference in zip(results, references, strict=True):
        assert relative_rms(result, reference) < tolerance


def assert_results_and_gradients_are_the_reference_s(op, backend, tensors, state, tolerances, **options):
    """`tolerances`: of output and state, and of the gradients of a random sum of both."""
    leaves = [t.detach().clone().requires_grad_() for t in (*tensors, state)]
    runs = [call(op, leaves[:-1], name, state=leaves[-1], **options) for name in (backend, "reference")]
    assert_same(*runs, tolerance=tolerances[0])
    weights = [torch.randn_like(t) for t in runs[0]]
    losses = [sum((t * w).sum() for t, w in zip(run, weights, strict=True)) for run in runs]
    gradients = [torch.autograd.grad(loss, leaves) for loss in losses]
    assert [gradient.dtype for gradient in gradients[0]] == [leaf.dtype for leaf in leaves]
    assert_same(*gradients, tolerance=tolerances[1])


def able(dtype, needs_gradients=False):
    pairs = [(op, backend) for op in RECURRENT_OPS for backend in backends(op)]
    return [
        (op, backend.name)
        for op, backend in pairs
        if not backend.missing(device_of(backend.name), dtype, op if needs_gradients else None)
    ]


BACKENDS = able(torch.float32)
OPTIMISED = [(op, name) for op, name in BACKENDS if name != "reference"]
DIFFERENTIABLE = [(op, name) for op, name in able(torch.float64, needs_gradients=True) if name != "reference"]
KERNELS_WITH_GRADIENTS = [
    (op, name) for op, name in able(torch.float32, needs_gradients=True) if name not in ("reference", "chunked")
]


@pytest.fixture(autouse=True)
def _device(request):
    """Tensors of a test lie where its backend runs."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    with torch.device(device_of(parameters.get("backend"))):
        yield


LENGTHS = [1, 3, 15, 16, 17, 63, 64, 65, 100, 130]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("op", "backend"), DIFFERENTIABLE)
def test_output_state_and_gradients_equal_the_reference(op, backend, length):
    tensors, state = [t.double() for t in inputs(op, 2, length)], state_of(op, 2, dtype=torch.float64)
    assert_results_and_gradients_are_the_reference_s(op, backend, tensors, state, (1e-12, 1e-11), first=CAPACITY + 2)


@pytest.mark.parametrize("length", [1, 37, 70])
@pytest.mark.parametrize(("op", "backend"), KERNELS_WITH_GRADIENTS)
def test_gradients_in_fp32_stay_within_their_tolerance(op, backend, length):
    tensors, state = inputs(op, 2, length), state_of(op, 2)
    assert_results_and_gradients_are_the_reference_s(op, backend, tensors, state, (FP32, FP32), first=CAPACITY + 2)


@pytest.mark.parametrize(("op", "backend"), KERNELS_WITH_GRADIENTS)
def test_gradients_of_packed_documents_and_masked_tokens_are_the_reference_s(op, backend):
    edges, mask = torch.tensor([0, 3, 20, 20, 21, 40]), torch.rand(2, 20) > 0.4
    check = assert_results_and_gradients_are_the_reference_s
    check(op, backend, inputs(op, 1, 40), state_of(op, 5), (FP32, FP32), cu_seqlens=edges)
    check(op, backend, inputs(op, 2, 20), state_of(op, 2), (FP32, FP32), mask=mask)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("op", "backend"), OPTIMISED)
def test_fp32_stays_within_its_tolerance(op, backend, length):
    tensors, state = inputs(op, 2, length), state_of(op, 2)
    assert_same(*(call(op, tensors, name, state=state, first=CAPACITY + 2) for name in (backend, "reference")), FP32)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_half_precision_inputs_give_half_precision_outputs_and_a_wide_state(op, backend):
    tensors = [t.bfloat16() for t in inputs(op, 1, 20)]
    out, state = call(op, tensors, backend, state=state_of(op, 1) * 0)
    exact, _ = call(op, [t.float() for t in tensors], backend, state=state_of(op, 1) * 0)
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert relative_rms(out, exact) < 1e-2


def test_one_decay_a_head_equals_the_same_decay_in_every_channel():
    q, k, v, decay = inputs("gated_linear", 2, 70, scalar_decay=True)
    for backend in [name for op, name in BACKENDS if op == "gated_linear"]:
        one = gated_linear(q, k, v, decay, scale=1.0, backend=backend)
        assert_same(one, gated_linear(q, k, v, decay.expand(k.shape), scale=1.0, backend="reference"), FP32)


def test_strong_decay_neither_overflows_nor_gives_nan():
    q, k, v, decay = (t.requires_grad_() for t in inputs("gated_linear", 1, 130))
    out, state = gated_linear(q, k, v, decay * 200, scale=1.0, backend="chunked")
    assert_same((out, state), gated_linear(q, k, v, decay * 200, scale=1.0, backend="reference"), FP32)
    gradients = torch.autograd.grad(out.sum() + state.sum(), (q, k, v, decay))
    assert all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_masked_tokens_do_not_exist(op, backend):
    tensors = inputs(op, 3, 21)
    mask = torch.arange(21) >= torch.tensor([[0], [6], [20]])
    first = torch.tensor([[5], [0], [30]])
    state = state_of(op, 3)
    out, after = call(op, tensors, backend, state=state, first=first, mask=mask)
    for row, skipped in enumerate((0, 6, 20)):
        alone = cut(tensors, slice(row, row + 1), slice(skipped, None))
        expected = call(op, alone, backend, state=state[row : row + 1], first=int(first[row]))
        assert_same((out[row : row + 1, skipped:], after[row : row + 1]), expected, FP32)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_a_fully_masked_row_keeps_its_state(op, backend):
    tensors = inputs(op, 2, 5)
    mask = torch.tensor([[True] * 5, [False] * 5])
    state = state_of(op, 2)
    assert torch.equal(call(op, tensors, backend, state=state, mask=mask)[1][1], state[1])


CU_SEQLENS = [0, 3, 40, 40, 105, 110]


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_packed_documents_equal_separate_ones(op, backend):
    tensors = inputs(op, 1, 110)
    state = state_of(op, 5)
    out, after = call(op, tensors, backend, state=state, cu_seqlens=torch.tensor(CU_SEQLENS))
    for number, (start, end) in enumerate(zip(CU_SEQLENS, CU_SEQLENS[1:], strict=False)):
        if start == end:
            assert torch.equal(after[number], state[number])
            continue
        separate = cut(tensors, slice(None), slice(start, end))
        alone = call(op, separate, backend, state=state[number : number + 1])
        assert_same((out[:, start:end], after[number : number + 1]), alone, FP32)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_perturbing_one_document_changes_no_bit_of_another(op, backend):
    tensors = inputs(op, 1, 110)
    other = [t.clone() for t in tensors]
    for t in cut(other, slice(None), slice(3, 40)):
        t -= 1 if t.dim() > 2 else 0
    outs = [
        call(op, x, backend, state=state_of(op, 5) * 0, cu_seqlens=torch.tensor(CU_SEQLENS)) for x in (tensors, other)
    ]
    assert torch.equal(outs[0][0][:, 40:], outs[1][0][:, 40:])
    assert torch.equal(outs[0][0][:, :3], outs[1][0][:, :3])
    assert torch.equal(outs[0][1][[0, 2, 3, 4]], outs[1][1][[0, 2, 3, 4]])
    assert not torch.equal(outs[0][1][1], outs[1][1][1])


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_inputs_and_state_are_never_written_to(op, backend):
    tensors, state = inputs(op, 2, 20), state_of(op, 2)
    before = [t.clone() for t in (*tensors, state)]
    call(op, tensors, backend, state=state)
    assert all(torch.equal(a, b) for a, b in zip((*tensors, state), before, strict=True))


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_the_in_place_form_equals_the_plain_one_and_skips_padding_slots(op, backend, length):
    tensors = inputs(op, 3, length)
    pool = state_of(op, 5)
    before = pool.clone()
    slots = torch.tensor([4, -1, 2])
    step_ = getattr(kernels, f"{op}_step_")
    out = call(op, tensors, backend, first=4, function=step_, pool=pool, slots=slots)
    expected, after = call(op, tensors, backend, state=Slots(before, slots).read(), first=4)
    assert torch.equal(out, expected)
    assert torch.equal(pool[[4, 2]], after[[0, 2]])
    assert torch.equal(pool[[0, 1, 3]], before[[0, 1, 3]])


def test_unknown_names_and_wrong_shapes_are_errors_that_name_the_choices():
    q, k, v, decay = inputs("gated_linear", 1, 4)
    with pytest.raises(BackendError, match="chunked, reference"):
        gated_linear(q, k, v, decay, scale=1.0, backend="cuda")
    with pytest.raises(BackendError, match=", ".join(OPS)):
        backends("attention")
    with pytest.raises(ValueError, match="log_decay"):
        gated_linear(q, k, v, decay[:, :, :1], scale=1.0)
    with pytest.raises(ValueError, match="share"):
        gated_linear(q[:, :, :3], k, v, decay, scale=1.0)
    with pytest.raises(ValueError, match="rise from 0 to the 4 tokens"):
        gated_linear(q, k, v, decay, scale=1.0, cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="window"):
        window_attention(q, k, v, window=0, positions=torch.arange(4)[None])
    with pytest.raises(ValueError, match="one a head"):
        gated_delta(q, k, v, decay, decay, scale=1.0)
    with pytest.raises(ValueError, match="time_first"):
        wkv(q[:, :, 0], q[:, :, 0], q[0, 0, 0], q[0, 0, 0, :3])
    with pytest.raises(ValueError, match="tau at least 1"):
        lif_scan(q[:, :, 0], tau=0.5, v_th=1.0, v_reset=0.0, decay_input=True)
    with pytest.raises(ValueError, match="weight"):
        short_conv(q[:, :, 0], q[0, 0])


def test_a_backend_asked_for_and_missing_says_how_to_get_it(monkeypatch):
    (fla,) = (backend for backend in table.BACKENDS if backend.name == "fla")
    monkeypatch.setattr(table, "BACKENDS", (replace(fla, devices=("cpu",), requires=("not_there",)),))
    q, k, v, decay = inputs("gated_linear", 1, 5)
    with pytest.raises(BackendError, match=r"fla needs not_there: pip install 'spikingbrain\[cuda\]'"):
        gated_linear(q, k, v, decay, scale=1.0, backend="fla")


def test_the_delta_rule_replaces_what_is_stored_under_a_key():
    keys = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0][:3]
    k = keys[[0, 1, 2, 1]].view(1, 4, 1, 8)
    v = torch.randn(1, 4, 1, 5, dtype=torch.float64)
    one, zero = torch.ones(1, 4, 1, 1, dtype=torch.float64), torch.zeros(1, 4, 1, 1, dtype=torch.float64)
    _, state = gated_delta(k, k, v, one, zero, scale=1.0)
    assert relative_rms(keys @ state[0, 0], v[0, [0, 3, 2], 0]) < 1e-12


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_wkv_is_its_equation_and_no_exponent_is_too_large(backend):
    k, v, time_decay, time_first = (t.double() for t in inputs("wkv", 1, 40))
    index = torch.arange(40)
    age = (index[:, None] - 1 - index)[..., None]
    exponent = torch.where(
        age >= 0, k[0] - age * time_decay.exp(), (time_first + k[0]).masked_fill(age < -1, -torch.inf)
    )
    expected = (exponent.softmax(1) * v[0]).sum(1)
    assert relative_rms(wkv(k, v, time_decay, time_first, backend=backend)[0][0], expected) < 1e-12
    for shift in (-900, 900):
        out, state = wkv(k.float() + shift, v.float(), time_decay.float(), time_first.float(), backend=backend)
        assert relative_rms(out[0], expected) < 1e-3
        assert bool(state.isfinite().all())


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize(("v_reset", "after"), [(None, [0.5, 0.25, 0.125]), (0.25, [0.25, 0.25, 0.25])])
def test_a_neuron_charges_fires_and_resets(backend, v_reset, after):
    x = torch.tensor([1.5, 0.0, 0.0]).view(1, 3, 1)
    options = {"tau": 2.0, "v_th": 1.0, "v_reset": v_reset, "decay_input": False, "backend": backend}
    start = torch.full((1, 1), v_reset or 0.0)
    runs = [lif_scan(x[:, :length], **options, state=start) for length in (1, 2, 3)]
    assert runs[2][0].flatten().tolist() == [1, 0, 0]
    assert [float(membrane) for _, membrane in runs] == after


@pytest.mark.parametrize("v_reset", [None, 0.0, -0.3])
@pytest.mark.parametrize("decay_input", [True, False])
def test_every_kind_of_neuron_has_the_gradient_of_the_reference(v_reset, decay_input):
    x = (torch.randn(2, 30, 5, dtype=torch.float64) * 4).requires_grad_()
    options = {"tau": 3.0, "v_th": 0.8, "v_reset": v_reset, "decay_input": decay_input}
    weights = torch.randn(2, 30, 5, dtype=torch.float64)
    runs = [lif_scan(x, **options, backend=backend) for backend in ("chunked", "reference")]
    assert torch.equal(runs[0][0], runs[1][0])
    assert 0.1 < float(runs[0][0].detach().mean()) < 0.9
    gradients = [torch.autograd.grad((spikes * weights).sum() + membrane.sum(), x) for spikes, membrane in runs]
    assert_same(*gradients, tolerance=1e-12)


def test_a_short_convolution_is_torchs_causal_one():
    x, weight = inputs("short_conv", 2, 20)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (TAPS - 1, 0))
    expected = torch.nn.functional.conv1d(padded, weight[:, None], groups=8).transpose(1, 2)
    assert relative_rms(short_conv(x, weight)[0], expected) < 1e-6
