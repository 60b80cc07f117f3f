"""Experts shared by ranks give what one rank gives; what does not fit is counted."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from spikingbrain import SpikingBrainConfig, SpikingBrainForCausalLM
from spikingbrain.errors import InputError
from spikingbrain_training.collectives import make_group
from spikingbrain_training.config import Loss
from spikingbrain_training.data import TokenDataset
from spikingbrain_training.expert import dropped_tokens, share_experts
from spikingbrain_training.run import begin_run
from spikingbrain_training.stages import stage_loss

from . import runs
from .conftest import LENGTH, SIZES
from .harness import run_ranks

MOE = {"num_experts": 4, "top_k": 2, "num_shared": 1, "aux_loss": 0.0}


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    path = tmp_path_factory.mktemp("moe")
    torch.manual_seed(3)
    config = SpikingBrainConfig(**SIZES, mixers=["gla"], channel_mixers=["swiglu", "moe"], moe=MOE)
    SpikingBrainForCausalLM(config).save_pretrained(path)
    return path


def of_model(path: Any, data: Any, numbers: list[int], size: int, capacity: float | None) -> tuple[Any, ...]:
    """Loss, gradients, dropped tokens and what was received, of one rank's samples."""
    model = SpikingBrainForCausalLM.from_pretrained(path, dtype=torch.float64).train()
    group = None
    if size > 1:
        dist.init_process_group("gloo")
        group = make_group(dist.get_rank(), size, size)
        numbers = numbers[dist.get_rank() :: size]
        share_experts(model, group, capacity)
    loss = stage_loss(model, None, TokenDataset(data, LENGTH, seed=3).batch(numbers), Loss())
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    for total in (loss.detach(), *gradients) if group else ():
        dist.all_reduce(total)
    return loss.detach(), gradients, dropped_tokens(model), group and dict(group.received)


def close(value: Tensor, expected: Tensor) -> bool:
    return bool((value - expected).abs().max() <= 1e-10 * (1 + expected.abs().max()))


@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_gradients_are_those_of_one_process(moe, data, size):
    loss, gradients, _, _ = of_model(moe, data, [0, 1, 2, 3], 1, None)
    for total, summed, dropped, received in run_ranks(size, of_model, moe, data, [0, 1, 2, 3], size, None):
        assert close(total, loss)
        assert all(map(close, summed, gradients))
        assert dropped == 0
        assert received["all_to_all"] > 0


def test_tokens_beyond_the_capacity_are_counted(moe, data):
    ranks = run_ranks(2, of_model, moe, data, [0, 1, 2, 3], 2, 0.5)
    choices = 4 * LENGTH * MOE["top_k"]
    dropped = sum(count for _, _, count, _ in ranks)
    # An expert takes at most an eighth of all choices.
    assert dropped >= choices - 4 * -(-choices // 8)
    roomy = run_ranks(2, of_model, moe, data, [0, 1, 2, 3], 2, 4.0)
    assert sum(count for _, _, count, _ in roomy) == 0


@pytest.mark.parametrize("zero", [1, 3])
def test_a_run_with_shared_experts_is_the_run_of_one_process(configure, make_config, moe, tokenizer, tmp_path, zero):
    model = {"model": {"init_from": str(moe), "tokenizer": str(tokenizer)}, "steps": 4}
    one = configure(tmp_path / "one", **model, parallel={"zero": 0})
    runs.train(1, one)
    many = make_config(**model, batch={"micro": 1}, parallel={"zero": zero, "expert": 2})
    runs.train(2, many)
    assert runs.losses(many.out)[0] == pytest.approx(runs.losses(one.out)[0], rel=1e-5)
    assert runs.losses(many.out) == pytest.approx(runs.losses(one.out), rel=1e-4)
    assert [row["dropped_tokens"] for row in runs.rows(many.out)] == [0, 0, 0, 0]


def test_experts_that_ranks_cannot_share_are_refused(make_config, moe, ours):
    with pytest.raises(InputError, match="3 ranks cannot share 4 experts"):
        begin_run(make_config(model={"init_from": str(moe)}, parallel={"expert": 3}))
    with pytest.raises(InputError, match="2 ranks cannot share 0 experts"):
        begin_run(make_config(model={"init_from": str(ours)}, parallel={"expert": 2}))
