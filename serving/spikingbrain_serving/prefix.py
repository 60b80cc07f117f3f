"""Reuse of states: a tree of token sequences, with the state after some of them, least recently used ones let go."""

from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Literal

from .snapshot import Snapshot
from .spill import Spill, Spilled

MissReason = Literal["new_tokens", "no_state_at_branch", "evicted", "unreadable"]
# Places whose state was let go are remembered, so that a miss can be explained: at most so many.
MAX_GHOSTS = 1024


@dataclass(eq=False)
class _Node:
    """The tokens on the way here from the parent, and the state after them: in memory, on disk, let go, or none."""

    tokens: array
    parent: "_Node | None"
    children: dict[int, "_Node"] = field(default_factory=dict)
    state: Snapshot | Spilled | None = None
    is_ghost: bool = False


@dataclass(frozen=True)
class Match:
    """The longest known beginning of a prompt that has a state, and how many of its tokens are in the tree in all.

    `reason`: why the state is not that of the whole prompt; None if it is.
    """

    snapshot: Snapshot | None
    num_common: int
    reason: MissReason | None

    @property
    def num_tokens(self) -> int:
        """Tokens that need not be computed."""
        return self.snapshot.num_tokens if self.snapshot else 0


class PrefixTree:
    """States after token sequences, `max_bytes` of them in memory; those used least recently go to `spill`, or away."""

    def __init__(self, max_bytes: int, spill: Spill | None = None):
        self._max_bytes = max_bytes
        self._spill = spill
        self._root = _Node(array("i"), None)
        self._in_memory: OrderedDict[_Node, None] = OrderedDict()
        self._ghosts: OrderedDict[_Node, None] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        """States in memory."""
        return len(self._in_memory)

    def lookup(self, tokens: list[int]) -> Match:
        """What is known of `tokens`."""
        nodes, num_common = self._walk(tokens)
        lost: MissReason | None = None
        for node in reversed(nodes):
            if node.state is not None:
                snapshot = self._take(node)
                if snapshot is not None:
                    return Match(snapshot, num_common, _reason(snapshot.num_tokens, num_common, len(tokens), lost))
                lost = "unreadable"
            elif node.is_ghost:
                lost = lost or "evicted"
        return Match(None, num_common, _reason(0, num_common, len(tokens), lost))

    def insert(self, tokens: list[int], snapshot: Snapshot) -> None:
        """Keep the state after `tokens`, if it fits at all."""
        if snapshot.nbytes > self._max_bytes:
            return
        node = self._node_at(tokens)
        if isinstance(node.state, Spilled):
            self._spill.drop(node.state)
        self._hold(node, snapshot)

    def _hold(self, node: _Node, snapshot: Snapshot) -> None:
        if isinstance(node.state, Snapshot):
            self.num_bytes -= node.state.nbytes
        self._ghosts.pop(node, None)
        node.is_ghost = False
        node.state = snapshot
        self._in_memory[node] = None
        self._in_memory.move_to_end(node)
        self.num_bytes += snapshot.nbytes
        while self.num_bytes > self._max_bytes:
            self._evict(next(iter(self._in_memory)))

    def _take(self, node: _Node) -> Snapshot | None:
        """The node's state, now the last to be let go; None if it cannot be read back."""
        if isinstance(node.state, Snapshot):
            self._in_memory.move_to_end(node)
            return node.state
        snapshot = self._spill.take(node.state)
        node.state = None
        if snapshot is not None:
            self._hold(node, snapshot)
        return snapshot

    def _evict(self, node: _Node) -> None:
        snapshot: Any = node.state
        del self._in_memory[node]
        self.num_bytes -= snapshot.nbytes
        node.state = None
        if self._spill is not None:
            node.state = self._spill.put(self._tokens_to(node), snapshot, lambda: self._become_ghost(node))
        if node.state is None:
            self._become_ghost(node)

    def _become_ghost(self, node: _Node) -> None:
        node.state, node.is_ghost = None, True
        self._ghosts[node] = None
        if len(self._ghosts) > MAX_GHOSTS:
            oldest, _ = self._ghosts.popitem(last=False)
            oldest.is_ghost = False
            self._prune(oldest)

    def _prune(self, node: _Node) -> None:
        """Remove a node that leads nowhere, and those above it that now lead nowhere."""
        while node.parent is not None and not (node.children or node.state or node.is_ghost):
            del node.parent.children[node.tokens[0]]
            node = node.parent

    def _walk(self, tokens: list[int]) -> tuple[list[_Node], int]:
        """The nodes on the way that lie on it entirely, and how many tokens are common in all."""
        node, nodes, position = self._root, [], 0
        while position < len(tokens) and tokens[position] in node.children:
            node = node.children[tokens[position]]
            num_common = _num_common(node.tokens, tokens, position)
            position += num_common
            if num_common < len(node.tokens):
                break
            nodes.append(node)
        return nodes, position

    def _node_at(self, tokens: list[int]) -> _Node:
        """The node after `tokens`, made if need be."""
        nodes, position = self._walk(tokens)
        node = nodes[-1] if nodes else self._root
        depth = sum(len(each.tokens) for each in nodes)
        if position > depth:
            node = _split(node.children[tokens[depth]], position - depth)
        if position < len(tokens):
            child = _Node(array("i", tokens[position:]), node)
            node.children[tokens[position]] = child
            node = child
        return node

    def _tokens_to(self, node: _Node) -> list[int]:
        parts = []
        while node.parent is not None:
            parts.append(node.tokens)
            node = node.parent
        return [token for part in reversed(parts) for token in part]


def _num_common(edge: array, tokens: list[int], start: int) -> int:
    length = min(len(edge), len(tokens) - start)
    for index in range(length):
        if edge[index] != tokens[start + index]:
            return index
    return length


def _split(node: _Node, length: int) -> _Node:
    """Put a node into the edge above `node`, after `length` of its tokens."""
    middle = _Node(node.tokens[:length], node.parent, {node.tokens[length]: node})
    node.parent.children[node.tokens[0]] = middle
    node.tokens, node.parent = node.tokens[length:], middle
    return middle


def _reason(num_known: int, num_common: int, length: int, lost: MissReason | None) -> MissReason | None:
    if num_known == length:
        return None
    return lost or ("no_state_at_branch" if num_common > num_known else "new_tokens")
