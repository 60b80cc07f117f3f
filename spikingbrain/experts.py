"""Mixture of experts in separable steps: route tokens, group them by expert, run the experts, combine (and count).

N tokens, D channels, E experts, k of which a token is sent to.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, one_hot, rms_norm

from .surrogates import atan, heaviside


class Routing(NamedTuple):
    """`experts [N, k]`: whom each token is sent to; `weights [N, k]`: what their outputs count.

    `probabilities [N, E]`: the scores of all experts, divided by their sum. A router of spikes sends a token to those
    of its k that fire; in place of the others stand expert E, which is nobody, and weight 0.
    """

    experts: Tensor
    weights: Tensor
    probabilities: Tensor


class Router(nn.Linear):
    """Scores every expert for a token, in fp32 (fp64 for fp64 inputs), and picks the best k.

    `moe["score"]` "spike" (after SEMM, NeurIPS 2024, whose routers emit spikes instead of a softmax): of the best k
    those fire whose membrane, the logit over the RMS of the token's logits, reaches 1, and count 1 each. What does not
    fire is not computed; a token for which none fires has the shared experts only. The RMS takes the place of SEMM's
    batch norm, so that a route depends on its token only.

    `balance_bias [E]` takes part in the choice but not in the weights (loss-free balancing, arXiv 2408.15664); training
    moves it between steps, nothing else does.
    """

    balance_bias: Tensor

    def __init__(self, width: int, moe: dict[str, Any]):
        super().__init__(width, moe["num_experts"], bias=False)
        self.moe = moe
        self.register_buffer("balance_bias", torch.zeros(moe["num_experts"]))

    def forward(self, x: Tensor) -> Routing:  # type: ignore[override]
        """`x [N, D]` -> where its tokens go; a token's route depends on this token only."""
        return self.choose(self.logits(x))

    def logits(self, x: Tensor) -> Tensor:
        """`x [N, D]` -> `[N, E]`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return linear(x.to(wide), self.weight.to(wide))

    def choose(self, logits: Tensor) -> Routing:
        """Where tokens with these `logits [N, E]` go."""
        if self.moe["score"] == "spike":
            return self._fire(logits)
        scores = logits.softmax(-1) if self.moe["score"] == "softmax" else logits.sigmoid()
        experts = (scores + self.balance_bias.to(logits.dtype)).topk(self.moe["top_k"], dim=-1).indices
        return Routing(experts, scores.gather(1, experts), scores / scores.sum(-1, keepdim=True))

    def _fire(self, logits: Tensor) -> Routing:
        membrane = rms_norm(logits, logits.shape[-1:]) + self.balance_bias.to(logits.dtype)
        best, experts = membrane.topk(self.moe["top_k"], dim=-1)
        spikes = heaviside(best - 1, atan)
        return Routing(experts.masked_fill(spikes == 0, len(self.weight)), spikes, logits.softmax(-1))


class Groups(NamedTuple):
    """The R <= N k pairs of a token and an expert, sorted by expert and then by token.

    `pairs [R]`: token * k + choice, in this order; `sizes [E]`: how many go to each expert; `top_k`: k.
    """

    pairs: Tensor
    sizes: Tensor
    top_k: int


def group(experts: Tensor, num_experts: int) -> Groups:
    """Sort the choices `experts [N, k]` by expert; a choice of nobody is left out."""
    choices = experts.flatten()
    sizes = torch.bincount(choices, minlength=num_experts)[:num_experts]
    return Groups(choices.argsort(stable=True)[: int(sizes.sum())], sizes, experts.shape[1])


def dispatch(x: Tensor, groups: Groups) -> Tensor:
    """`x [N, D]` -> the rows of all experts, one expert after the other `[R, D]`."""
    return x[groups.pairs // groups.top_k]


def run_experts(experts: Sequence[nn.Module], rows: Tensor, sizes: Tensor) -> Tensor:
    """Each expert on its own rows of `rows [R, D]`, in order, `sizes` rows each -> `[R, D]`.

    An expert without a row runs too, on none: in training all processes then call the same modules in the same order.
    """
    parts = rows.split(sizes.tolist())
    return torch.cat([run_expert(expert, part) for expert, part in zip(experts, parts, strict=True)])


def run_expert(expert: nn.Module, rows: Tensor) -> Tensor:
    """One feed-forward block on tokens `[R, D]` that belong to no sequence."""
    return expert(rows[None], {}, positions=None, cu_seqlens=None, mask=None)[0][0]


def combine(rows: Tensor, groups: Groups, weights: Tensor) -> Tensor:
    """Bring `rows [R, D]` back to their tokens and sum them by `weights [N, k]` -> `[N, D]`."""
    places = rows.new_zeros(weights.numel(), rows.shape[1])
    by_token = places.index_put((groups.pairs,), rows).unflatten(0, (-1, groups.top_k))
    return (by_token * weights[..., None].to(rows.dtype)).sum(1)


def choices(routing: Routing, rows: Tensor, num_rows: int) -> Tensor:
    """How many choices of the tokens of each row went to each expert `[S, E]`; `rows [N]`: which one a token is of."""
    num_experts = routing.probabilities.shape[-1]
    chosen = one_hot(routing.experts, num_experts + 1)[..., :num_experts].sum(1)
    return chosen.new_zeros(num_rows, chosen.shape[1]).index_add(0, rows, chosen)


def balance_loss(routing: Routing, rows: Tensor, chosen: Tensor) -> Tensor:
    """What uneven use of the experts costs, summed over tokens: 1 a token where use is even.

    For each row of T tokens T E sum_e f_e P_e, where f_e is the share of its choices that went to expert e and P_e
    the mean probability (arXiv 2101.03961, eq. 4; per sequence as in 2412.19437, eq. 17, so that a batch may be divided
    between processes and steps in any way). `rows [N]`: which row a token is of; `chosen [S, E]` of the whole rows, of
    which `routing` may be a part: the losses of parts add up.
    """
    share = chosen / chosen.sum(1, keepdim=True).clamp(min=1)
    return chosen.shape[1] * (share[rows] * routing.probabilities).sum()


def expert_load(routing: Routing) -> Tensor:
    """How many tokens each expert got `[E]`."""
    num_experts = routing.probabilities.shape[-1]
    return torch.bincount(routing.experts.flatten(), minlength=num_experts)[:num_experts]


@torch.no_grad()
def shift_balance_(router: Router, load: Tensor) -> None:
    """Make experts that got more than their share of `load [E]` less likely to be chosen, the others more."""
    step = torch.sign(load.double().mean() - load).to(router.balance_bias)
    router.balance_bias += router.moe["bias_rate"] * step


def routers(model: nn.Module) -> dict[str, Router]:
    """Every router of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, list[Routing]]]:
    """Collect, while the block runs, what every router decides: one entry a forward pass, with its gradient.

    Activation checkpointing runs layers again in the backward pass: end the block before it.
    """
    record: dict[str, list[Routing]] = {name: [] for name in routers(model)}

    def listen(name: str):
        return lambda _module, _inputs, routing: record[name].append(routing)

    handles = [router.register_forward_hook(listen(name)) for name, router in routers(model).items()]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


class Parameters(NamedTuple):
    """How many a model has, and how many of them work on one token."""

    total: int
    active: int


def count_parameters(model: nn.Module) -> Parameters:
    """Tied parameters count once; of the routed experts k of E are active."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for name, router in routers(model).items():
        experts = model.get_submodule(name.rpartition(".")[0] + ".experts")
        size = sum(parameter.numel() for parameter in experts.parameters())
        idle += size // router.moe["num_experts"] * (router.moe["num_experts"] - router.moe["top_k"])
    return Parameters(total, total - idle)
