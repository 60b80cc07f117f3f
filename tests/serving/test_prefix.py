"""The tree of states: what it finds, what it lets go, and what it says about both."""

import random

import pytest
import torch

from spikingbrain_serving.prefix import MAX_GHOSTS, PrefixTree
from spikingbrain_serving.snapshot import Snapshot
from spikingbrain_serving.spill import Spill
from spikingbrain_serving.state_file import ModelIdentity

BYTES = 64


def state(num_tokens: int) -> Snapshot:
    """A state of `BYTES` bytes."""
    return Snapshot([{"s": torch.full((8,), num_tokens, dtype=torch.float32)}], torch.zeros(8), num_tokens)


def filled(*sequences: list[int], max_bytes: int = 10**6, spill: Spill | None = None) -> PrefixTree:
    tree = PrefixTree(max_bytes, spill)
    for tokens in sequences:
        tree.insert(tokens, state(len(tokens)))
    return tree


def found(tree: PrefixTree, tokens: list[int]) -> tuple[int, int, str | None]:
    match = tree.lookup(tokens)
    return match.num_tokens, match.num_common, match.reason


def test_the_longest_beginning_with_a_state_is_found():
    tree = filled([1, 2], [1, 2, 3, 4], [1, 9])
    assert found(tree, [1, 2, 3, 4]) == (4, 4, None)
    assert found(tree, [1, 2, 3, 4, 5]) == (4, 4, "new_tokens")
    assert found(tree, [1, 2, 3, 7]) == (2, 3, "no_state_at_branch")
    assert found(tree, [1, 7]) == (0, 1, "no_state_at_branch")
    assert found(tree, [7]) == (0, 0, "new_tokens")


def test_a_state_in_the_middle_of_an_edge_is_found_later():
    tree = filled([1, 2, 3, 4])
    tree.insert([1, 2], state(2))
    assert found(tree, [1, 2, 8]) == (2, 2, "new_tokens")
    assert found(tree, [1, 2, 3, 4]) == (4, 4, None)


@pytest.mark.parametrize("seed", range(5))
def test_it_agrees_with_a_search_through_a_list(seed):
    draw = random.Random(seed)
    sequences = [draw.choices(range(3), k=draw.randint(1, 12)) for _ in range(60)]
    tree = filled(*sequences)
    for _ in range(200):
        tokens = draw.choices(range(3), k=draw.randint(1, 14))
        known = [len(other) for other in sequences if tokens[: len(other)] == other]
        common = max(sum(1 for _ in takewhile_equal(tokens, other)) for other in sequences)
        assert found(tree, tokens)[:2] == (max(known, default=0), common)


def takewhile_equal(a: list[int], b: list[int]):
    for x, y in zip(a, b, strict=False):
        if x != y:
            return
        yield x


def test_bytes_are_bounded_and_the_least_recently_used_state_goes_first():
    tree = filled([1], [2], max_bytes=2 * BYTES)
    tree.lookup([1])
    tree.insert([3], state(1))
    assert tree.num_bytes == 2 * BYTES
    assert found(tree, [2]) == (0, 1, "evicted")
    assert [found(tree, [token])[0] for token in (1, 3)] == [1, 1]


def test_a_state_larger_than_the_budget_is_not_kept():
    tree = filled([1, 2], max_bytes=BYTES - 1)
    assert (len(tree), tree.num_bytes) == (0, 0)


def test_what_was_let_go_is_remembered_for_a_while_only():
    tree = PrefixTree(BYTES)
    for token in range(MAX_GHOSTS + 50):
        tree.insert([token, 5], state(2))
    assert found(tree, [MAX_GHOSTS, 5])[2] == "evicted"
    assert found(tree, [0, 5])[2] == "new_tokens"
    assert len(tree._root.children) == MAX_GHOSTS + 1


class _Model:
    """As much of a model as a state file asks for."""

    device = torch.device("cpu")

    class config:
        @staticmethod
        def to_dict() -> dict:
            return {"a": 1}

    def state_specs(self) -> list:
        from spikingbrain.state import StateSpec

        return [[StateSpec("s", (8,), torch.float32, "recurrent")]]

    def named_parameters(self) -> list:
        return [("w", torch.ones(3))]

    def named_buffers(self) -> list:
        return []

    def named_modules(self) -> list:
        return []


@pytest.fixture
def spill(tmp_path):
    spill = Spill(tmp_path, 4 * BYTES, ModelIdentity(_Model()))
    yield spill
    spill.close()
    assert list(tmp_path.iterdir()) == []


def test_states_that_memory_has_no_room_for_come_back_from_disk(spill):
    tree = PrefixTree(BYTES, spill)
    for token in range(4):
        tree.insert([token] * (token + 1), state(token + 1))
        spill._writer.submit(int).result()
    for token in range(4):
        match = tree.lookup([token] * (token + 1))
        assert (match.num_tokens, match.reason) == (token + 1, None)
        assert match.snapshot.states[0]["s"].tolist() == [token + 1] * 8
        spill._writer.submit(int).result()
    assert tree.num_bytes == BYTES
    assert spill.num_bytes == 3 * BYTES


def test_the_disk_is_bounded_too_and_a_damaged_file_is_a_miss(spill):
    tree = PrefixTree(BYTES, spill)
    for token in range(8):
        tree.insert([token], state(1))
        spill._writer.submit(int).result()
    assert spill.num_bytes == 4 * BYTES
    assert found(tree, [0])[2] == "evicted"
    for file in spill._directory.iterdir():
        file.write_bytes(file.read_bytes()[:-5] + b"wrong")
    assert found(tree, [6])[2] == "unreadable"
