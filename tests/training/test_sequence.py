"""Sequence parallelism: pieces of a row give the loss and gradients of the row and exchange what the formula says."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from spikingbrain import SpikingBrainConfig, SpikingBrainForCausalLM, registry
from spikingbrain.state import StateSpec
from spikingbrain_training.collectives import Group, make_group
from spikingbrain_training.config import Loss
from spikingbrain_training.data import IGNORED, Batch
from spikingbrain_training.sequence import cut, halo_counts, head_shares, make_carrier
from spikingbrain_training.stages import logits, stage_loss

from . import runs
from .conftest import SIZES
from .harness import run_ranks

LENGTH = 48
# A document over three pieces of four, short ones, one that ends at a cut, one of a single token.
EDGES = {"packed": [0, 5, 30, 36, 37, LENGTH], "one document": [0, LENGTH], "cut at an edge": [0, 12, 24, LENGTH]}
MIXERS = [*registry.names("mixers"), "gla+sliding_window"]


def model_of(mixers: list[str], **changes: Any) -> SpikingBrainForCausalLM:
    torch.manual_seed(3)
    sizes = {**SIZES, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, **changes}
    config = SpikingBrainConfig(**sizes, mixers=mixers, window=17, qkv_bias=True)
    # Gates near one, so that what leaks between documents would be seen and what is lost missed.
    model = SpikingBrainForCausalLM(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate_proj.bias"):
                parameter.fill_(4.0)
    return model.train()


def batch_of(edges: list[int]) -> Batch:
    """One packed row."""
    tokens = torch.randint(0, 257, (1, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(end - begin) for begin, end in zip(edges, edges[1:], strict=False)])
    labels = tokens[:, 1:].clone()
    labels[0, [end - 1 for end in edges[1:]]] = IGNORED
    return Batch(tokens[:, :-1], labels, positions[None])


def loss_and_gradients(model: Any, batch: Any) -> tuple[Tensor, list[Tensor]]:
    loss = stage_loss(model, None, batch, Loss())
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


def join(size: int) -> Group:
    dist.init_process_group("gloo")
    return make_group(dist.get_rank(), dist.get_world_size(), size)


def in_pieces(size: int, cases: list[tuple[dict[str, Any], str, str]]) -> list[Any]:
    group, results = join(size), []
    for build, edges, scan in cases:
        model = model_of(**build)
        group.received.clear()
        loss, gradients = loss_and_gradients(model, cut(batch_of(EDGES[edges]), group, scan))
        for total in (loss, *gradients):
            dist.all_reduce(total)
        results.append((loss, gradients, dict(group.received)))
    return results


CASES = [
    *[({"mixers": [mixer]}, edges, "all_gather") for mixer in MIXERS for edges in EDGES],
    *[({"mixers": ["gla"]}, edges, "pipelined") for edges in EDGES],
    ({"mixers": ["rwkv"], "channel_mixers": ["rwkv"]}, "packed", "all_gather"),
    ({"mixers": ["softmax"], "num_attention_heads": 3, "num_key_value_heads": 1}, "packed", "all_gather"),
    (
        {
            "mixers": ["gla+sliding_window", "gla+softmax"],
            "num_sinks": 5,
            "gate": {"tied": True},
            "channel_mixers": ["swiglu", "moe"],
            "moe": {"num_experts": 3},
        },
        "packed",
        "all_gather",
    ),
]


@pytest.fixture(scope="module", params=[2, 4])
def pieces(request) -> Any:
    return request.param, run_ranks(request.param, in_pieces, request.param, CASES)


@pytest.fixture(scope="module")
def whole() -> list[tuple[Tensor, list[Tensor]]]:
    return [loss_and_gradients(model_of(**build), batch_of(EDGES[edges])) for build, edges, _ in CASES]


def close(value: Tensor, expected: Tensor) -> bool:
    return bool((value - expected).abs().max() <= 1e-10 * (1 + expected.abs().max()))


def test_loss_and_gradients_are_those_of_one_process(pieces, whole):
    size, ranks = pieces
    for case, (loss, gradients), *results in zip(CASES, whole, *ranks, strict=True):
        assert all(close(total, loss) for total, *_ in results), (size, case)
        for _, totals, _ in results:
            assert all(close(total, gradient) for total, gradient in zip(totals, gradients, strict=True)), (size, case)


def test_what_is_received_is_what_the_formula_says(pieces):
    size, ranks = pieces
    heads, width, layers, number = 3, 8, 2, 8
    for case, *results in zip(CASES, *ranks, strict=True):
        build, _, scan = case
        if build != {"mixers": ["gla"]}:
            continue
        for rank, (_, _, received) in enumerate(results):
            state = layers * number * heads * width * width
            if scan == "pipelined":
                assert received.get("relay", 0) == state * ((rank > 0) + (rank + 1 < size)), case
            else:
                with_decay = (size - 1) * (state + layers * number * heads * width)
                assert received == {"all_gather": with_decay, "reduce_scatter": with_decay}, case


def test_a_window_receives_its_halo_and_softmax_its_heads(pieces):
    size, ranks = pieces
    length = LENGTH // size
    for case, *results in zip(CASES, *ranks, strict=True):
        for rank, (_, _, received) in enumerate(results):
            if case[0] == {"mixers": ["sliding_window"]}:
                counts = halo_counts(17, length, size)
                tokens = sum(counts.get(rank - other, 0) + counts.get(other - rank, 0) for other in range(size))
                assert received == {"all_to_all": 2 * 8 * 2 * 3 * 8 * tokens}, case
            if case[0] == {"mixers": ["softmax"]}:
                queries, keys, _ = head_shares(6, 3, size)
                numbers = (size - 1) * length * 2 * (queries.shape[1] + keys.shape[1]) * 8
                assert received == {"all_to_all": 2 * 2 * 8 * numbers}, case


def test_heads_are_padded_to_the_ranks_and_a_rank_gets_only_the_keys_that_it_reads():
    queries, keys, reads = head_shares(28, 4, 8)
    assert queries.shape == (8, 4)
    assert set(queries.flatten().tolist()) == set(range(28))
    assert keys.shape[1] == 2
    for rank in range(8):
        assert keys[rank][reads[rank]].tolist() == (queries[rank] // 7).tolist()


def perturbed(size: int, mixers: list[str], changed: list[tuple[int, int]]) -> list[Tensor]:
    group = join(size)
    model = model_of(mixers)
    results = []
    for begin, end in [(0, 0), *changed]:
        batch = batch_of(EDGES["packed"])
        batch.inputs[0, begin:end] = (batch.inputs[0, begin:end] + 1) % 257
        with torch.no_grad():
            results.append(logits(model, cut(batch, group)))
    return results


@pytest.mark.parametrize("mixers", [["gla", "sliding_window"], ["softmax"]])
def test_a_document_changes_no_bit_of_another_across_cuts(mixers):
    documents = list(zip(EDGES["packed"], EDGES["packed"][1:], strict=False))
    ranks = run_ranks(4, perturbed, 4, mixers, documents)
    before, *after = (torch.cat(parts) for parts in zip(*ranks, strict=True))
    for (begin, end), changed in zip(documents, after, strict=True):
        same = (before == changed).all(-1)
        assert not same[begin:end].any()
        assert same[:begin].all()
        assert same[end:].all()


def test_pieces_that_are_not_equal_are_refused():
    with pytest.raises(ValueError, match="48 tokens cannot be cut into 5"):
        cut(batch_of([0, LENGTH]), Group(None, 0, 5))


@pytest.mark.parametrize(("zero", "ranks"), [(0, 2), (3, 4)])
def test_a_run_in_pieces_is_the_run_of_one_process(configure, make_config, ours, tmp_path, zero, ranks):
    model = {"model": {"init_from": str(ours)}, "data": {"sequence_length": 28}, "steps": 4}
    one = configure(tmp_path / "one", **model, parallel={"zero": 0})
    runs.train(1, one)
    many = make_config(**model, parallel={"zero": zero, "sequence": 2, "activation_checkpointing": zero == 3})
    runs.train(ranks, many)
    assert runs.losses(many.out)[0] == pytest.approx(runs.losses(one.out)[0], rel=1e-5)
    assert runs.losses(many.out) == pytest.approx(runs.losses(one.out), rel=1e-4)


def gated_delta(q, k, v, beta, log_decay, *, scale, cu_seqlens, state=None):
    """The delta rule by its definition; the name says how its states compose."""
    outs, states = [], []
    for number, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        memory = q.new_zeros(q.shape[2], q.shape[3], v.shape[3]) if state is None else state[number]
        for t in range(begin, end):
            memory = memory * log_decay[0, t, :, None].exp()
            error = beta[0, t] * (v[0, t] - torch.einsum("hk,hkv->hv", k[0, t], memory))
            memory = memory + k[0, t, :, :, None] * error[:, None]
            outs.append(scale * torch.einsum("hk,hkv->hv", q[0, t], memory))
        states.append(memory)
    return torch.stack(outs)[None], torch.stack(states)


def hard_reset(x, *, cu_seqlens, state=None):
    """A membrane that is emptied where it fires, smoothly, so that gradients can be compared: it does not compose."""
    outs, states = [], []
    for number, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        memory = x.new_zeros(x.shape[2]) if state is None else state[number]
        for t in range(begin, end):
            memory = 0.8 * memory + x[0, t]
            fired = torch.sigmoid(4 * (memory - 1))
            memory = memory * (1 - fired)
            outs.append(fired)
        states.append(memory)
    return torch.stack(outs)[None], torch.stack(states)


def short_conv(x, weight, *, cu_seqlens, state=None):
    """A causal convolution over the last N inputs of each channel."""
    taps, outs, states = weight.shape[1], [], []
    for number, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        before = x.new_zeros(taps - 1, x.shape[2]) if state is None else state[number]
        inputs = torch.cat([before, x[0, begin:end]])
        outs += [(inputs[t : t + taps] * weight.T).sum(0) for t in range(end - begin)]
        states.append(inputs[len(inputs) - taps + 1 :])
    return torch.stack(outs)[None], torch.stack(states)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]), dtype=torch.float64)


# Op, arguments by token, weights, options, and the kinds of mixer and state.
HEADS = (1, LENGTH, 2)
OPS: dict[str, Any] = {
    "dense": (
        gated_delta,
        lambda: (
            [numbers(*HEADS, 4), numbers(*HEADS, 4) / 3, numbers(*HEADS, 5), numbers(*HEADS, 1).sigmoid()]
            + [-numbers(*HEADS, 1).abs() / 50]
        ),
        lambda: [],
        {"scale": 0.5},
        ("dense", StateSpec("recurrent", (2, 4, 5), torch.float64, "recurrent")),
    ),
    "serial": (
        hard_reset,
        lambda: [numbers(1, LENGTH, 6)],
        lambda: [],
        {},
        ("serial", StateSpec("membrane", (6,), torch.float64, "recurrent")),
    ),
    "convolution": (
        short_conv,
        lambda: [numbers(1, LENGTH, 6)],
        lambda: [numbers(6, 14)],
        {},
        ("diagonal", StateSpec("inputs", (13, 6), torch.float64, "conv")),
    ),
}


def run_op(name: str, edges: str, group: Group | None) -> list[Tensor]:
    """Output and gradients of all arguments, of a piece or of the whole row."""
    op, make_tokens, make_weights, options, (kind, spec) = OPS[name]
    tokens = [x.requires_grad_() for x in make_tokens()]
    weights = [x.requires_grad_() for x in make_weights()]
    batch = batch_of(EDGES[edges])
    if group is None:
        out, _ = op(*tokens, *weights, cu_seqlens=batch.cu_seqlens, **options)
        (out * numbers(*out.shape).cos()).sum().backward()
    else:
        piece = cut(batch, group)
        here = slice(group.rank * LENGTH // group.size, (group.rank + 1) * LENGTH // group.size)
        carrier = make_carrier(kind, spec, piece)
        local = [x[:, here] for x in tokens]
        out, _ = carrier.carry(op, *local, *weights, cu_seqlens=piece.batch.cu_seqlens, **options)
        (out * numbers(1, LENGTH, *out.shape[2:]).cos()[:, here]).sum().backward()
    return [out.detach(), *(x.grad for x in (*tokens, *weights))]


def ops_in_pieces(size: int) -> list[Any]:
    group, results = join(size), []
    for name in OPS:
        for edges in EDGES:
            group.received.clear()
            out, *gradients = run_op(name, edges, group)
            for gradient in gradients:
                dist.all_reduce(gradient)
            results.append((out, gradients, dict(group.received)))
    return results


@pytest.mark.parametrize("size", [2, 4])
def test_dense_serial_and_convolution_states_pass_between_pieces(size):
    ranks = run_ranks(size, ops_in_pieces, size)
    cases = [(name, edges) for name in OPS for edges in EDGES]
    for (name, edges), *results in zip(cases, *ranks, strict=True):
        out, *gradients = run_op(name, edges, None)
        assert close(torch.cat([piece for piece, *_ in results], dim=1), out), (name, edges)
        for _, totals, _ in results:
            assert all(map(close, totals, gradients)), (name, edges)
        # The formula: (P - 1) H K (K + V) numbers forward and backward; a state forward and back.
        if name == "dense":
            expected = (size - 1) * 2 * 4 * (4 + 5) * 8
            assert all(seen == {"all_gather": expected, "reduce_scatter": expected} for *_, seen in results)
        if name == "serial":
            per_rank = [6 * 8 * ((rank > 0) + (rank + 1 < size)) for rank in range(size)]
            assert [seen["relay"] for *_, seen in results] == per_rank
