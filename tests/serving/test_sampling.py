"""Sampling settings are checked, and do what their names say."""

import math
from collections import Counter

import pytest
import torch

from spikingbrain_serving import InvalidRequest, SamplingParams
from spikingbrain_serving.sampling import logprobs_of, sample

LOGITS = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()


def draws(num: int = 300, **settings) -> Counter:
    generator = torch.Generator().manual_seed(1)
    params = SamplingParams(**settings)
    return Counter(sample(LOGITS, params, generator) for _ in range(num))


def test_temperature_zero_takes_the_most_likely_token():
    assert draws(20, temperature=0) == {0: 20}


def test_samples_follow_the_probabilities():
    counts = draws(4000)
    assert [counts[token] / 4000 for token in range(4)] == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.03)


@pytest.mark.parametrize(
    ("top_k", "kept"), [(1, {0}), (2, {0, 1}), (0, {0, 1, 2, 3}), (-1, {0, 1, 2, 3}), (9, {0, 1, 2, 3})]
)
def test_top_k_keeps_the_k_likeliest(top_k, kept):
    assert set(draws(top_k=top_k)) == kept


@pytest.mark.parametrize(("top_p", "kept"), [(0.1, {0}), (0.5, {0, 1}), (0.8, {0, 1, 2}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_fewest_that_reach_p(top_p, kept):
    assert set(draws(top_p=top_p)) == kept


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.7}, {"top_k": 5}, {"top_k": 30, "top_p": 0.6}, {"min_p": 0.2}])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_what_is_drawn_from_a_large_vocabulary_follows_its_definition(settings, spread):
    logits = torch.randn(3000) * spread
    probabilities = logits.softmax(-1)
    order = probabilities.argsort(descending=True)[: settings.get("top_k", 3000)]
    kept = probabilities[order] / probabilities[order].sum()
    order = order[: 1 + int((kept.cumsum(-1) < settings.get("top_p", 1.1)).sum())]
    order = order[probabilities[order] >= settings.get("min_p", 0.0) * probabilities.max()]
    generator, params = torch.Generator().manual_seed(1), SamplingParams(**settings)
    drawn = Counter(sample(logits, params, generator) for _ in range(400))
    assert set(drawn) <= set(order.tolist())
    share = probabilities[order] / probabilities[order].sum()
    half = order[: 1 + int((share.cumsum(-1) < 0.5).sum())].tolist()
    expected = float(probabilities[half].sum() / probabilities[order].sum())
    assert sum(drawn[token] for token in half) / 400 == pytest.approx(expected, abs=0.1)


def test_a_high_temperature_evens_the_odds():
    counts = draws(2000, temperature=100.0)
    assert min(counts.values()) > 400


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_numbers_are_an_error(temperature):
    with pytest.raises(ArithmeticError, match="nan"):
        sample(torch.tensor([1.0, math.nan]), SamplingParams(temperature=temperature), torch.Generator())


def test_logprobs_name_the_chosen_token_its_rank_and_the_likeliest():
    entries = logprobs_of(LOGITS, 2, 2)
    assert [(token, rank) for token, _, rank in entries] == [(2, 3), (0, 1), (1, 2)]
    assert [value for _, value, _ in entries] == pytest.approx([math.log(p) for p in (0.2, 0.4, 0.3)])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("min_p", 1.5),
        ("presence_penalty", 2.5),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0.0),
        ("logit_bias", {1: 101.0}),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("seed", 2**64),
        ("stop", ["ok", ""]),
        ("logprobs", 21),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(InvalidRequest, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


def test_one_stop_string_is_a_list_of_one():
    assert SamplingParams(stop="end").stop == ("end",)
