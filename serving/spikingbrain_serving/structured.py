"""Output that must match a JSON schema, a regular expression, a choice or a grammar: masks from llguidance."""

import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .errors import InvalidRequest

MAX_GRAMMAR_CHARACTERS = 100_000
# As `json.dumps` writes: where any white space is allowed, a model can write nothing else for ever.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class StructuredOutput:
    """`kind` says what `value` is: a JSON schema, a regular expression, some texts, or a grammar in Lark's form."""

    kind: Literal["json", "regex", "choice", "grammar"]
    value: Any
    param: str = "structured_outputs"

    def grammar(self, matcher: Any) -> str:
        """The grammar, through `matcher`, which is llguidance's `LLMatcher`."""
        if self.kind == "json":
            return matcher.grammar_from_json_schema(self.value, JSON_STYLE)
        if self.kind == "regex":
            return matcher.grammar_from_regex(self.value)
        if self.kind == "choice":
            return matcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in self.value))
        return matcher.grammar_from_lark(self.value)


class Matcher:
    """Follows one output and says which tokens may come next."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def restrict(self, logits: Tensor) -> Tensor:
        """`logits [V]` with minus infinity where a token would break the form; raises ValueError if it gave up."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._require_well()
        allowed = torch.from_numpy(np.unpackbits(mask, bitorder="little")[: len(logits)].astype(bool))
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)

    def accept(self, token: int) -> bool:
        """Take the chosen token; whether the output is complete and nothing may follow."""
        self._matcher.consume_token(token)
        self._require_well()
        return self._matcher.is_stopped()

    def _require_well(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"structured output: {self._matcher.get_error()}")


class Grammars:
    """Makes matchers for one tokenizer; what llguidance needs of it is prepared at the first use."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int]):
        self._tokenizer = tokenizer
        self._vocab_size = max(vocab_size, len(tokenizer))
        self._eos_token_ids = sorted(eos_token_ids)
        self._prepared: Any = None

    def matcher(self, wanted: StructuredOutput) -> Matcher:
        """A matcher at its beginning; raises `InvalidRequest` if the form makes no sense or llguidance is missing."""
        try:
            from llguidance import LLMatcher
        except ModuleNotFoundError as error:
            raise InvalidRequest("structured output needs llguidance: pip install 'spikingbrain[serve]'") from error
        try:
            grammar = wanted.grammar(LLMatcher)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"{wanted.kind}: {error}", param=wanted.param) from error
        if len(grammar) > MAX_GRAMMAR_CHARACTERS:
            raise InvalidRequest(f"{wanted.kind}: more than {MAX_GRAMMAR_CHARACTERS} characters", param=wanted.param)
        matcher = LLMatcher(self._llguidance_tokenizer(), grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().strip().splitlines()[0]
            raise InvalidRequest(f"{wanted.kind} cannot be followed: {reason}", param=wanted.param)
        return Matcher(matcher)

    def _llguidance_tokenizer(self) -> Any:
        if self._prepared is None:
            from llguidance.hf import from_tokenizer

            ends = self._eos_token_ids or None
            self._prepared = from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=ends)
        return self._prepared
