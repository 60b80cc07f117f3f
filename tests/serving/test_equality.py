"""Greedy tokens are those of `generate`, whatever the batch, the chunks, preemption, reuse, forks and restarts."""

import subprocess
import sys
import warnings

import pytest

from spikingbrain_serving import LLM, Extras, SamplingParams
from spikingbrain_serving.state_file import StoredState, read_state, write_state

from .conftest import generate, num_ties, save_model
from .test_engine import drain, tokens_of

GREEDY = SamplingParams(temperature=0, max_tokens=24)
TWELVE = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SETTINGS = {
    "one slot, preempted every 3 tokens": {"max_num_seqs": 1, "preempt_after": 3},
    "two slots, chunks of 5, preempted every 4": {"max_num_seqs": 2, "max_num_batched_tokens": 5, "preempt_after": 4},
    "no reuse": {"max_num_seqs": 3, "max_num_batched_tokens": 7, "prefix_cache_bytes": 0},
    "one token a step": {"max_num_seqs": 4, "max_num_batched_tokens": 1},
}
CONTINUE = """
import sys, pathlib
from spikingbrain_serving import LLM, Extras, SamplingParams
from spikingbrain_serving.state_file import read_state
llm = LLM(sys.argv[1])
state = read_state(pathlib.Path(sys.argv[2]), llm.engine.identity)
params = SamplingParams(temperature=0, max_tokens=12)
llm.engine.add_request("r", state.tokens, params, Extras(resume=state.snapshot))
while llm.engine.has_work:
    for new in llm.engine.step():
        sys.stdout.write(" ".join(map(str, new.outputs[0].token_ids)) + " ")
"""


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_tokens_are_those_of_generate(model_dir, prompt_tokens, reference, settings):
    llm = LLM(model_dir, **settings)
    for _ in range(2):
        assert tokens_of(llm.generate(prompt_tokens, GREEDY)) == reference
    if "preempt_after" in settings:
        assert llm.engine.stats.preemptions > 4


@pytest.mark.parametrize("mixer", ["gla", "sliding_window", "softmax", "gated_delta", "rwkv"])
def test_without_packing_tokens_are_those_of_generate_up_to_ties(tmp_path, tokenizer, prompt_tokens, mixer):
    path = save_model(tmp_path / "model", tokenizer, mixers=[mixer], num_hidden_layers=2)
    expected = generate(path, prompt_tokens, 12, ignore_eos=True, pack="none")
    llm = LLM(path, max_num_seqs=2, max_num_batched_tokens=5, preempt_after=4, max_model_len=64, pack="none")
    ties = 0
    for _ in range(2):
        outputs = tokens_of(llm.generate(prompt_tokens, TWELVE))
        ties += num_ties(path, prompt_tokens, outputs, expected)
    if ties:
        warnings.warn(f"{mixer}: {ties} of {2 * len(prompt_tokens)} outputs part at a tie", stacklevel=1)
    assert ties < len(prompt_tokens)


def test_a_conversation_goes_on_without_being_read_again(model_dir, prompt_tokens, reference):
    llm = LLM(model_dir)
    llm.generate(prompt_tokens[0], GREEDY)
    longer = prompt_tokens[0] + reference[0] + prompt_tokens[2]
    (output,) = llm.generate(longer, GREEDY)
    # The last token of an output is chosen, not read.
    assert output.num_cached_tokens == len(prompt_tokens[0]) + 23
    assert tokens_of([output]) == generate(model_dir, [longer], 24)


def test_the_place_where_prompts_branch_off_is_kept_for_the_third(model_dir, prompt_tokens, reference):
    llm = LLM(model_dir)
    shared = [5 + index % 60 for index in range(40)]
    cached = [llm.generate(shared + prompt, GREEDY)[0].num_cached_tokens for prompt in prompt_tokens[:3]]
    assert cached == [0, 0, 40]
    assert llm.engine.stats.misses == {"new_tokens": 2, "no_state_at_branch": 1}
    assert tokens_of(llm.generate(prompt_tokens[1], GREEDY)) == [reference[1]]


def test_several_outputs_of_one_prompt_compute_it_once(model_dir, prompt_tokens, reference):
    llm = LLM(model_dir, max_num_seqs=2, preempt_after=5)
    (output,) = llm.generate(prompt_tokens[0], SamplingParams(temperature=0, max_tokens=24, n=5))
    assert [completion.token_ids for completion in output.outputs] == [reference[0]] * 5
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3, 4]
    assert llm.engine.stats.prompt_tokens == len(prompt_tokens[0])
    (sampled,) = llm.generate(prompt_tokens[0], SamplingParams(seed=3, max_tokens=24, n=3))
    assert len({tuple(completion.token_ids) for completion in sampled.outputs}) == 3


def test_a_state_saved_in_the_middle_goes_on_in_another_process(model_dir, prompt_tokens, reference, tmp_path):
    llm = LLM(model_dir)
    params = SamplingParams(temperature=0, max_tokens=12)
    llm.engine.add_request("r", prompt_tokens[0], params, Extras(snapshot=True))
    *_, last = drain(llm.engine)["r"]
    tokens = prompt_tokens[0] + reference[0][:12]
    path = tmp_path / "state.safetensors"
    write_state(path, StoredState(tokens, last.outputs[0].snapshot), llm.engine.identity)
    command = [sys.executable, "-c", CONTINUE, str(model_dir), str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [int(token) for token in printed.split()] == reference[0][12:]


def test_forks_of_a_state_do_not_disturb_each_other(model_dir, prompt_tokens, tmp_path):
    llm = LLM(model_dir, max_num_seqs=4, prefix_cache_bytes=0)
    llm.engine.add_request("r", prompt_tokens[0], GREEDY, Extras(prefill_only=True, snapshot=True))
    (output,) = drain(llm.engine)["r"]
    path = tmp_path / "state.safetensors"
    write_state(path, StoredState(prompt_tokens[0], output.outputs[0].snapshot), llm.engine.identity)
    state = read_state(path, llm.engine.identity)
    for index, more in enumerate(prompt_tokens):
        llm.engine.add_request(str(index), state.tokens + more, GREEDY, Extras(resume=state.snapshot))
    forks = drain(llm.engine)
    expected = generate(model_dir, [prompt_tokens[0] + more for more in prompt_tokens], 24)
    assert [sum((new.outputs[0].token_ids for new in forks[str(i)]), []) for i in range(4)] == expected
    assert {forks[str(i)][0].num_cached_tokens for i in range(4)} == {len(prompt_tokens[0])}
