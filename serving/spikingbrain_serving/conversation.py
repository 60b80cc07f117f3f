"""A conversation whose state is carried from turn to turn: nothing that was said is read twice."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .engine import Engine
from .errors import InvalidRequest, RequestFailed
from .prompts import Message, encode, render_chat
from .sampling import SamplingParams
from .sequence import CompletionOutput, Extras
from .state_file import StoredState, read_state, write_state


def notes_of(messages: list[Message], text: str, result: CompletionOutput) -> dict[str, Any]:
    """What is kept with the state after an answer, so that `continued` can go on from it."""
    return {
        "messages": [*messages, {"role": "assistant", "content": result.text}],
        "text": text + result.text,
        "ended": result.finish_reason == "stop" and result.stop_reason is None,
    }


def continued(tokenizer: Any, state: StoredState | None, text: str) -> StoredState | list[int]:
    """`text` as tokens: after a state whose text it begins with, the state's own tokens and the rest's.

    A template that writes earlier turns differently, or another instruction, makes it a new text: then its own tokens.
    """
    if state is None or "text" not in state.notes or not text.startswith(state.notes["text"]):
        return encode(tokenizer, text, add_special_tokens=False)
    rest = text[len(state.notes["text"]) :]
    if state.notes["ended"]:
        rest = rest.removeprefix(tokenizer.decode(state.tokens[-1:]))
    return StoredState(state.tokens + encode(tokenizer, rest, add_special_tokens=False), state.snapshot)


class Conversation:
    """Turns of one conversation on an engine of its own."""

    def __init__(self, engine: Engine, params: SamplingParams, system: str | None = None):
        self._engine = engine
        self._params = params
        self._system = system
        self.begin()

    def begin(self) -> None:
        """Forget what was said."""
        self._messages: list[Message] = [{"role": "system", "content": self._system}] if self._system else []
        self._state: StoredState | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens said so far."""
        return len(self._state.tokens) if self._state else 0

    def ask(self, text: str) -> Iterator[str]:
        """Say something; the answer as it comes. Raises `InvalidRequest` and `RequestFailed`."""
        messages = [*self._messages, {"role": "user", "content": text}]
        rendered = render_chat(self._engine.tokenizer, messages)
        start = continued(self._engine.tokenizer, self._state, rendered)
        tokens, resume = (start, None) if isinstance(start, list) else (start.tokens, start.snapshot)
        self._engine.add_request("turn", tokens, self._params, Extras(resume=resume, snapshot=True))
        result = CompletionOutput()
        try:
            while self._engine.has_work:
                for new in self._engine.step():
                    result.extend(new.outputs[0])
                    yield new.outputs[0].text
        finally:
            self._engine.abort("turn")
        if result.snapshot is None:
            raise RequestFailed(result.error or "the answer was not finished")
        notes = notes_of(messages, rendered, result)
        self._messages = notes["messages"]
        self._state = StoredState(tokens + result.token_ids, result.snapshot, notes)

    def save(self, path: Path) -> None:
        """Write the state after the last answer; raises `InvalidRequest` if there is none."""
        if self._state is None:
            raise InvalidRequest("nothing was said yet")
        write_state(path, self._state, self._engine.identity)

    def restore(self, path: Path) -> None:
        """Go on where a saved conversation ended; raises `InputError` if it is damaged or of another model."""
        self._state = read_state(path, self._engine.identity)
        self._messages = self._state.notes.get("messages", [])
