"""The engine in its thread: streams, cancellation, and an end for everybody when it stops."""

import asyncio
import threading
import time
from contextlib import aclosing

import pytest

from spikingbrain_serving import LLM, AsyncLLM, EngineStopped, InvalidRequest, RequestFailed, SamplingParams

from .conftest import PROMPTS

GREEDY = SamplingParams(temperature=0, max_tokens=24)
ENDLESS = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


@pytest.fixture
def engine(model_dir):
    engine = AsyncLLM(LLM(model_dir, max_num_seqs=2).engine)
    engine.start()
    yield engine
    engine.stop()


async def tokens_of(engine, prompt, params=GREEDY, request_id="r") -> list[int]:
    return [token async for new in engine.generate(prompt, params, request_id) for token in new.outputs[0].token_ids]


async def until_free(engine, num: int) -> None:
    """Wait until so many slots are free."""
    deadline = time.monotonic() + 5
    while engine.engine.pool.num_free < num:
        assert time.monotonic() < deadline, "the slots were not freed"
        await asyncio.sleep(0.005)


def test_concurrent_streams_give_the_tokens_of_generate(engine, prompt_tokens, reference):
    async def all_of_them():
        return await asyncio.gather(*(tokens_of(engine, p, request_id=str(i)) for i, p in enumerate(prompt_tokens)))

    assert asyncio.run(all_of_them()) == reference


def test_several_prompts_of_one_request_come_with_their_index(engine, prompt_tokens, reference):
    async def collect():
        tokens = [[] for _ in PROMPTS]
        async for index, new in engine.generate_many(prompt_tokens, GREEDY, "r"):
            tokens[index] += new.outputs[0].token_ids
        return tokens

    assert asyncio.run(collect()) == reference


def test_leaving_a_stream_frees_its_slot(engine, prompt_tokens):
    async def leave():
        async with aclosing(engine.generate(prompt_tokens[0], ENDLESS, "r")) as outputs:
            async for _ in outputs:
                break
        await until_free(engine, 2)

    asyncio.run(leave())
    assert not engine.engine.request_ids


def test_cancelling_a_task_frees_its_slot_and_the_next_request_is_answered(engine, prompt_tokens, reference):
    async def cancel_many():
        tasks = [asyncio.create_task(tokens_of(engine, prompt_tokens[0], ENDLESS, str(i))) for i in range(20)]
        await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        return await tokens_of(engine, prompt_tokens[1])

    assert asyncio.run(cancel_many()) == reference[1]
    assert not engine.engine.request_ids


def test_abort_all_ends_streams_with_the_reason_abort(engine, prompt_tokens):
    async def aborted():
        reasons = []
        async for new in engine.generate(prompt_tokens[0], ENDLESS, "r"):
            engine.abort_all()
            reasons.append(new.outputs[0].finish_reason)
        return reasons

    assert asyncio.run(aborted())[-1] == "abort"


def test_a_request_that_does_not_fit_raises_in_its_own_task(engine):
    with pytest.raises(InvalidRequest, match="empty"):
        asyncio.run(tokens_of(engine, []))
    assert engine.is_alive


def test_a_failing_request_raises_and_the_next_is_answered(engine, prompt_tokens, reference, monkeypatch):
    def failing(_sequence, _num_tokens):
        raise RuntimeError("made to fail")

    with monkeypatch.context() as patch:
        patch.setattr(engine.engine._runner, "prefill", failing)
        with pytest.raises(RequestFailed, match="made to fail"):
            asyncio.run(tokens_of(engine, prompt_tokens[0]))
    assert asyncio.run(tokens_of(engine, prompt_tokens[0])) == reference[0]


def test_stopping_ends_running_streams_and_refuses_new_ones(model_dir, prompt_tokens):
    engine = AsyncLLM(LLM(model_dir).engine)
    engine.start()

    async def stopped():
        async for _ in engine.generate(prompt_tokens[0], ENDLESS, "r"):
            engine._commands.put(engine._request_stop)

    with pytest.raises(EngineStopped):
        asyncio.run(stopped())
    assert not engine.is_alive
    with pytest.raises(EngineStopped):
        asyncio.run(tokens_of(engine, prompt_tokens[0]))


def test_a_fault_of_the_engine_itself_leaves_nobody_waiting(model_dir, prompt_tokens, monkeypatch):
    engine = AsyncLLM(LLM(model_dir).engine)

    def broken():
        raise MemoryError("made to break")

    faults: list[type] = []
    monkeypatch.setattr(threading, "excepthook", lambda fault: faults.append(fault.exc_type))
    monkeypatch.setattr(engine.engine, "step", broken)
    engine.start()
    with pytest.raises(EngineStopped):
        asyncio.run(asyncio.wait_for(tokens_of(engine, prompt_tokens[0]), 5))
    assert not engine.is_alive
    engine.stop()
    assert faults == [MemoryError]
