"""What the HTTP interface can do beyond plain completions: sessions, responses, forms, tools, limits, metrics."""

import base64
import json
import logging
import socket
import threading
import time
import urllib.request

import openai
import pytest

from spikingbrain_serving.http.middleware import JsonFormatter
from spikingbrain_serving.http.settings import HttpSettings

from .conftest import PROMPTS, generate, save_model
from .harness import require_error, serving

GREEDY = {"temperature": 0, "max_tokens": 24}
CHAT = [{"role": "user", "content": "does it rain?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Graz", "Wien"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def spiking_model_dir(tmp_path_factory, tokenizer):
    return save_model(tmp_path_factory.mktemp("models") / "tiny", tokenizer, spiking={"neuron": "adaptive"})


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    return tmp_path_factory.mktemp("sessions")


@pytest.fixture(scope="module")
def served(spiking_model_dir, sessions):
    with serving(spiking_model_dir, HttpSettings(session_dir=sessions), max_num_seqs=4, max_model_len=5000) as server:
        yield server


def post(served, path: str, body: dict) -> dict:
    status, text = served.ask(path, body)
    assert status == 200, text
    return json.loads(text)


class TestResponses:
    def test_a_conversation_goes_on_from_the_kept_state(self, served):
        first = served.client.responses.create(model="tiny", input="does it rain?", max_output_tokens=12)
        assert (first.object, first.status, first.incomplete_details.reason) == (
            "response",
            "incomplete",
            "max_output_tokens",
        )
        assert first.usage.input_tokens_details.cached_tokens == 0
        second = served.client.responses.create(
            model="tiny", input="and now?", previous_response_id=first.id, max_output_tokens=5
        )
        known = first.usage.total_tokens - 1
        assert second.usage.input_tokens_details.cached_tokens == known
        assert second.usage.input_tokens > known
        assert served.client.responses.retrieve(second.id).output_text == second.output_text
        served.client.responses.delete(second.id)
        with pytest.raises(openai.NotFoundError):
            served.client.responses.retrieve(second.id)

    def test_the_next_turn_says_what_the_whole_conversation_would(self, served, tokenizer, spiking_model_dir, sessions):
        from safetensors import safe_open

        first = served.client.responses.create(model="tiny", input="a", temperature=0, max_output_tokens=9)
        second = served.client.responses.create(
            model="tiny", input="b", temperature=0, max_output_tokens=9, previous_response_id=first.id
        )
        with safe_open(sessions / f"{second.id}.safetensors", framework="pt") as file:
            tokens = file.get_tensor("tokens").tolist()
        (expected,) = generate(spiking_model_dir, [tokens[:-9]], 9)
        assert tokens[-9:] == expected
        assert tokenizer.decode(tokens).count("<|im_start|>user") == 2

    def test_a_stream_adds_up_to_the_whole(self, served):
        settings = {"model": "tiny", "input": "does it rain?", "temperature": 0, "max_output_tokens": 12}
        whole = served.client.responses.create(**settings)
        events = list(served.client.responses.create(**settings, stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert (events[0].type, events[-1].type) == ("response.created", "response.incomplete")
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(deltas) == whole.output_text == events[-1].response.output_text

    def test_what_is_not_to_be_stored_is_not(self, served):
        answer = served.client.responses.create(model="tiny", input="a", max_output_tokens=2, store=False)
        with pytest.raises(openai.NotFoundError):
            served.client.responses.create(model="tiny", input="b", previous_response_id=answer.id)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("input", ""),
            ("input", []),
            ("input", [{"role": "user", "content": [{"type": "input_image"}]}]),
            ("max_output_tokens", 0),
            ("previous_response_id", "../../etc/passwd"),
            ("tools", [{"type": "web_search"}]),
            ("text", {"format": {"type": "json_schema"}}),
        ],
    )
    def test_a_wrong_field_is_refused_by_name(self, served, field, value):
        require_error(served.ask("/v1/responses", {"input": "a", field: value}), 400, param=field)


class TestSessions:
    def test_a_session_is_saved_restored_forked_and_deleted(self, served, tokenizer):
        prompt = "the state does not grow " * 20
        saved = post(served, "/v1/sessions", {"id": "mine", "prompt": prompt})
        assert saved["num_tokens"] > 60
        fork = post(served, "/v1/sessions/mine/fork", {"id": "yours"})
        assert fork["parent"] == "mine"
        listed = json.loads(served.ask("/v1/sessions")[1])["data"]
        assert {"mine", "yours"} <= {session["id"] for session in listed}
        tokens = tokenizer.encode(prompt) + tokenizer.encode(PROMPTS[0])
        whole = served.client.completions.create(model="tiny", prompt=tokens, **GREEDY)
        for name in ("mine", "yours"):
            body = {"prompt": PROMPTS[0], "session": name, **GREEDY}
            answer = post(served, "/v1/completions", body)
            assert answer["choices"][0]["text"] == whole.choices[0].text
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= saved["num_tokens"]
            assert served.ask(f"/v1/sessions/{name}", method="DELETE")[0] == 200
            require_error(served.ask(f"/v1/sessions/{name}"), 404, param="id")

    def test_a_session_survives_the_server_bit_for_bit(self, spiking_model_dir, tmp_path):
        from safetensors.torch import load_file

        settings, prompt = HttpSettings(session_dir=tmp_path), "it rains " * 30
        body = {"prompt": prompt, **GREEDY}
        with serving(spiking_model_dir, settings) as first:
            post(first, "/v1/sessions", {"id": "kept", "prompt": prompt})
            before = post(first, "/v1/completions", body)
        with serving(spiking_model_dir, settings) as second:
            restored = post(second, "/v1/sessions/kept/restore", {})
            answer = post(second, "/v1/completions", body)
            post(second, "/v1/sessions", {"id": "again", "prompt": prompt})
        assert answer["choices"] == before["choices"]
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == restored["num_tokens"]
        kept, again = (load_file(tmp_path / f"{name}.safetensors") for name in ("kept", "again"))
        assert all((kept[name] == again[name]).all() for name in kept)

    def test_damage_and_other_models_are_conflicts(self, served, sessions, model_dir):
        post(served, "/v1/sessions", {"id": "broken", "prompt": "a"})
        file = sessions / "broken.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        require_error(served.ask("/v1/sessions/broken/restore", {}), 409, param="id", message="damaged")
        file.write_bytes(content)
        with serving(model_dir, HttpSettings(session_dir=sessions)) as other:
            require_error(other.ask("/v1/sessions/broken/restore", {}), 409, param="id", message="another model")

    @pytest.mark.parametrize("name", ["..%2f..%2fetc%2fpasswd", "%2e%2e", "a%00b", "x" * 200])
    def test_paths_are_no_names(self, served, name):
        for method, path in (("GET", name), ("DELETE", name), ("POST", f"{name}/fork"), ("POST", f"{name}/restore")):
            status, _ = served.ask(f"/v1/sessions/{path}", {} if method == "POST" else None, method=method)
            assert status in (400, 404, 405)


class TestForms:
    @pytest.mark.parametrize("seed", range(3))
    def test_a_schema_is_kept(self, served, seed):
        schema = {
            "type": "object",
            "properties": {"city": {"enum": ["Graz", "Wien"]}, "warm": {"type": "boolean"}},
            "required": ["city", "warm"],
            "additionalProperties": False,
        }
        form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema, "strict": True}}
        answer = served.client.chat.completions.create(
            model="tiny", messages=CHAT, response_format=form, seed=seed, max_tokens=200
        )
        value = json.loads(answer.choices[0].message.content)
        assert value["city"] in ("Graz", "Wien")
        assert isinstance(value["warm"], bool)
        assert answer.choices[0].finish_reason == "stop"

    def test_a_choice_and_an_expression_are_kept(self, served):
        for form, valid in (({"choice": ["yes", "no"]}, {"yes", "no"}), ({"regex": "[ab]{3}"}, None)):
            for seed in range(4):
                answer = served.client.completions.create(
                    model="tiny", prompt="a", seed=seed, max_tokens=20, extra_body={"structured_outputs": form}
                )
                text = answer.choices[0].text
                assert text in valid if valid else (len(text) == 3 and set(text) <= {"a", "b"})

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
    def test_a_tool_that_must_be_called_is_called(self, served, stream, choice):
        settings = {"model": "tiny", "messages": CHAT, "tools": [WEATHER], "tool_choice": choice, "max_tokens": 200}
        if stream:
            chunks = [chunk.choices[0] for chunk in served.client.chat.completions.create(**settings, stream=True)]
            (call,) = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
            reason = chunks[-1].finish_reason
        else:
            (answer,) = served.client.chat.completions.create(**settings).choices
            (call,), reason = answer.message.tool_calls, answer.finish_reason
        assert (call.function.name, reason) == ("weather", "tool_calls")
        assert json.loads(call.function.arguments)["city"] in ("Graz", "Wien")

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("choice", ["auto", "none", None])
    def test_a_tool_that_may_be_called_is_seen_in_the_text_unless_there_is_none(self, served, stream, choice):
        text = '<tool_call>{"name": "weather", "arguments": {"city": "Graz"}}</tool_call>'
        body = {"messages": CHAT, "tools": [WEATHER], "max_tokens": 200, "structured_outputs": {"choice": [text]}}
        body |= {"tool_choice": choice} if choice else {}
        if stream:
            chunks = [event["choices"][0] for event in served.events("/v1/chat/completions", body)]
            content = "".join(chunk["delta"].get("content") or "" for chunk in chunks)
            calls = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", ())]
            reason = chunks[-1]["finish_reason"]
        else:
            (answer,) = post(served, "/v1/chat/completions", body)["choices"]
            content, calls = answer["message"].get("content") or "", answer["message"].get("tool_calls", [])
            reason = answer["finish_reason"]
        if choice == "none":
            assert (content, calls, reason) == (text, [], "stop")
        else:
            (call,) = calls
            assert (content, call["function"]["name"], reason) == ("", "weather", "tool_calls")
            assert json.loads(call["function"]["arguments"]) == {"city": "Graz"}

    def test_a_tool_choice_without_such_a_tool_is_refused(self, served):
        named = {"type": "function", "function": {"name": "news"}}
        for body in ({"tools": [WEATHER], "tool_choice": named}, {"tool_choice": "required"}):
            require_error(served.ask("/v1/chat/completions", {"messages": CHAT, **body}), 400, param="tool_choice")


def test_several_choices_come_apart_and_stream_apart(served):
    settings = {"model": "tiny", "prompt": PROMPTS[:2], "n": 3, "seed": 5, "max_tokens": 8}
    whole = [choice.text for choice in served.client.completions.create(**settings).choices]
    texts = [""] * 6
    for chunk in served.client.completions.create(**settings, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == whole
    assert len(set(whole)) > 3


def test_a_bias_and_stop_tokens_do_what_they_say(served, tokenizer):
    (token,) = tokenizer.encode("x")
    always = {"model": "tiny", "prompt": "a", "logit_bias": {str(token): 100}, "max_tokens": 4}
    assert served.client.completions.create(**always).choices[0].text == "xxxx"
    stopped = served.client.completions.create(**always, extra_body={"stop_token_ids": [token]}).choices[0]
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("", "stop", token)


def test_spikes_come_with_the_tokens_that_asked_for_them(served):
    answer = post(served, "/v1/completions", {"prompt": "a", **GREEDY, "return_spikes": True})
    spikes = answer["choices"][0]["spikes"]
    # The first token comes from the prompt, each of the others from a step of decoding.
    assert len(spikes) == 23
    assert max(len(counts) for column in spikes for counts in column.values()) == 48
    assert any(count for column in spikes for counts in column.values() for count in counts)


def test_texts_become_tokens_and_tokens_texts(served, tokenizer):
    answer = post(served, "/tokenize", {"prompt": PROMPTS[2]})
    assert answer["tokens"] == tokenizer.encode(PROMPTS[2])
    assert post(served, "/detokenize", {"tokens": answer["tokens"]}) == {"prompt": PROMPTS[2]}
    assert post(served, "/tokenize", {"messages": CHAT})["count"] > 5
    require_error(served.ask("/detokenize", {"tokens": [10**6]}), 400, param="tokens")
    require_error(served.ask("/tokenize", {}), 400, param="prompt")


def test_metrics_count_what_happened_and_why_a_prefix_missed(served):
    def value(line: str) -> float:
        found = [entry for entry in served.ask("/metrics")[1].splitlines() if entry.startswith(line)]
        return float(found[0].rpartition(" ")[2]) if found else 0.0

    names = {
        "vllm:prompt_tokens_total": 3,
        "vllm:generation_tokens_total": 5,
        "vllm:time_to_first_token_seconds_count": 1,
        "vllm:e2e_request_latency_seconds_count": 1,
        'vllm:request_success_total{finished_reason="length"': 1,
        'spikingbrain:prefix_cache_misses_total{model_name="tiny",reason="new_tokens"': 1,
    }
    before = {name: value(name) for name in names}
    post(served, "/v1/completions", {"prompt": [300, 301, 302], "max_tokens": 5, "ignore_eos": True})
    assert {name: value(name) - before[name] for name in names} == names
    assert value("vllm:num_requests_running") == 0


def test_the_request_id_comes_back_and_the_log_has_no_prompt(served, caplog):
    def line_of(record: logging.LogRecord) -> dict:
        return json.loads(JsonFormatter().format(record))

    with caplog.at_level(logging.INFO, "spikingbrain_serving.access"):
        body = json.dumps({"prompt": "a secret of mine", "max_tokens": 3, "ignore_eos": True}).encode()
        headers = {"Content-Type": "application/json", "X-Request-Id": "my-id.7"}
        with urllib.request.urlopen(urllib.request.Request(f"{served.url}/v1/completions", body, headers)) as answer:
            assert answer.headers["X-Request-Id"] == "my-id.7"
            answer.read()
        # A line is written after its answer: that of the request before may come in between.
        while not (lines := [line for line in map(line_of, caplog.records) if line["request_id"] == "my-id.7"]):
            time.sleep(0.01)
    assert [(line["status"], line["completion_tokens"]) for line in lines] == [(200, 3)]
    assert "secret" not in json.dumps(lines)


def test_other_origins_get_nothing_unless_allowed(served, spiking_model_dir):
    def allowed(server) -> str | None:
        request = urllib.request.Request(f"{server.url}/health", headers={"Origin": "https://example.org"})
        with urllib.request.urlopen(request) as answer:
            return answer.headers["Access-Control-Allow-Origin"]

    assert allowed(served) is None
    with serving(spiking_model_dir, HttpSettings(allowed_origins=("https://example.org",))) as server:
        assert allowed(server) == "https://example.org"


def test_a_form_of_another_page_cannot_post(served):
    raw = json.dumps({"prompt": "a"}).encode()
    assert served.ask("/v1/completions", raw=raw, **{"Content-Type": "text/plain"})[0] == 400


@pytest.fixture(scope="module")
def small(model_dir):
    settings = HttpSettings(api_keys=("first", "second"), max_body_bytes=5000, max_prompts=3, request_timeout=0.5)
    limits = {"max_num_seqs": 1, "max_num_waiting": 1, "max_model_len": 200_000}
    with serving(model_dir, settings, **limits) as server:
        yield server


class TestLimits:
    def test_every_route_but_health_needs_a_key(self, small):
        for path in ("/", "/v1/models", "/metrics", "/version", "/openapi.json", "/docs", "/v1/sessions", "/none"):
            assert small.ask(path)[0] == 401
            assert small.ask(path, Authorization="Bearer third")[0] == 401
            assert small.ask(path, Authorization="Bearer second")[0] in (200, 404)
        assert small.ask("/health")[0] == 200
        basic = base64.b64encode(b"anyone:first").decode()
        assert small.ask("/v1/models", Authorization=f"Basic {basic}")[0] == 200
        for broken in ("Basic !!", "Basic", "Bearer", "Bearer ", "first"):
            assert small.ask("/v1/models", Authorization=broken)[0] == 401

    def test_a_large_body_is_refused_before_it_is_read(self, small):
        key = {"Authorization": "Bearer first"}
        assert small.ask("/v1/completions", {"prompt": "a" * 6000}, **key)[0] == 413
        lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Authorization: Bearer first", "Content-Length: 100000000"]
        head = "\r\n".join([*lines, "", ""])
        with socket.create_connection(("127.0.0.1", small.port), timeout=5) as connection:
            connection.sendall(head.encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 413")

    def test_many_prompts_are_refused(self, small):
        answer = small.ask("/v1/completions", {"prompt": ["a"] * 4}, Authorization="Bearer first")
        require_error(answer, 400, param="prompt", message="more than 3 prompts")

    def test_one_too_many_is_told_when_to_come_back(self, small):
        client = small.client.with_options(api_key="first")
        endless = {"model": "tiny", "prompt": "a", "max_tokens": 100_000, "extra_body": {"ignore_eos": True}}
        streams = [client.completions.create(**endless, stream=True) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**endless)
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        for stream in streams:
            stream.close()
        small.wait_until_idle()

    def test_what_takes_too_long_ends(self, small):
        client = small.client.with_options(api_key="first")
        endless = {"model": "tiny", "prompt": "a", "max_tokens": 100_000, "extra_body": {"ignore_eos": True}}
        with pytest.raises(openai.InternalServerError, match=r"longer than 0\.5 s"):
            client.completions.create(**endless)
        with pytest.raises(openai.APIError, match=r"longer than 0\.5 s"):
            list(client.completions.create(**endless, stream=True))
        small.wait_until_idle()


def test_a_slow_reader_does_not_hold_up_the_others(served):
    body = json.dumps({"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": True, "logprobs": 5}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.connect(("127.0.0.1", served.port))
        slow.sendall(head.encode() + b"\r\n\r\n" + body)
        while not served.engine.request_ids:
            time.sleep(0.005)
        done: list[str] = []
        threads = [
            threading.Thread(
                target=lambda: done.append(
                    served.client.completions.create(model="tiny", prompt="b", **GREEDY).choices[0].text
                )
            )
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(done) == 4
    served.wait_until_idle()
