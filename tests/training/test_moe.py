"""Experts in training: even use, the same loss whatever the division of a batch, and the balance in checkpoints."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from spikingbrain import SpikingBrainConfig, SpikingBrainForCausalLM
from spikingbrain.checkpoint import load_model

from . import runs
from .conftest import SIZES

LAYERS = {
    "mixers": ["gla+sliding_window", "gla+softmax"],
    "channel_mixers": ["swiglu", "moe"],
    "gate": {"tied": True},
    "num_sinks": 3,
    "window": 7,
}
BALANCES = {"none": {"aux_loss": 0.0}, "aux loss": {"aux_loss": 0.5}, "loss-free": {"aux_loss": 0.0, "bias_rate": 0.05}}


@pytest.fixture
def make_base(tmp_path, tokenizer):
    """A model of a dense layer and one with 4 experts, 1 shared; untrained it favours one of them."""

    def make(**moe) -> Path:
        torch.manual_seed(5)
        config = SpikingBrainConfig(**SIZES, **LAYERS, moe={"num_experts": 4, **moe})
        model = SpikingBrainForCausalLM(config)
        path = tmp_path / "base"
        model.save_pretrained(path)
        PreTrainedTokenizerFast.from_pretrained(tokenizer).save_pretrained(path)
        return path

    return make


def mean(rows, name):
    return sum(row[name] for row in rows) / len(rows)


@pytest.mark.parametrize("balance", BALANCES)
def test_a_toy_with_dense_and_expert_layers_learns_and_its_experts_share_the_work(make_base, make_config, balance):
    base = make_base(**BALANCES[balance])
    config = make_config(model={"init_from": str(base)}, steps=70, optim={"lr": 5e-3}, checkpoint={"every": 70})
    runs.train(1, config)
    rows = runs.rows(config.out)
    assert mean(rows[-5:], "loss") < 0.8 * rows[0]["loss"]
    assert rows[0]["expert_load_max"] > 2.3
    fullest, emptiest = mean(rows[-10:], "expert_load_max"), mean(rows[-10:], "expert_load_min")
    if balance == "none":
        assert fullest > 3.5
    else:
        assert fullest < 2
        assert emptiest > 0.2


def test_loss_and_balance_do_not_depend_on_how_a_batch_is_divided(make_base, configure, tmp_path):
    base = make_base(aux_loss=0.3, bias_rate=0.02)
    options = {"model": {"init_from": str(base)}, "steps": 4, "optim": {"lr": 5e-3}}
    seen = []
    for name, ranks, micro, pieces in (("whole", 1, 4, 1), ("divided", 1, 1, 1), ("two", 2, 2, 1), ("cut", 2, 4, 2)):
        config = configure(tmp_path / name, **options, batch={"micro": micro}, parallel={"sequence": pieces})
        runs.train(ranks, config)
        seen.append(runs.rows(config.out))
    for rows in seen[1:]:
        for row, expected in zip(rows, seen[0], strict=True):
            for name in ("loss", "balance_loss", "grad_norm", "expert_load_max", "expert_load_min"):
                assert row[name] == pytest.approx(expected[name], rel=1e-5), name


def test_a_resumed_run_goes_on_with_the_balance_it_had_and_exports_it(make_base, configure, tmp_path):
    base = make_base(aux_loss=0.0, bias_rate=0.25)
    options = {"model": {"init_from": str(base)}, "steps": 4, "optim": {"lr": 5e-3}, "batch": {"micro": 4}}
    straight = configure(tmp_path / "straight", **options)
    runs.train(1, straight)
    stopped = configure(tmp_path / "stopped", **options)
    runs.train_until_killed(1, stopped, 2)
    runs.train(1, stopped)
    assert runs.losses(stopped.out) == runs.losses(straight.out)
    models = [runs.tensors(config.out / "model") for config in (straight, stopped)]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    assert models[0]["model.layers.1.mlp.moe.router.balance_bias"].abs().max() >= 0.25
    assert load_model(stopped.out / "model").config.moe["bias_rate"] == 0.25
