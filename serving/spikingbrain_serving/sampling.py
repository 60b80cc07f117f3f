"""How the next token is chosen: the settings of a request, under vLLM's names, and the choice itself."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import InvalidRequest
from .structured import StructuredOutput

GREEDY_BELOW = 1e-5
MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOPS = 64
SHORTLIST = 1024
SEED_RANGE = (-(2**63), 2**63 - 1)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Settings of one request; raises `InvalidRequest` naming the first that is out of range.

    n: outputs of one prompt, which is computed once. max_tokens: most tokens to generate, None for as many as the model
    length leaves. min_tokens: no end before so many. temperature: 0 takes the most likely token. top_k: 0 or -1 keeps
    all. min_p: keeps tokens at least so likely, relative to the likeliest. seed: None draws one from the engine's.
    presence_penalty, frequency_penalty: subtracted from the logits of tokens of the output, once or each time.
    repetition_penalty: divides the positive, multiplies the negative logits of tokens of prompt and output.
    logit_bias: added to the logits of these tokens. stop: strings that end the output and are left out of it.
    stop_token_ids: tokens that end it. ignore_eos: go on after an end-of-sequence token. logprobs: None, or for how
    many of the likeliest tokens, beside the chosen one, to report log-probabilities. structured: what the text must be.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop: str | list[str] | tuple[str, ...] = ()
    stop_token_ids: list[int] | tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    structured: StructuredOutput | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for name, valid, rule in (*self._length_rules(), *self._choice_rules(), *self._penalty_rules()):
            if not valid:
                raise InvalidRequest(f"{name} must be {rule}, got {getattr(self, name)!r}", param=name)

    def _length_rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("n", 1 <= self.n <= MAX_N, f"from 1 to {MAX_N}"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("min_tokens", 0 <= self.min_tokens <= (self.max_tokens or self.min_tokens), "from 0 to max_tokens"),
            (
                "stop",
                all(self.stop) and len(self.stop) <= MAX_STOPS,
                f"at most {MAX_STOPS} strings, none of them empty",
            ),
        ]

    def _choice_rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "0 or a positive number"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= -1, "-1 or 0 (all tokens), or at least 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("seed", self.seed is None or SEED_RANGE[0] <= self.seed <= SEED_RANGE[1], "a 64-bit integer"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"),
        ]

    def _penalty_rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "from -2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 100, "above 0 and at most 100"),
            ("logit_bias", all(abs(bias) <= 100 for bias in self.logit_bias.values()), "numbers from -100 to 100"),
        ]

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken, without chance."""
        return self.temperature < GREEDY_BELOW


class Logprob(NamedTuple):
    """A token's log-probability under the model, before any setting changed it; rank 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


def adjust(logits: Tensor, params: SamplingParams, prompt: list[int], output: list[int]) -> Tensor:
    """`logits [V]` after penalties and bias, those of `SamplingParams`; the same tensor if there are none."""
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *output}), dtype=torch.long, device=logits.device)
        values = logits[seen]
        scaled = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        logits = logits.index_copy(0, seen, scaled)
    if output and (params.presence_penalty or params.frequency_penalty):
        tokens, counts = torch.tensor(output, device=logits.device).unique(return_counts=True)
        penalty = params.presence_penalty + params.frequency_penalty * counts.to(logits.dtype)
        logits = logits.index_add(0, tokens, -penalty)
    if params.logit_bias:
        tokens = torch.tensor(list(params.logit_bias), device=logits.device)
        bias = torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype, device=logits.device)
        logits = logits.index_add(0, tokens, bias)
    return logits


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """A token from `logits [V]`; raises ArithmeticError if they are not numbers."""
    logits = logits.float()
    if params.is_greedy:
        token = int(logits.argmax())
    else:
        kept, tokens = _likeliest(logits / params.temperature, params)
        kept = _keep_min_p(kept, params.min_p)
        _require_numbers(kept.max())
        drawn = _draw(kept, generator)
        token = drawn if tokens is None else int(tokens[drawn])
    _require_numbers(logits[token])
    return token


def _require_numbers(logit: Tensor) -> None:
    if not logit.isfinite():
        raise ArithmeticError(f"the model's logits contain {logit.item()}")


def _likeliest(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """The logits that `top_k` and then `top_p` keep, and which tokens' they are; None: all, in order.

    `top_p` keeps the likeliest tokens whose probabilities add up to it, one at least. They are nearly always among few:
    a vocabulary takes longer to sort than a small model to compute.
    """
    has_top_k = 1 <= params.top_k < len(logits)
    if not has_top_k and params.top_p == 1:
        return logits, None
    kept, tokens = logits.topk(params.top_k if has_top_k else min(SHORTLIST, len(logits)))
    total = (kept if has_top_k else logits).logsumexp(-1)
    if not has_top_k and (kept - total).exp().sum() < params.top_p:
        kept, tokens = logits.sort(descending=True)
    if params.top_p < 1:
        probabilities = (kept - total).exp()
        num = max(1, int((probabilities.cumsum(-1) - probabilities < params.top_p).sum()))
        kept, tokens = kept[:num], tokens[:num]
    return kept, tokens


def _draw(logits: Tensor, generator: torch.Generator) -> int:
    """An index by its probability: where the cumulative sum passes a uniform number; one draw, not one a token."""
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    point = torch.rand((), generator=generator, dtype=torch.float64, device=logits.device) * cumulative[-1]
    # Rounding may not lead past the last that can be drawn.
    point = point.minimum(cumulative[-1].nextafter(torch.zeros_like(point)))
    return int(torch.searchsorted(cumulative, point, right=True))


def _keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """The tokens with at least `min_p` times the likeliest one's probability."""
    if min_p == 0:
        return logits
    return logits.masked_fill(logits < logits.max() + math.log(min_p), -math.inf)


def logprobs_of(logits: Tensor, token: int, num: int) -> list[tuple[int, float, int]]:
    """(token, log-probability, rank) of `token` and of the `num` likeliest of `logits [V]`."""
    logprobs = logits.float().log_softmax(-1)
    chosen = float(logprobs[token])
    top = logprobs.topk(num)
    likeliest = zip(top.indices.tolist(), top.values.tolist(), range(1, num + 1), strict=True)
    return [(token, chosen, int((logprobs > chosen).sum()) + 1), *(entry for entry in likeliest if entry[0] != token)]


def describe(entries: list[tuple[int, float, int]], tokenizer: Any) -> dict[int, Logprob]:
    """What `logprobs_of` gives, with the tokens' texts."""
    return {token: Logprob(value, rank, tokenizer.decode([token])) for token, value, rank in entries}
