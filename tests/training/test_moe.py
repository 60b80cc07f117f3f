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
BALANCES = {"none": {"aux_loss": 0.0}, "aux loss": {"aux_loss": 0.1}, "loss-free": {"aux_loss": 0.0, "bias_rate": 0.02}}


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
    config = make_config(model={"init_from": str(base)}, steps=40, optim={"lr": 5e-3}, checkpoint={"every": 40})
    runs.train(1, config)
    rows = runs.rows(config.out)
    print(
        balance,
        [round(r["loss"], 2) for r in rows][::8],
        [round(r["expert_load_max"], 2) for r in rows][::4],
        [round(r["expert_load_min"], 2) for r in rows][::4],
        rows[0]["balance_loss"],
        rows[-1]["balance_loss"],
    )
    assert mean(rows[-5:], "loss") < 0.8 * rows[0]["loss"]
