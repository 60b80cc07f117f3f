"""`spikingbrain chat`: turns in a terminal that go on from the state of the last one."""

import io

import pytest

from spikingbrain_serving import LLM, SamplingParams
from spikingbrain_serving.commands.chat import talk
from spikingbrain_serving.conversation import Conversation

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def llm(model_dir):
    return LLM(model_dir, max_model_len=2000, prefix_cache_bytes=0)


def said(llm, *lines: str) -> list[str]:
    out = io.StringIO()
    talk(Conversation(llm.engine, GREEDY, "be brief"), io.StringIO("\n".join([*lines, ""])), out)
    return out.getvalue().split("> ")


def test_an_answer_is_that_of_chat(llm):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "does it rain?"}]
    (expected,) = llm.chat(messages, GREEDY)
    assert said(llm, "does it rain?")[1] == expected.outputs[0].text + "\n"


def test_the_second_turn_does_not_read_the_first_again(llm):
    before = llm.engine.stats.prompt_tokens
    conversation = Conversation(llm.engine, GREEDY)
    "".join(conversation.ask("a" * 300))
    first = conversation.num_tokens
    request = []
    add = llm.engine.add_request
    llm.engine.add_request = lambda *args: (request.append(args), add(*args))
    "".join(conversation.ask("b"))
    llm.engine.add_request = add
    assert request[0][3].resume.num_tokens == first - 1
    assert llm.engine.stats.prompt_tokens > before


def test_a_conversation_is_saved_and_restored(llm, tmp_path):
    file = tmp_path / "talk.safetensors"
    through = said(llm, "one", "two", "three")
    said(llm, "one", "two", f"/save {file}")
    again = said(llm, f"/restore {file}", "three", "/new", "one", "/quit")
    assert again[1].startswith("restored after ")
    assert again[2] == through[3]
    assert again[4] == through[1]


def test_what_is_wrong_is_said_and_the_conversation_goes_on(llm, tmp_path):
    lines = said(llm, "/save x", "/restore " + str(tmp_path / "none"), "/what", "", "does it rain?")
    assert lines[1] == "error: nothing was said yet\n"
    assert lines[2] == "error: none does not exist\n"
    assert lines[3].startswith("commands:")
    assert len(lines) == 7
