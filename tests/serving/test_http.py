"""The HTTP server as clients see it: a real uvicorn on loopback, asked by the `openai` client and by urllib."""

import json
import socket
import threading
import time

import openai
import pytest

from .conftest import PROMPTS
from .harness import require_error, serving

GREEDY = {"temperature": 0, "max_tokens": 24}
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "does it rain?"}]


@pytest.fixture(scope="module")
def served(model_dir):
    with serving(model_dir, max_num_seqs=4, max_model_len=20_000) as server:
        yield server


@pytest.fixture(autouse=True)
def _well_afterwards(served):
    """Whatever a test does, the server still answers and holds nothing."""
    yield
    served.wait_until_idle()
    assert served.ask("/health") == (200, '{"status":"ok"}')


def test_the_model_is_listed(served):
    (model,) = served.client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "spikingbrain")
    assert served.client.models.retrieve("tiny").created == model.created
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("other")


def test_version_and_documentation_answer(served):
    assert set(json.loads(served.ask("/version")[1])) == {"version"}
    assert {"/v1/completions", "/v1/chat/completions"} <= set(json.loads(served.ask("/openapi.json")[1])["paths"])


def test_a_completion_has_the_tokens_of_generate(served, prompt_tokens, reference):
    answer = served.client.completions.create(
        model="tiny", prompt=PROMPTS[0], **GREEDY, extra_body={"return_token_ids": True}
    )
    (choice,) = answer.choices
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    assert choice.token_ids == reference[0]
    assert choice.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt_tokens[0]), 24)
    assert answer.usage.total_tokens == len(prompt_tokens[0]) + 24
    assert answer.usage.state_bytes == served.engine.pool.bytes_per_sequence


@pytest.mark.parametrize("as_tokens", [False, True])
def test_several_prompts_give_choices_in_their_order(served, prompt_tokens, reference, as_tokens):
    answer = served.client.completions.create(
        model="tiny",
        prompt=prompt_tokens if as_tokens else PROMPTS,
        **GREEDY,
        extra_body={"return_token_ids": True},
    )
    assert [choice.token_ids for choice in answer.choices] == reference
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def test_a_prompt_may_be_tokens(served, prompt_tokens):
    texts = [
        served.client.completions.create(model="tiny", prompt=prompt, **GREEDY).choices[0].text
        for prompt in (prompt_tokens[2], PROMPTS[2])
    ]
    assert texts[0] == texts[1]


def test_streamed_completions_add_up_to_the_whole(served):
    whole = served.client.completions.create(model="tiny", prompt=PROMPTS, **GREEDY)
    texts, reasons = [""] * 4, [None] * 4
    for chunk in served.client.completions.create(model="tiny", prompt=PROMPTS, **GREEDY, stream=True):
        (choice,) = chunk.choices
        assert chunk.usage is None
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_a_chat_answer_goes_through_the_template(served, tokenizer):
    answer = served.client.chat.completions.create(model="tiny", messages=CHAT, temperature=0, max_completion_tokens=9)
    text = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\ndoes it rain?<|im_end|>\n<|im_start|>assistant\n"
    (choice,) = answer.choices
    assert (answer.object, choice.message.role, choice.finish_reason) == ("chat.completion", "assistant", "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(tokenizer.encode(text)), 9)
    raw = served.client.completions.create(model="tiny", prompt=text, temperature=0, max_tokens=9)
    assert choice.message.content == raw.choices[0].text


def test_a_streamed_chat_answer_adds_up_to_the_whole(served):
    whole = served.client.chat.completions.create(model="tiny", messages=CHAT, **GREEDY).choices[0]
    chunks = list(served.client.chat.completions.create(model="tiny", messages=CHAT, **GREEDY, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.role for chunk in chunks[1:]] == [None] * (len(chunks) - 1)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "length"]
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/completions", {"prompt": PROMPTS[0]}), ("/v1/chat/completions", {"messages": CHAT})],
)
class TestUsageInStreams:
    def test_it_is_absent_unless_asked_for(self, served, path, body):
        events = served.events(path, {**body, **GREEDY})
        assert all("usage" not in event and len(event["choices"]) == 1 for event in events)

    def test_it_comes_once_at_the_end_with_no_choices(self, served, path, body):
        *events, last = served.events(path, {**body, **GREEDY, "stream_options": {"include_usage": True}})
        assert all("usage" not in event for event in events)
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 24
        assert last["usage"]["state_bytes"] == served.engine.pool.bytes_per_sequence

    def test_it_comes_with_every_piece_on_demand(self, served, path, body):
        options = {"include_usage": True, "continuous_usage_stats": True}
        events = served.events(path, {**body, **GREEDY, "stream_options": options})
        counts = [event["usage"]["completion_tokens"] for event in events if event.get("usage")]
        assert counts == sorted(counts)
        assert counts[-2:] == [24, 24]


def test_stop_strings_end_a_stream_and_do_not_appear(served):
    text = served.client.completions.create(model="tiny", prompt=PROMPTS[3], **GREEDY).choices[0].text
    stop = text[6:10]
    stream = served.client.completions.create(model="tiny", prompt=PROMPTS[3], **GREEDY, stop=[stop], stream=True)
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == text.partition(stop)[0]
    assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == ("stop", stop)


def test_logprobs_of_completions_have_an_entry_a_token_whole_and_streamed(served):
    settings = {"model": "tiny", "prompt": PROMPTS[0], **GREEDY, "logprobs": 2}
    whole = served.client.completions.create(**settings).choices[0].logprobs
    assert len(whole.tokens) == len(whole.token_logprobs) == len(whole.top_logprobs) == 24
    assert all(value <= 0 for value in whole.token_logprobs)
    assert whole.text_offset == [len("".join(whole.tokens[:index])) for index in range(24)]
    pieces = [chunk.choices[0].logprobs for chunk in served.client.completions.create(**settings, stream=True)]
    assert sum((piece.tokens for piece in pieces if piece), []) == whole.tokens
    assert sum((piece.text_offset for piece in pieces if piece), []) == whole.text_offset


@pytest.mark.parametrize("num_top", [0, 3])
def test_logprobs_of_chat_list_as_many_as_asked_for(served, num_top):
    answer = served.client.chat.completions.create(
        model="tiny", messages=CHAT, temperature=0, max_tokens=5, logprobs=True, top_logprobs=num_top
    )
    entries = answer.choices[0].logprobs.content
    assert [len(entry.top_logprobs) for entry in entries] == [num_top] * 5
    assert all(entry.top_logprobs[0].token == entry.token for entry in entries if num_top)


def test_a_seed_repeats_an_answer(served):
    def text(seed: int) -> str:
        answer = served.client.completions.create(model="tiny", prompt="a", max_tokens=20, seed=seed)
        return answer.choices[0].text

    assert text(1) == text(1) != text(2)


def test_fields_of_other_servers_are_ignored(served):
    body = {"prompt": "a", "user": "me", "metadata": {"a": "b"}, "anything": [1], "echo": False, "functions": []}
    assert served.ask("/v1/completions", {**body, "presence_penalty": 0, "best_of": 1, "suffix": None})[0] == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 5),
        ("prompt", None),
        ("prompt", [1.5]),
        ("prompt", []),
        ("prompt", ""),
        ("prompt", [-1]),
        ("prompt", [10**30]),
        ("prompt", {"a": 1}),
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("max_tokens", 10**30),
        ("temperature", -0.5),
        ("temperature", float("nan")),
        ("temperature", 1e400),
        ("top_p", 0),
        ("top_k", -7),
        ("seed", 10**30),
        ("n", 0),
        ("stop", [""]),
        ("stop", 5),
        ("logprobs", -1),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("echo", True),
        ("suffix", "the end"),
        ("best_of", 3),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"five": 1}),
        ("logit_bias", {"99999": 1}),
        ("presence_penalty", 2.5),
        ("stop_token_ids", [-1]),
        ("structured_outputs", {"regex": "("}),
        ("structured_outputs", {}),
        ("model", 5),
    ],
)
def test_a_wrong_field_is_refused_by_name(served, field, value):
    require_error(served.ask("/v1/completions", {"prompt": "a", field: value}), 400, param=field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", "hello"),
        ("messages", [{"content": "no role"}]),
        ("messages", [{"role": "forbidden", "content": "x"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("top_logprobs", 3),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}),
    ],
)
def test_a_wrong_field_of_chat_is_refused_by_name(served, field, value):
    require_error(served.ask("/v1/chat/completions", {"messages": CHAT, field: value}), 400, param=field)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b'"text"',
        b"[]",
        b"null",
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"prompt": "a", "max_tokens": NaN}',
    ],
    ids=["empty", "cut", "string", "list", "null", "not utf-8", "lone surrogate", "deep", "nan"],
)
def test_a_body_that_is_no_request_is_refused(served, raw):
    for path in ("/v1/completions", "/v1/chat/completions"):
        status, text = served.ask(path, raw=raw)
        assert status == 400
        assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}


def test_an_unknown_model_or_path_is_not_found(served):
    body = {"model": "gpt-\ud800", "prompt": "a"}
    require_error(served.ask("/v1/completions", body), 404, param="model", message="this server has 'tiny'")
    require_error(served.ask("/v1/nothing"), 404)
    require_error(served.ask("/v1/completions"), 405)


def test_a_request_longer_than_the_model_is_refused_with_both_numbers(served):
    with pytest.raises(openai.BadRequestError, match="20016 tokens; this model serves at most 20000") as caught:
        served.client.completions.create(model="tiny", prompt=[5] * 20_000, max_tokens=16, stream=True)
    assert caught.value.code == "context_length_exceeded"


def test_a_failure_in_the_middle_of_a_stream_is_an_error_event(served, monkeypatch):
    decode = served.engine._runner.decode

    def failing(sequences):
        if len(sequences[0].output_token_ids) == 5:
            raise RuntimeError("made to fail")
        return decode(sequences)

    monkeypatch.setattr(served.engine._runner, "decode", failing)
    with pytest.raises(openai.APIError, match="made to fail"):
        list(served.client.completions.create(model="tiny", prompt="a", **GREEDY, stream=True))
    with pytest.raises(openai.InternalServerError, match="made to fail"):
        served.client.completions.create(model="tiny", prompt="a", **GREEDY)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slots(served, stream):
    body = {"prompt": [PROMPTS[0]] * 6, "max_tokens": 10_000, "ignore_eos": True, "stream": stream}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + data)
        while len(served.engine.request_ids) < 6:
            time.sleep(0.005)
    served.wait_until_idle()


def test_many_clients_at_once_get_their_own_answers(served, prompt_tokens, reference):
    answers: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        body = {"prompt": prompt_tokens[number % 4], **GREEDY, "return_token_ids": True}
        answers[number] = json.loads(served.ask("/v1/completions", body)[1])["choices"][0]["token_ids"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: reference[number % 4] for number in range(16)}
