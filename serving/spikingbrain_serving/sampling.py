"""How the next token is chosen: the settings of a request, under vLLM's names, and the choice itself."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import InvalidRequest

GREEDY_BELOW = 1e-5
MAX_LOGPROBS = 20
SEED_RANGE = (-(2**63), 2**63 - 1)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Settings of one request; raises `InvalidRequest` naming the first that is out of range.

    max_tokens: most tokens to generate, None for as many as the model length leaves. min_tokens: no end before so many.
    temperature: 0 takes the most likely token. top_k: 0 or -1 keeps all. seed: None draws one from the engine's.
    stop: strings that end the output and are left out of it. ignore_eos: go on after an end-of-sequence token.
    logprobs: None, or for how many of the likeliest tokens, beside the chosen one, to report log-probabilities.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | list[str] | tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for name, valid, rule in self._rules():
            if not valid:
                raise InvalidRequest(f"{name} must be {rule}, got {getattr(self, name)!r}", param=name)

    def _rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("n", self.n == 1, "1 (several outputs of one prompt are not supported yet)"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("min_tokens", 0 <= self.min_tokens <= (self.max_tokens or self.min_tokens), "from 0 to max_tokens"),
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "0 or a positive number"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= -1, "-1 or 0 (all tokens), or at least 1"),
            ("seed", self.seed is None or SEED_RANGE[0] <= self.seed <= SEED_RANGE[1], "a 64-bit integer"),
            ("stop", all(self.stop), "strings of at least one character"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"),
        ]

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken, without chance."""
        return self.temperature < GREEDY_BELOW


class Logprob(NamedTuple):
    """A token's log-probability under the model, before temperature and truncation; rank 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """A token from `logits [V]`; raises ArithmeticError if they are not numbers."""
    logits = logits.float()
    if params.is_greedy:
        token = int(logits.argmax())
    else:
        kept = _keep_top_p(_keep_top_k(logits / params.temperature, params.top_k), params.top_p)
        # A sum that is not finite would make multinomial fail with a message about probabilities.
        _require_numbers(kept.max())
        token = int(torch.multinomial(kept.softmax(-1), 1, generator=generator))
    _require_numbers(logits[token])
    return token


def _require_numbers(logit: Tensor) -> None:
    if not logit.isfinite():
        raise ArithmeticError(f"the model's logits contain {logit.item()}")


def _keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    if top_k < 1 or top_k >= len(logits):
        return logits
    return logits.masked_fill(logits < logits.topk(top_k).values[-1], -math.inf)


def _keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens whose probabilities add up to at least `top_p`, one at least."""
    if top_p == 1:
        return logits
    ordered, index = logits.sort(descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    return logits.index_fill(0, index[1:][before[1:] >= top_p], -math.inf)


def logprobs_of(logits: Tensor, token: int, num: int) -> list[tuple[int, float, int]]:
    """(token, log-probability, rank) of `token` and of the `num` likeliest of `logits [V]`."""
    logprobs = logits.float().log_softmax(-1)
    chosen = float(logprobs[token])
    top = logprobs.topk(num)
    likeliest = zip(top.indices.tolist(), top.values.tolist(), range(1, num + 1), strict=True)
    return [(token, chosen, int((logprobs > chosen).sum()) + 1), *(entry for entry in likeliest if entry[0] != token)]
