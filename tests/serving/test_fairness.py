"""Tenants get equal shares of the slots, and nobody waits for the whole of somebody else's output."""

import pytest

from spikingbrain_serving import LLM, Extras, SamplingParams
from spikingbrain_serving.fairness import FairQueue

from .test_engine import drain

PARAMS = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


@pytest.fixture
def engine(model_dir):
    return LLM(model_dir, max_num_seqs=1, preempt_after=10, prefix_cache_bytes=0).engine


def drain_in_order(engine) -> list[list]:
    """What every step gave."""
    steps = []
    while engine.has_work:
        steps.append(engine.step())
    return steps


def queued(engine, *names: str) -> list:
    """Sequences whose tenant is the first letter of their name."""
    return [engine.prepare(name, [5], PARAMS, Extras(tenant=name[0]))[0] for name in names]


def test_the_tenant_that_was_served_least_comes_next(engine):
    queue = FairQueue()
    sequences = queued(engine, "a1", "a2", "a3", "b1", "b2")
    for sequence in sequences:
        queue.add(sequence)
    order = []
    while len(queue):
        sequence = queue.pop()
        queue.charge(sequence, 10)
        order.append(sequence.request_id)
    assert order == ["a1", "b1", "a2", "b2", "a3"]


def test_a_tenant_that_was_away_does_not_catch_up(engine):
    queue = FairQueue()
    first, second, newcomer, other = queued(engine, "a1", "a2", "b1", "b2")
    queue.add(first)
    queue.charge(first, 1000)
    for sequence in (second, newcomer, other):
        queue.add(sequence)
    order = []
    while len(queue):
        order.append(queue.pop())
        queue.charge(order[-1], 10)
    assert order == [first, newcomer, second, other]


def test_a_sequence_that_leaves_the_line_is_gone(engine):
    queue = FairQueue()
    first, second = queued(engine, "a1", "a2")
    queue.add(first)
    queue.add(second)
    queue.remove(first)
    queue.remove(first)
    assert queue.pop() is second
    assert len(queue) == 0


def test_one_request_of_another_does_not_wait_for_ten_of_mine(engine):
    for number in range(10):
        engine.add_request(f"mine {number}", [5], PARAMS, Extras(tenant="me"))
    engine.step()
    engine.add_request("yours", [6], PARAMS, Extras(tenant="you"))
    ends = [output.request_id for outputs in drain_in_order(engine) for output in outputs if output.finished]
    assert ends.index("yours") <= 1
    for name in ("mine 0", "yours"):
        engine.add_request(name, [5], PARAMS, Extras(tenant=name))
    order = [output.request_id for outputs in drain_in_order(engine) for output in outputs]
    # Ten tokens each in turn, whatever is left to do.
    turns = [order[index] for index in (0, 9, 10, 19, 20, 30)]
    assert turns == ["mine 0", "mine 0", "yours", "yours", "mine 0", "yours"]


def test_a_preempted_output_is_not_computed_again(engine):
    for name in ("a", "b", "c"):
        engine.add_request(name, [5] * 30, PARAMS)
    computed = 0
    prefill, decode = engine._runner.prefill, engine._runner.decode

    def counting_prefill(sequence, num_tokens):
        nonlocal computed
        computed += num_tokens
        prefill(sequence, num_tokens)

    def counting_decode(sequences):
        nonlocal computed
        computed += len(sequences)
        decode(sequences)

    engine._runner.prefill, engine._runner.decode = counting_prefill, counting_decode
    drain(engine)
    assert engine.stats.preemptions >= 6
    assert computed == 3 * (30 + 39)


def test_nothing_is_left_of_requests_that_ended(engine):
    for number in range(5):
        engine.add_request(str(number), [5], PARAMS, Extras(tenant=str(number)))
    for _ in range(25):
        engine.step()
    for number in range(5):
        engine.abort(str(number))
    assert (engine.num_running, engine.num_waiting, engine.pool.num_free) == (0, 0, 1)
    assert engine._scheduler._waiting._served == {}
    assert (engine._groups, engine._siblings) == ({}, {})
