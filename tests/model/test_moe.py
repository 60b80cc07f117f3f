"""Experts: against every expert on every token, and the contract of a layer over a model that has them."""

import pytest
import torch
from conftest import relative_rms

from spikingbrain import InputError, SpikingBrainConfig, record_spikes
from spikingbrain.experts import (
    Router,
    Routing,
    balance_loss,
    choices,
    count_parameters,
    dispatch,
    expert_load,
    group,
    record_routing,
    routers,
    shift_balance_,
)
from spikingbrain.spiking import collect_silence
from spikingbrain.statistics import recorded_statistics
from spikingbrain.surrogates import atan

from .conftest import SINKS, SPIKING, VOCABULARY, tiny_config, tiny_model
from .test_mixers import (  # noqa: F401 - the contract, over the model of this file
    test_a_ragged_batch_goes_on_as_each_row_alone,
    test_any_chunking_equals_the_whole,
    test_every_parameter_gets_a_gradient,
    test_left_padding_changes_nothing,
    test_saved_and_loaded_is_the_same_model,
    test_the_pool_gives_the_same_tokens_and_the_same_states_in_any_slot,
)

EXACT = 1e-12
TOP1 = {"num_experts": 3}
TOP2 = {"num_experts": 5, "top_k": 2, "num_shared": 2, "score": "sigmoid"}
FIRING = {"num_experts": 4, "top_k": 3, "score": "spike"}


def moe_model(moe, **options):
    return tiny_model([SINKS], channel_mixers=["swiglu", "moe", "moe"], moe=moe, **options)


@pytest.fixture(params=["dense", "spiking"])
def spiking(request):
    return SPIKING[request.param]


@pytest.fixture(params=[TOP1, TOP2, FIRING], ids=["top 1", "top 2", "firing"])
def model(request, spiking):
    return moe_model(request.param, spiking=spiking)


def tokens(rows=2, length=23):
    return torch.randint(0, VOCABULARY, (rows, length))


def specified_scores(router, logits):
    """What a token counts at each expert, and by what its experts are ranked."""
    if router.moe["score"] == "spike":
        membrane = logits / logits.square().mean(-1, keepdim=True).sqrt() + router.balance_bias
        u = membrane - 1
        return (u >= 0).double() + atan(u.detach()) * (u - u.detach()), membrane
    scores = logits.softmax(-1) if router.moe["score"] == "softmax" else logits.sigmoid()
    return scores, scores + router.balance_bias


def every_expert_on_every_token(layer, x):
    """The specification: all experts on all tokens, weighted by scores that are zero where a token is not sent."""
    scores, rank = specified_scores(layer.router, x @ layer.router.weight.T)
    best = rank.argsort(-1, descending=True)[:, : layer.router.moe["top_k"]]
    weights = torch.zeros_like(scores).scatter(1, best, scores.gather(1, best))
    nothing = {"positions": None, "cu_seqlens": None, "mask": None}
    routed = torch.stack([expert(x, {}, **nothing)[0] for expert in layer.experts], 1)
    shared = sum((expert(x, {}, **nothing)[0] for expert in layer.shared), start=torch.zeros_like(x))
    if layer.router.moe["score"] == "spike":
        # The surrogate's gradient reaches the experts that fired; the others' outputs are not known.
        weights = torch.where(weights == 0, 0.0, weights)
    return shared + (weights[..., None] * routed).sum(1)


def test_grouped_experts_equal_every_expert_on_every_token(model):
    layer = model.model.layers[1].mlp.moe
    layer.router.balance_bias += torch.randn(len(layer.experts)) * 0.3
    x = torch.randn(2, 31, 32, dtype=torch.float64, requires_grad=True)
    out, _ = layer.mix({"hidden": x}, {}, positions=None, cu_seqlens=None, mask=None)
    expected = every_expert_on_every_token(layer, x.flatten(0, 1)).view_as(x)
    assert relative_rms(out, expected) < EXACT
    weight = torch.randn_like(out)
    used = [x, *layer.parameters()]
    gradients = [torch.autograd.grad((y * weight).sum(), used) for y in (out, expected)]
    assert all(relative_rms(*pair) < 1e-11 for pair in zip(*gradients, strict=True))


@torch.no_grad()
def test_an_expert_that_does_not_fire_is_not_computed():
    layer = moe_model(FIRING).model.layers[1].mlp.moe
    x = torch.randn(40, 32, dtype=torch.float64)
    rows = []
    for expert in layer.experts:
        expert.register_forward_hook(lambda _module, inputs, _output: rows.append(inputs[0].shape[1]))
    layer.mix({"hidden": x[None]}, {}, positions=None, cu_seqlens=None, mask=None)
    routing = layer.router(x)
    fired = routing.weights.sum(1)
    assert rows == expert_load(routing).tolist()
    assert sum(rows) == int(fired.sum()) < 3 * 40
    assert bool((routing.experts[routing.weights == 0] == 4).all())
    layer.router.balance_bias -= 10
    alone, _ = layer.mix({"hidden": x[None]}, {}, positions=None, cu_seqlens=None, mask=None)
    assert (
        relative_rms(alone[0], layer.shared[0](x[None], {}, positions=None, cu_seqlens=None, mask=None)[0][0]) < EXACT
    )
    assert float(balance_loss_of(layer.router(x), 2)) == 0


@torch.no_grad()
def test_masked_tokens_are_sent_nowhere(model):
    layer, x = model.model.layers[1].mlp.moe, torch.randn(2, 9, 32, dtype=torch.float64)
    mask = torch.rand(2, 9) > 0.4
    with record_routing(model) as record:
        out, _ = layer.mix({"hidden": x}, {}, positions=None, cu_seqlens=None, mask=mask)
    assert relative_rms(out[mask], every_expert_on_every_token(layer, x[mask])) < EXACT
    assert not out[~mask].any()
    assert len(record["model.layers.1.mlp.moe.router"][0].experts) == int(mask.sum())


def test_groups_hold_each_pair_once_sorted_by_expert():
    experts = torch.tensor([[2, 0], [0, 3], [2, 1]])
    groups = group(experts, 5)
    assert groups.sizes.tolist() == [2, 1, 2, 1, 0]
    assert experts.flatten()[groups.pairs].tolist() == [0, 0, 1, 2, 2, 3]
    assert dispatch(torch.arange(3)[:, None], groups).flatten().tolist() == [0, 1, 2, 0, 2, 1]


@torch.no_grad()
def test_an_expert_without_tokens_runs_and_gets_a_gradient_of_zero():
    model = moe_model(TOP1).train()
    for router in routers(model).values():
        router.balance_bias[:] = torch.tensor([5.0, 0.0, 0.0])
    with torch.enable_grad():
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    idle = model.model.layers[1].mlp.moe.experts[2]
    assert all(p.grad is not None and not p.grad.any() for p in idle.parameters())


@torch.no_grad()
def test_a_later_token_and_another_document_do_not_matter(model):
    """To rounding: the rows of one expert's product may be others."""
    ids, cu_seqlens = tokens(1, 40), torch.tensor([0, 3, 15, 40], dtype=torch.int32)
    packed = model(input_ids=ids, cu_seqlens=cu_seqlens).logits
    other = ids.clone()
    other[:, 3:15] = (other[:, 3:15] + 1) % VOCABULARY
    changed = model(input_ids=other, cu_seqlens=cu_seqlens).logits
    assert relative_rms(packed[:, :3], changed[:, :3]) < EXACT
    assert relative_rms(packed[:, 15:], changed[:, 15:]) < EXACT
    assert relative_rms(packed[:, 3:15], model(input_ids=ids[:, 3:15]).logits) < EXACT
    later = model(input_ids=ids[:, :20]).logits
    assert relative_rms(model(input_ids=ids).logits[:, :20], later) < EXACT


def test_the_router_computes_in_fp32_whatever_the_model_and_autocast_do():
    router = Router(32, tiny_config(["gla"], channel_mixers=["moe"], moe=TOP1).moe).bfloat16()
    x = torch.randn(50, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x)
    exact = (x.double() @ router.weight.double().T).softmax(-1)
    assert routing.weights.dtype == torch.float32
    assert relative_rms(routing.probabilities, exact) < 1e-6


def test_generation_with_a_cache_equals_generation_without(model):
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 12}
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    cached = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **options))
    assert torch.equal(cached[1, 9:], model.generate(ids[1:, 4:], **options)[0, 5:])


def even_routing(num_tokens, num_experts):
    experts = (torch.arange(num_tokens) % num_experts)[:, None]
    even = torch.full((num_tokens, num_experts), 1 / num_experts, dtype=torch.float64)
    return Routing(experts, even[:, :1], even)


def balance_loss_of(routing, num_sequences):
    rows = torch.arange(len(routing.experts)) * num_sequences // len(routing.experts)
    return balance_loss(routing, rows, choices(routing, rows, num_sequences))


def test_balance_costs_one_a_token_where_it_is_even_and_all_experts_where_one_takes_all():
    assert float(balance_loss_of(even_routing(24, 4), 2)) == pytest.approx(24)
    one = torch.zeros(24, 4, dtype=torch.float64)
    one[:, 1] = 1
    worst = Routing(torch.ones(24, 1, dtype=torch.long), one[:, :1], one)
    assert float(balance_loss_of(worst, 2)) == pytest.approx(24 * 4)


def test_the_balance_loss_of_a_batch_is_the_sum_over_its_sequences():
    with record_routing(model := moe_model(TOP2)) as record:
        model(input_ids=tokens(3, 11), use_cache=False)
    for (routing,) in record.values():
        parts = [Routing(*(t[11 * row : 11 * row + 11] for t in routing)) for row in range(3)]
        assert relative_rms(balance_loss_of(routing, 3), sum(balance_loss_of(part, 1) for part in parts)) < EXACT
        assert torch.equal(expert_load(routing), sum(expert_load(part) for part in parts))


def test_loss_free_balance_moves_the_choice_and_not_the_weights():
    router = Router(32, tiny_config(["gla"], channel_mixers=["moe"], moe={**TOP1, "bias_rate": 0.25}).moe)
    x = torch.randn(64, 32)
    before = router(x)
    shift_balance_(router, torch.tensor([60, 3, 1]))
    assert router.balance_bias.tolist() == [-0.25, 0.25, 0.25]
    after = router(x)
    assert torch.equal(after.probabilities, before.probabilities)
    assert torch.allclose(after.weights, after.probabilities.gather(1, after.experts), rtol=1e-6, atol=0)
    assert expert_load(after)[0] < expert_load(before)[0]


@torch.no_grad()
def test_spike_statistics_weigh_an_expert_by_the_tokens_it_sees():
    model = moe_model(TOP1, spiking={"neuron": "adaptive", "params": {"k": 3.0}})
    for router in routers(model).values():
        router.balance_bias[:] = torch.tensor([5.0, 0.0, 0.0])
    with record_spikes(model) as record:
        model(input_ids=tokens(), use_cache=False)
    figures = recorded_statistics(model, record)
    dense = tiny_model([SINKS], spiking=model.config.spiking)
    with record_spikes(dense) as record:
        dense(input_ids=tokens(), use_cache=False)
    # A shared and one routed expert instead of one dense block, in two layers of three.
    one_block = 3 * 32 * 48
    expected = recorded_statistics(dense, record)["dense_operations_per_token"] + 2 * one_block
    assert figures["dense_operations_per_token"] == pytest.approx(expected)


def test_silence_weighs_an_expert_by_the_tokens_it_sees():
    model = moe_model(TOP1, spiking={"neuron": "dead_zone", "params": {"theta": 0.6}})
    for router in routers(model).values():
        router.balance_bias[:] = torch.tensor([5.0, 0.0, 0.0])
    with collect_silence(model) as silence, record_spikes(model) as record:
        model(input_ids=tokens(), use_cache=False)
    assert float(silence.share()) == pytest.approx(recorded_statistics(model, record)["unread_weights"], abs=1e-6)
    silence.share().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name


def test_active_parameters_leave_out_the_experts_a_token_is_not_sent_to():
    dense, experts = tiny_model([SINKS]), moe_model(TOP2)
    one_block, router = 3 * 32 * 48, 5 * 32
    total, active = count_parameters(experts)
    assert count_parameters(dense) == (dense.num_parameters(), dense.num_parameters())
    assert total == experts.num_parameters() == dense.num_parameters() + 2 * (6 * one_block + router)
    assert active == dense.num_parameters() + 2 * (3 * one_block + router)


@pytest.mark.parametrize(
    ("moe", "said"),
    [
        ({"experts": 4}, "unknown keys experts in moe; it knows aux_loss, bias_rate"),
        ({"num_experts": 2, "top_k": 3}, "moe: top_k=3; needs integers num_experts >= top_k"),
        ({"num_experts": 2.0}, "num_experts=2.0"),
        ({"score": "tanh"}, "score='tanh'"),
        ({"aux_loss": -1}, "aux_loss=-1"),
    ],
)
def test_wrong_settings_are_named(moe, said):
    with pytest.raises(InputError, match=said):
        SpikingBrainConfig(num_hidden_layers=2, channel_mixers=["swiglu", "moe"], moe=moe)


def test_settings_of_experts_need_a_layer_with_experts():
    with pytest.raises(InputError, match="channel_mixers has no moe layer"):
        SpikingBrainConfig(num_hidden_layers=2, moe={})
    assert SpikingBrainConfig(num_hidden_layers=2).moe is None
    assert SpikingBrainConfig(num_hidden_layers=2, channel_mixers=["moe"]).moe["num_experts"] == 16
