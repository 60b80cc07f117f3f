"""The engine gives the tokens of `generate`, whatever runs beside a request, and gives its memory back."""

import pytest
import torch

from spikingbrain.errors import InputError
from spikingbrain_serving import LLM, InvalidRequest, RequestFailed, SamplingParams

from .conftest import PROMPTS, generate

GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module", params=[5, 512])
def llm(request, model_dir):
    return LLM(model_dir, max_num_seqs=3, max_num_batched_tokens=request.param)


@pytest.fixture
def engine(llm):
    assert llm.engine.pool.num_free == 3
    yield llm.engine
    assert not llm.engine.request_ids
    assert llm.engine.pool.num_free == 3


def tokens_of(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def text_of(outputs) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def drain(engine) -> dict[str, list]:
    """Step until nothing is left: the outputs of every request in order."""
    outputs: dict[str, list] = {}
    while engine.has_work:
        for new in engine.step():
            outputs.setdefault(new.request_id, []).append(new)
    return outputs


def test_each_prompt_alone_gives_the_tokens_of_generate(llm, reference):
    assert [tokens_of(llm.generate(prompt, GREEDY))[0] for prompt in PROMPTS] == reference


def test_more_prompts_together_than_slots_give_the_tokens_of_generate(llm, reference):
    assert tokens_of(llm.generate(PROMPTS * 2, GREEDY)) == reference * 2


def test_prompts_as_tokens_and_as_text_are_the_same(llm, prompt_tokens, reference):
    assert tokens_of(llm.generate(prompt_tokens, GREEDY)) == reference
    assert tokens_of(llm.generate(prompt_tokens[0], GREEDY)) == reference[:1]


def test_a_model_with_softmax_gives_the_tokens_of_generate(softmax_model_dir, prompt_tokens):
    llm = LLM(softmax_model_dir, max_num_seqs=2, max_num_batched_tokens=7, max_model_len=64)
    outputs = llm.generate(PROMPTS, GREEDY)
    assert tokens_of(outputs) == generate(softmax_model_dir, prompt_tokens, 24)


def test_state_bytes_grow_with_softmax_and_only_with_it(llm, softmax_model_dir):
    softmax = LLM(softmax_model_dir, max_num_seqs=1)
    short, long = PROMPTS[1], PROMPTS[0]
    grown = [softmax.generate(prompt, GREEDY)[0].state_bytes for prompt in (short, long)]
    # 4 layers of keys and values of 2 heads of 16 numbers; the last token is never computed.
    assert grown == [4 * 2 * 2 * 16 * 4 * (length + 23) for length in (1, 26)]
    constant = {llm.generate(prompt, GREEDY)[0].state_bytes for prompt in (short, long)}
    assert constant == {llm.engine.pool.bytes_per_sequence}


def test_outputs_of_steps_add_up_to_the_whole(llm, engine, prompt_tokens):
    engine.add_request("r", prompt_tokens[2], GREEDY)
    pieces = [output.outputs[0] for output in drain(engine)["r"]]
    (whole,) = llm.generate(PROMPTS[2], GREEDY)
    assert "".join(piece.text for piece in pieces) == whole.outputs[0].text
    assert sum((piece.token_ids for piece in pieces), []) == whole.outputs[0].token_ids
    assert whole.outputs[0].text == engine.tokenizer.decode(whole.outputs[0].token_ids, skip_special_tokens=True)


def test_an_abort_frees_the_slot_at_once_and_leaves_the_others_alone(engine, prompt_tokens, reference):
    for index, prompt in enumerate(prompt_tokens):
        engine.add_request(str(index), prompt, GREEDY)
    for _ in range(8):
        engine.step()
    free = engine.pool.num_free
    (aborted,) = engine.abort("0")
    assert engine.pool.num_free == free + 1
    assert aborted.outputs[0].finish_reason == "abort"
    assert engine.abort("0") == []
    rest = drain(engine)
    assert "0" not in rest
    assert sum((output.outputs[0].token_ids for output in rest["3"]), []) == reference[3]


def test_a_request_that_waits_can_be_aborted(engine, prompt_tokens):
    for index in range(5):
        engine.add_request(str(index), prompt_tokens[0], GREEDY)
    engine.step()
    engine.abort("4")
    assert set(drain(engine)) == {"0", "1", "2", "3"}


def test_the_prompt_of_one_does_not_stop_the_output_of_another(model_dir):
    engine = LLM(model_dir, max_num_seqs=2, max_num_batched_tokens=5).engine
    engine.add_request("talks", [5], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    engine.step()
    engine.add_request("reads", [5] * 50, GREEDY)
    talked = [[output.request_id for output in engine.step()] for _ in range(9)]
    assert talked == [["talks"]] * 9
    assert "reads" in {output.request_id for output in engine.step()}


def test_a_short_prompt_does_not_wait_for_the_whole_of_a_long_one(model_dir):
    engine = LLM(model_dir, max_num_seqs=2, max_num_batched_tokens=5).engine
    engine.add_request("long", [5] * 100, GREEDY)
    engine.add_request("short", [5] * 3, GREEDY)
    engine.step()
    assert [output.request_id for output in engine.step()] == ["short"]


@pytest.mark.parametrize("length", [2, 3, 5])
def test_a_stop_string_across_tokens_ends_the_text_before_it(llm, reference, length):
    pieces = [llm.get_tokenizer().decode([token]) for token in reference[3]]
    start = 5
    stop = "".join(pieces[start : start + length])
    assert stop not in pieces
    (whole,), (cut,) = (
        llm.generate(PROMPTS[3], SamplingParams(temperature=0, max_tokens=24, stop=stops))
        for stops in ([], [stop, "zzz"])
    )
    assert cut.outputs[0].text == whole.outputs[0].text.partition(stop)[0]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", stop)
    assert len(cut.outputs[0].token_ids) <= start + length


def test_the_beginning_of_a_stop_string_is_held_back_and_given_out_in_the_end(engine, llm, prompt_tokens):
    (whole,) = llm.generate(PROMPTS[3], GREEDY)
    text = whole.outputs[0].text
    engine.add_request("r", prompt_tokens[3], SamplingParams(temperature=0, max_tokens=24, stop=text[-3:] + "never"))
    outputs = [output.outputs[0] for output in drain(engine)["r"]]
    assert "".join(output.text for output in outputs) == text
    assert outputs[-1].text.endswith(text[-3:])
    assert outputs[-1].finish_reason == "length"


def test_an_end_token_ends_the_output_unless_it_is_ignored_or_too_early(model_dir, reference):
    llm = LLM(model_dir)
    end = reference[0][4]
    llm.engine.eos_token_ids = frozenset({end})
    stopped, ignored = (
        llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=24, ignore_eos=ignore))[0].outputs[0]
        for ignore in (False, True)
    )
    assert (stopped.token_ids, stopped.finish_reason) == (reference[0][:5], "stop")
    assert (ignored.token_ids, ignored.finish_reason) == (reference[0], "length")
    (late,) = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=24, min_tokens=10))
    assert end not in late.outputs[0].token_ids[:10]


def test_the_end_of_a_turn_ends_an_output_of_a_chat_model(llm):
    ends = llm.get_tokenizer().convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert llm.engine.eos_token_ids == frozenset(ends)


def test_a_seed_decides_the_output_alone_or_in_company(llm):
    params = SamplingParams(max_tokens=12, seed=7)
    (alone,) = llm.generate(PROMPTS[0], params)
    together = llm.generate([*PROMPTS, PROMPTS[0]], [SamplingParams(max_tokens=5)] * 4 + [params])
    (other,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=12, seed=8))
    assert tokens_of([alone]) == tokens_of(together[4:])
    assert tokens_of([alone]) != tokens_of([other])


def test_requests_without_a_seed_follow_the_engine_seed(model_dir):
    runs = [tokens_of(LLM(model_dir, seed=seed).generate(PROMPTS, SamplingParams())) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_logprobs_are_those_of_the_model(llm, prompt_tokens, reference):
    (output,) = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=24, logprobs=2))
    with torch.inference_mode():
        logits = llm.engine.model(torch.tensor([prompt_tokens[0] + reference[0]])).logits[0]
    expected = logits.log_softmax(-1)[len(prompt_tokens[0]) - 1 :]
    for token, entries, row in zip(reference[0], output.outputs[0].logprobs, expected, strict=False):
        assert set(entries) == set(row.topk(2).indices.tolist())
        assert entries[token].rank == 1
        assert entries[token].logprob == pytest.approx(float(row[token]), abs=1e-3)


def test_a_failing_request_fails_alone(engine, prompt_tokens, reference, monkeypatch):
    compute = engine._runner.decode

    def failing(sequences):
        # Half of the batch's states are updated before the failure: all of them have to be computed again.
        if any(sequence.request_id == "bad" and sequence.output_token_ids for sequence in sequences):
            first = next(iter(engine.pool.states(torch.tensor([0]))[0].values()))
            first.pool[[sequence.slot for sequence in sequences]] = 7
            raise RuntimeError("made to fail")
        return compute(sequences)

    monkeypatch.setattr(engine._runner, "decode", failing)
    for name, prompt in (("good", 0), ("bad", 2), ("fine", 3)):
        engine.add_request(name, prompt_tokens[prompt], GREEDY)
    outputs = drain(engine)
    failed = outputs["bad"][-1].outputs[0]
    assert (failed.finish_reason, failed.error) == ("error", "RuntimeError: made to fail")
    for name, prompt in (("good", 0), ("fine", 3)):
        assert sum((output.outputs[0].token_ids for output in outputs[name]), []) == reference[prompt]


def test_llm_raises_when_a_request_fails_and_can_go_on(llm, engine, reference, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "logits", lambda rows: torch.full((len(rows), 8), torch.nan))
        with pytest.raises(RequestFailed, match="nan"):
            llm.generate(PROMPTS, GREEDY)
    assert tokens_of(llm.generate(PROMPTS[0], GREEDY)) == reference[:1]


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([5] * 300, {}, "300 prompt tokens and 16 to generate are 316 tokens; this model serves at most 256"),
        ([5] * 250, {"max_tokens": 7}, "257 tokens; this model serves at most 256"),
        ([5] * 256, {"max_tokens": None}, "at most 256"),
        ([5, 9999], {}, "token 9999 is not one of the"),
        ([-1], {}, "token -1"),
        ("", {}, "empty"),
        ("\ud800", {}, "not valid Unicode"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_before_anything_runs(llm, engine, prompt, settings, message):
    with pytest.raises(InvalidRequest, match=message):
        llm.generate([PROMPTS[0], prompt], SamplingParams(**settings))
    assert not engine.has_work


def test_without_a_limit_the_output_fills_the_model_length(llm):
    (output,) = llm.generate([[5] * 250], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (6, "length")


def test_a_model_of_constant_memory_serves_more_tokens_than_it_has_positions(model_dir):
    llm = LLM(model_dir, max_num_seqs=1, max_model_len=2000)
    (output,) = llm.generate([[5] * 1000], GREEDY)
    assert output.state_bytes == LLM(model_dir, max_num_seqs=1).engine.pool.bytes_per_sequence


def test_chat_goes_through_the_template(llm, tokenizer):
    messages = [{"role": "user", "content": "does it rain?"}]
    (output,) = llm.chat(messages, GREEDY)
    text = "<|im_start|>user\ndoes it rain?<|im_end|>\n<|im_start|>assistant\n"
    assert output.prompt_token_ids == tokenizer.encode(text)
    parts = [{"role": "user", "content": [{"type": "text", "text": "does it "}, {"type": "text", "text": "rain?"}]}]
    assert tokens_of(llm.chat([messages, parts], GREEDY)) == tokens_of([output]) * 2


@pytest.mark.parametrize(
    "messages",
    [[], [{"role": "forbidden", "content": "x"}], [{"role": "user", "content": [{"type": "image_url"}]}]],
)
def test_a_conversation_that_cannot_be_rendered_is_refused(llm, messages):
    with pytest.raises(InvalidRequest):
        llm.chat([messages], GREEDY)


@pytest.mark.parametrize("name", ["max_num_seqs", "max_model_len", "max_num_batched_tokens"])
def test_an_engine_setting_below_one_is_refused(model_dir, name):
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        LLM(model_dir, **{name: 0})


def test_more_memory_than_there_is_is_refused(softmax_model_dir):
    with pytest.raises(InputError, match="lower max_num_seqs or max_model_len"):
        LLM(softmax_model_dir, max_num_seqs=10**6, max_model_len=10**9)


def test_a_directory_without_a_model_or_tokenizer_is_refused(tmp_path, model_dir):
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        LLM(tmp_path)
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    with pytest.raises(InputError, match="no tokenizer"):
        LLM(tmp_path)


def test_another_architecture_is_refused_with_the_command_that_helps(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(InputError, match="spikingbrain convert"):
        LLM(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("dtype", "int3"), ("device", "abacus")])
def test_an_unknown_dtype_or_device_is_refused_with_the_choices(model_dir, name, value):
    with pytest.raises(InputError, match=f"unknown {name} '{value}'; choose from auto"):
        LLM(model_dir, **{name: value})


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_missing_or_truncated_weights_are_refused(tmp_path, model_dir, damage):
    for file in model_dir.iterdir():
        content = file.read_bytes()
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(content)
        elif damage == "truncated":
            (tmp_path / file.name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError):
        LLM(tmp_path)
