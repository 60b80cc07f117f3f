"""Tool calls in the model's text: the form of Hermes and Qwen, `<tool_call>{"name": …, "arguments": …}</tool_call>`."""

import json
import uuid
from typing import Any

from .protocol import FunctionCall, ToolCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class ToolParser:
    """Separates calls from text while it comes; what may become a call is held back. `forced`: all of it is a call."""

    def __init__(self, *, forced: bool = False):
        self._forced = forced
        self._held = ""
        self.num_calls = 0

    def feed(self, piece: str, *, last: bool) -> tuple[str, list[ToolCall]]:
        """The text and the calls that are complete; `last`: nothing more comes."""
        self._held += piece
        if self._forced:
            return self._whole() if last else ("", [])
        text, calls = "", []
        while (start := self._held.find(OPEN)) >= 0 and (end := self._held.find(CLOSE, start)) >= 0:
            inside = self._held[start + len(OPEN) : end]
            call = self._call(inside)
            text += self._held[:start] + ("" if call else OPEN + inside + CLOSE)
            calls += [call] if call else []
            self._held = self._held[end + len(CLOSE) :]
        keep = 0 if last else self._num_open()
        text += self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return text, calls

    def _whole(self) -> tuple[str, list[ToolCall]]:
        call = self._call(self._held)
        return (self._held, []) if call is None else ("", [call])

    def _num_open(self) -> int:
        """Characters at the end that are, or may become, a call."""
        start = self._held.find(OPEN)
        if start >= 0:
            return len(self._held) - start
        lengths = range(min(len(OPEN) - 1, len(self._held)), 0, -1)
        return next((n for n in lengths if OPEN.startswith(self._held[-n:])), 0)

    def _call(self, text: str) -> ToolCall | None:
        try:
            call: Any = json.loads(text)
        except ValueError:
            return None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        function = FunctionCall(name=call["name"], arguments=json.dumps(call.get("arguments", {}), ensure_ascii=False))
        self.num_calls += 1
        return ToolCall(index=self.num_calls - 1, id=f"call_{uuid.uuid4().hex[:24]}", function=function)
