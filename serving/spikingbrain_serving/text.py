"""From tokens to text as they come: never half a character, never the beginning of a stop string."""

from typing import Any

REPLACEMENT = "\ufffd"


class Detokenizer:
    """Turns a stream of tokens into pieces of text that add up to the decoding of all of them.

    Characters of several tokens are held back until they are whole; special tokens have no text.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        # The tokens not yet shown, after the last ones shown: some decoders look at what comes before.
        self._window: list[int] = []
        self._num_shown = 0

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    def add(self, token: int) -> str:
        """The text that `token` completes, perhaps none."""
        if token in self._special:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        if not text.endswith(REPLACEMENT):
            return self._show(len(self._window))
        if self._decode(self._window[:-1]) + self._decode(self._window[-1:]) == text:
            # What came before the token is no character's beginning: waiting longer would not mend it.
            return self._show(len(self._window) - 1)
        return ""

    def finish(self) -> str:
        """The text of what is still held back."""
        return self._show(len(self._window))

    def _show(self, end: int) -> str:
        shown = self._decode(self._window[: self._num_shown])
        piece = self._decode(self._window[:end])[len(shown) :]
        if end > self._num_shown:
            self._window = self._window[self._num_shown :]
            self._num_shown = end - self._num_shown
        return piece


class StopStrings:
    """Lets text through up to the first stop string, holding back what may become one."""

    def __init__(self, stops: tuple[str, ...]):
        self._stops = stops
        self._held = ""

    def feed(self, piece: str) -> tuple[str, str | None]:
        """The text that may be shown, and the stop string found, if any."""
        text = self._held + piece
        found = [(text.index(stop), stop) for stop in self._stops if stop in text]
        if found:
            start, stop = min(found, key=lambda match: match[0])
            self._held = ""
            return text[:start], stop
        end = len(text) - self._num_possible(text)
        self._held = text[end:]
        return text[:end], None

    def _num_possible(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0

    def release(self) -> str:
        """What is held back, which became no stop string."""
        held, self._held = self._held, ""
        return held
