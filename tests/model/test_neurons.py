"""Every neuron against its equation written out, in fp64, forward and gradient; those with a memory in any chunks."""

import math

import pytest
import torch
from conftest import relative_rms

from spikingbrain import InputError, SpikingBrainConfig, registry
from spikingbrain.neurons import Observation
from spikingbrain.surrogates import SURROGATES, heaviside, surrogate

EXACT = 1e-12
WITH_MEMORY = {"lif": {}, "plif": {"tau": 3.0}, "ni_lif": {"decay": 0.4}}


def make(name, channels, **params):
    return registry.load("neurons", name).Neuron(channels, **params).double()


def gradients(function, *inputs, seed=0):
    """Values of `function` and the gradients of a random sum of them."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*inputs)
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), dtype=value.dtype)
    return value.detach(), torch.autograd.grad((value * weights).sum(), inputs), weights


def dequantised(neuron):
    return lambda x: (spikes := neuron(x)).counts * spikes.scale


def test_int8_is_the_absmax_quantiser():
    x = torch.randn(3, 5, 40, dtype=torch.float64)
    spikes = make("int8", 40)(x)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert torch.equal(spikes.counts, (x / step).round())
    assert torch.equal(spikes.scale, step)
    assert spikes.counts.abs().amax(-1).unique().tolist() == [127]
    _, (gradient,), weights = gradients(dequantised(make("int8", 40, bits=4)), x)
    assert relative_rms(gradient, weights) < EXACT


def test_dead_zone_counts_where_the_magnitude_reaches_theta():
    x = torch.randn(4, 3, 50, dtype=torch.float64)
    neuron = make("dead_zone", 50, theta=0.7, k=4.0)
    neuron.theta.data[:10] = 1.3
    spikes = neuron(x)
    for row, token in enumerate(x.flatten(0, 1)):
        mean = token.abs().mean()
        for c in range(50):
            fires = token[c].abs() >= (1.3 if c < 10 else 0.7) * mean
            expected = torch.round(token[c] / (mean / 4)) if fires else torch.zeros(())
            assert spikes.counts.flatten(0, 1)[row, c] == expected
    assert 0.4 < float((spikes.counts == 0).double().mean()) < 0.8


def test_dead_zone_gradients_are_straight_through_lsq_and_the_surrogate():
    x = torch.randn(6, 20, dtype=torch.float64)
    neuron = make("dead_zone", 20, theta=0.6, k=3.0, width=0.5)

    def value(x, theta, k):
        return dequantised(lambda x: torch.func.functional_call(neuron, {"theta": theta, "k": k}, (x,)))(x)

    _, (to_x, to_theta, to_k), weights = gradients(value, x, neuron.theta, neuron.k)
    mean = x.abs().mean(-1, keepdim=True)
    scale, margin = mean / 3, x.abs() / mean - 0.6
    fires, counts = margin >= 0, (x / (mean / 3)).round() * (margin >= 0)
    assert relative_rms(to_x, weights) < EXACT
    assert relative_rms(to_theta, -(weights * x * (margin.abs() < 0.25) / 0.5).sum(0)) < EXACT
    # d(counts * scale)/d(scale) = counts - x / scale where it fires, and scale = mean / k.
    to_scale = weights * torch.where(fires, counts - x / scale, 0.0)
    assert relative_rms(to_k, -(to_scale * mean / 9).sum()[None]) < EXACT


def test_the_share_of_silence_is_exact_and_falls_with_a_gradient_on_thresholds_and_activations():
    x = torch.randn(30, 20, dtype=torch.float64, requires_grad=True)
    neuron = make("dead_zone", 20, theta=0.6)
    share = neuron.silence(x, neuron(x).counts)
    share.backward()
    assert float(share) == pytest.approx(float((neuron(x).counts == 0).double().mean()))
    assert bool((neuron.theta.grad > 0).all())
    assert bool((x.grad * x.detach().sign() <= 0).all())
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("steps", [1, 4])
def test_elastic_spikes_are_the_equation_and_both_signs_drain_alike(steps):
    x = torch.randn(7, 30, dtype=torch.float64)
    neuron = make("elastic", 30, amplitude=1.7, steps=steps)

    def oracle(x, a):
        a = a * x.detach().abs().mean(-1, keepdim=True)
        m, total = x, 0.0
        for _ in range(steps):
            inside = m / a
            hard = torch.where(inside.abs() > 0.5, inside.sign(), 0.0)
            s = torch.where(inside.abs() <= 1, inside + (hard - inside).detach(), hard)
            total = total + s
            m = 0.25 * (1 - s.abs()) * m + x
        return a / steps * total

    def ours(x, a):
        return dequantised(lambda x: torch.func.functional_call(neuron, {"amplitude": a}, (x,)))(x)

    (value, mine, _), (expected, theirs, _) = (gradients(f, x, neuron.amplitude) for f in (ours, oracle))
    assert relative_rms(value, expected) < EXACT
    for one, other in zip(mine, theirs, strict=True):
        assert relative_rms(one, other) < EXACT
    assert torch.equal(neuron(-x).counts, -neuron(x).counts)


def test_elastic_fires_at_its_rate_on_gaussian_data():
    x = torch.randn(400, 500, dtype=torch.float64)
    neuron = make("elastic", 500, steps=1)
    # P(|x| > mean|x|) = erfc(1 / sqrt(pi)).
    assert float((neuron(x).counts != 0).double().mean()) == pytest.approx(math.erfc(math.pi**-0.5), abs=0.005)
    slow = make("elastic", 500, steps=1, rate=0.2)
    slow.calibrate(Observation(x, torch.ones(500), torch.ones(500), 0.8, 1.0))
    assert float((slow(x).counts != 0).double().mean()) == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize("two_sided", [False, True])
def test_ni_lif_is_the_paper_s_integer_times_its_number_of_levels(two_sided):
    x = 3 * torch.randn(2, 6, 30, dtype=torch.float64)
    neuron = make("ni_lif", 30, levels=4, two_sided=two_sided)
    normalised = torch.clamp(x, -4 if two_sided else 0, 4).round() / 4
    assert torch.equal(neuron(x).counts / 4, normalised)
    assert neuron.signed is two_sided
    _, (gradient,), weights = gradients(dequantised(neuron), x)
    inside = (x <= 4) & (x >= (-4 if two_sided else 0))
    assert relative_rms(gradient, weights * inside) < EXACT


def test_ni_lif_remembers_what_it_did_not_fire():
    x = 2 * torch.randn(1, 9, 5, dtype=torch.float64)
    neuron = make("ni_lif", 5, levels=3, v_th=0.8, decay=0.5)
    h = torch.zeros(5, dtype=torch.float64)
    for t in range(9):
        u = h + x[0, t]
        n = (u / 0.8).clamp(-3, 3).round()
        h = 0.5 * (u - 0.8 * n)
        assert torch.equal(neuron(x).counts[0, t], n)


def emitted(count, limit, steps):
    """The spikes of one channel, step by step: at most `limit` at once."""
    train = []
    for _ in range(steps):
        s = max(-limit, min(limit, count))
        train.append(s)
        count -= s
    return train


def test_gif_gives_salient_channels_the_steps_for_their_outliers():
    x = torch.randn(5, 24, dtype=torch.float64)
    x[:, 3] *= 12
    plain, neuron = make("gif", 24), make("gif", 24, steps=4, salient=0.05)
    neuron.calibrate(Observation(x, torch.ones(24), torch.ones(24, dtype=torch.float64), 1.0, 1.0))
    assert neuron.salient.nonzero().flatten().tolist() == [3]
    spikes = neuron(x)
    reach = torch.full((24,), 7.0, dtype=torch.float64)
    reach[3] = 28
    step = (x.abs() / reach).amax(-1, keepdim=True)
    assert torch.equal(spikes.counts, (x / step).round())
    for row in spikes.counts.long().tolist():
        for c, count in enumerate(row):
            train = emitted(count, 7, 4 if c == 3 else 1)
            assert sum(train) == count
    error, plain_error = (relative_rms(dequantised(n)(x), x) for n in (neuron, plain))
    assert error < plain_error / 3
    _, (gradient,), weights = gradients(dequantised(neuron), x)
    assert relative_rms(gradient, weights) < EXACT


def test_saliency_is_the_diagonal_hessian_times_the_square():
    sample = torch.tensor([[3.0, 1.0, 2.0, 0.1]])
    neuron = make("gif", 4, salient=0.5)
    neuron.calibrate(Observation(sample, torch.ones(4), torch.tensor([0.1, 3.0, 1.0, 9.0]), 1.0, 1.0))
    assert neuron.salient.tolist() == [False, True, True, False]


def test_draining_the_membrane_halves_the_error_with_every_step():
    x = torch.randn(5, 64, dtype=torch.float64)
    errors = [float((dequantised(make("gif", 64, drain=d))(x) - x).abs().max()) for d in range(4)]
    scales = [float(make("gif", 64, drain=d)(x).scale.max()) for d in range(4)]
    for error, scale, first in zip(errors, scales, [scales[0] / 2**d for d in range(4)], strict=True):
        assert scale == pytest.approx(first)
        assert error <= scale / 2 + 1e-12


def lif_by_hand(x, *, tau, v_th, reset, decay_input, derivative):
    """One channel at a time, one token at a time; the step's gradient is put in by a detached difference."""
    v, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = v + (x[:, t] - v) / tau if decay_input else v * (1 - 1 / tau) + x[:, t]
        u = h - v_th
        s = (u >= 0).double() + derivative(u.detach()) * (u - u.detach())
        v = {"hard": (1 - s) * h, "soft": h - v_th * s, "none": h}[reset]
        out.append(s)
    return v_th * torch.stack(out, 1)


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("reset", ["hard", "soft", "none"])
def test_lif_is_its_equation_forward_and_backward(reset, decay_input, name):
    x = 1.5 * torch.randn(2, 11, 6, dtype=torch.float64)
    options = {"tau": 2.5, "v_th": 0.7, "reset": reset, "decay_input": decay_input}
    neuron = make("lif", 6, surrogate=name, **options)
    value, (mine,), _ = gradients(dequantised(neuron), x)
    expected, (theirs,), _ = gradients(lambda x: lif_by_hand(x, derivative=surrogate(name), **options), x)
    assert torch.equal(value, expected)
    assert 0 < value.count_nonzero() < value.numel()
    assert relative_rms(mine, theirs) < EXACT


def test_plif_learns_its_time_constant():
    x = 1.5 * torch.randn(2, 9, 4, dtype=torch.float64)
    neuron = make("plif", 4, tau=3.0)
    assert torch.equal(neuron(x).counts, make("lif", 4, tau=3.0)(x).counts)

    def ours(w):
        return dequantised(lambda x: torch.func.functional_call(neuron, {"w": w}, (x,)))(x)

    def by_hand(w):
        options = {"v_th": 1.0, "reset": "hard", "decay_input": True, "derivative": surrogate("atan")}
        return lif_by_hand(x, tau=1 / torch.sigmoid(w), **options)

    (_, (mine,), _), (_, (theirs,), _) = gradients(ours, neuron.w), gradients(by_hand, neuron.w)
    assert relative_rms(mine, theirs) < EXACT


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates_integrate_to_one_and_stand_in_for_the_step_s_derivative(name):
    u = torch.linspace(-400, 400, 800_001, dtype=torch.float64)
    assert float(surrogate(name)(u).sum() * 1e-3) == pytest.approx(1.0, abs=2e-3)
    value, (gradient,), weights = gradients(lambda u: heaviside(u, surrogate(name)), u[399_500:400_500])
    assert torch.equal(value, (u[399_500:400_500] >= 0).double())
    assert torch.equal(gradient, weights * surrogate(name)(u[399_500:400_500]))


@pytest.mark.parametrize("sizes", [[1] * 17, [5, 1, 11], [16, 1]], ids=str)
@pytest.mark.parametrize("name", WITH_MEMORY)
def test_any_chunking_of_a_neuron_with_a_memory_equals_the_whole(name, sizes):
    neuron = make(name, 6, **WITH_MEMORY[name])
    x = 1.5 * torch.randn(3, 17, 6, dtype=torch.float64)
    first = {spec.name: spec.allocate(3, "cpu") for spec in neuron.state_specs(x.dtype)}
    assert list(first) == ["membrane"]
    whole, state, parts = neuron(x, first), first, []
    for part in x.split(sizes, dim=1):
        spikes = neuron(part, state)
        state = spikes.state
        parts.append(spikes.counts)
    assert torch.equal(torch.cat(parts, 1), whole.counts)
    assert torch.equal(state["membrane"], whole.state["membrane"])
    assert torch.equal(neuron(x).counts, whole.counts)
    assert not first["membrane"].any()


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_no_membrane_crosses_a_document_s_edge_and_padding_changes_none(name):
    neuron = make(name, 6, **WITH_MEMORY[name])
    x = 1.5 * torch.randn(1, 17, 6, dtype=torch.float64)
    edges = [0, 4, 4, 5, 17]
    packed = neuron(x, {"membrane": torch.zeros(4, 6).double()}, cu_seqlens=torch.tensor(edges))
    for number, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
        alone = neuron(x[:, begin:end], {"membrane": torch.zeros(1, 6).double()})
        assert torch.equal(packed.counts[:, begin:end], alone.counts)
        assert torch.equal(packed.state["membrane"][number], alone.state["membrane"][0])
    mask = torch.arange(17)[None] >= 5
    padded = neuron(x, {"membrane": torch.zeros(1, 6).double()}, mask=mask)
    alone = neuron(x[:, 5:], {"membrane": torch.zeros(1, 6).double()})
    assert torch.equal(padded.counts[:, 5:], alone.counts)
    assert torch.equal(padded.state["membrane"], alone.state["membrane"])


@pytest.mark.parametrize(
    ("neuron", "params", "why"),
    [
        ("adaptive", {"k": -1.0}, "k must be above 0"),
        ("dead_zone", {"theta": -0.1}, "theta must be at least 0"),
        ("dead_zone", {"k": 0.0}, "must be above 0"),
        ("dead_zone", {"surrogate": "step"}, "choose from atan, sigmoid, rectangle, triangle"),
        ("int8", {"bits": 9}, "between 2 and 8"),
        ("elastic", {"rate": 1.0}, "rate between 0 and 1"),
        ("ni_lif", {"decay": 1.0}, "decay in"),
        ("gif", {"bits": 1}, "bits must be 2 to 8"),
        ("lif", {"tau": 0.5}, "tau must be at least 1"),
        ("lif", {"reset": "maybe"}, "choose from hard, soft, none"),
        ("plif", {"tau": 1.0}, "tau must be above 1"),
        ("lif", {"taw": 2.0}, "do not fit neuron"),
    ],
)
def test_wrong_settings_are_refused_with_the_reason(neuron, params, why):
    with pytest.raises(InputError, match=why):
        SpikingBrainConfig(spiking={"neuron": neuron, "params": params})
