"""What the settings of a request do to its tokens: penalties, biases, lengths and seeds, beside a plain loop."""

from collections import Counter

import pytest
import torch

from spikingbrain_serving import LLM, SamplingParams

from .test_engine import tokens_of

NUM_TOKENS = 20


@pytest.fixture(scope="module")
def llm(model_dir):
    return LLM(model_dir, max_num_seqs=3, max_num_batched_tokens=7, preempt_after=6)


def penalised(logits: list[float], prompt: list[int], output: list[int], settings: dict) -> list[float]:
    """vLLM's and OpenAI's definitions, token by token."""
    counts, changed = Counter(output), list(logits)
    for token, logit in enumerate(logits):
        if token in counts or token in prompt:
            factor = settings.get("repetition_penalty", 1.0)
            changed[token] = logit / factor if logit > 0 else logit * factor
        changed[token] -= settings.get("frequency_penalty", 0.0) * counts[token]
        changed[token] -= settings.get("presence_penalty", 0.0) * (token in counts)
        changed[token] += settings.get("logit_bias", {}).get(token, 0.0)
    return changed


def by_hand(llm, prompt: list[int], settings: dict, ends: frozenset[int]) -> list[int]:
    """Greedy tokens, each from the logits of the whole sequence so far."""
    output: list[int] = []
    while len(output) < NUM_TOKENS and not (output and output[-1] in ends):
        with torch.inference_mode():
            logits = llm.engine.model(torch.tensor([prompt + output])).logits[0, -1].tolist()
        changed = penalised(logits, prompt, output, settings)
        if len(output) < settings.get("min_tokens", 0):
            changed = [-torch.inf if token in ends else logit for token, logit in enumerate(changed)]
        output.append(max(range(len(changed)), key=changed.__getitem__))
    return output


@pytest.mark.parametrize(
    "settings",
    [
        {"presence_penalty": 1.7},
        {"presence_penalty": -2.0},
        {"frequency_penalty": 1.3},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.6},
        {"logit_bias": {7: 6.0, 40: 5.5, 41: -3.0}},
        {"min_tokens": 9},
        {"presence_penalty": 0.5, "frequency_penalty": 0.4, "repetition_penalty": 1.2, "logit_bias": {9: 4.0}},
    ],
    ids=lambda settings: " ".join(f"{name} {value}" for name, value in settings.items()),
)
def test_settings_choose_the_tokens_that_their_definition_chooses(llm, prompt_tokens, reference, monkeypatch, settings):
    # The second token of the plain output ends it, so that `min_tokens` has something to prevent.
    ends = frozenset({reference[0][1]} if "min_tokens" in settings else ())
    monkeypatch.setattr(llm.engine, "eos_token_ids", ends)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, **settings)
    expected = [by_hand(llm, prompt, settings, ends) for prompt in prompt_tokens]
    assert tokens_of(llm.generate(prompt_tokens, params)) == expected
    assert expected[0] != reference[0][:NUM_TOKENS]


def test_logprobs_are_the_log_softmax_of_the_model(llm, prompt_tokens):
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=12, logprobs=5, presence_penalty=1.0)
    (output,) = llm.generate(prompt_tokens[0], params)
    tokens, entries = output.outputs[0].token_ids, output.outputs[0].logprobs
    with torch.inference_mode():
        logits = llm.engine.model(torch.tensor([prompt_tokens[0] + tokens])).logits[0]
    rows = logits.log_softmax(-1)[len(prompt_tokens[0]) - 1 : -1]
    for token, row, entry in zip(tokens, rows, entries, strict=True):
        assert {token, *row.topk(5).indices.tolist()} == set(entry)
        for name, logprob in entry.items():
            assert logprob.logprob == pytest.approx(float(row[name]), abs=1e-5)
            assert logprob.rank == int((row > row[name]).sum()) + 1


def test_each_of_several_outputs_is_that_of_its_own_seed(llm, prompt_tokens):
    (several,) = llm.generate(prompt_tokens[0], SamplingParams(seed=40, n=3, max_tokens=12))
    alone = [llm.generate(prompt_tokens[0], SamplingParams(seed=40 + i, max_tokens=12))[0] for i in range(3)]
    assert [output.token_ids for output in several.outputs] == tokens_of(alone)
    assert len({tuple(output.token_ids) for output in several.outputs}) == 3


def test_requests_with_the_same_seed_are_the_same_and_others_are_not(llm, prompt_tokens):
    params = [SamplingParams(seed=seed, max_tokens=12) for seed in (5, 6, 5, 7)]
    outputs = tokens_of(llm.generate([prompt_tokens[0]] * 4, params))
    assert outputs[0] == outputs[2]
    assert len({tuple(tokens) for tokens in outputs}) == 3
