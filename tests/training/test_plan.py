"""What a dry run says, against what is counted."""

import argparse
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from spikingbrain import SpikingBrainConfig, SpikingBrainForCausalLM
from spikingbrain_training.commands import train as train_command
from spikingbrain_training.config import load_train_config
from spikingbrain_training.flops import active_parameters, flops_per_token
from spikingbrain_training.plan import plan

from . import runs
from .conftest import SIZES

CONFIGS = Path(__file__).parents[2] / "configs"
PAPER = sorted(path.name for path in (CONFIGS / "train").glob("7b-*.yaml"))


def test_flops_of_linear_layers_are_those_that_torch_counts(ours):
    model = AutoModelForCausalLM.from_pretrained(ours, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 64, dtype=torch.long), use_cache=False)
    linear = sum(
        count for op, count in counter.get_flop_counts()["Global"].items() if "mm" in str(op) and "bmm" not in str(op)
    )
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert linear == 2 * 64 * weights
    # Norms and biases are in the count of parameters and not in torch's.
    assert active_parameters(model) == pytest.approx(weights, rel=0.02)


def test_only_softmax_grows_with_the_length():
    def flops(mixer: str, length: int) -> float:
        return flops_per_token(SpikingBrainForCausalLM(SpikingBrainConfig(**SIZES, mixers=[mixer], window=8)), length)

    assert flops("gla", 128) == flops("gla", 4096)
    assert flops("sliding_window", 4096) == pytest.approx(flops("sliding_window", 1024), rel=1e-2)
    # Scores and sums of 4 heads of width 8 over half of the tokens more, forward and backward, in two layers.
    assert flops("softmax", 4096) - flops("softmax", 128) == 3 * 2 * 4 * 4 * 8 * (4096 - 128) / 2


def test_memory_and_checkpoints_are_what_a_run_has(make_config):
    config = make_config(parallel={"zero": 1}, steps=3)
    figures = plan(config, 2)
    runs.train(2, config)
    files = (config.out / "checkpoints" / "step-3").glob("*.safetensors")
    assert sum(file.stat().st_size for file in files) == pytest.approx(figures["checkpoint_bytes"], rel=0.2)
    assert figures["checkpoints"] == len(list((config.out / "checkpoints").glob("step-*"))) == 3
    assert figures["tokens"] == 3 * 4 * config.data.sequence_length
    assert figures["parameters"] == sum(tensor.numel() for tensor in runs.tensors(config.out / "model").values())


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_runs_can_be_planned_and_fit_their_devices(name, capsys):
    overrides = [f"model.init_from={CONFIGS / 'models' / 'spikingbrain-7b.json'}", "model.mixers=null"]
    parser = argparse.ArgumentParser()
    train_command.add_arguments(parser)
    train_command.run(parser.parse_args([str(CONFIGS / "train" / name), *overrides, "--dry-run"]))
    assert "7,616,542,976" in capsys.readouterr().out
    figures = plan(load_train_config(CONFIGS / "train" / name, overrides), 256)
    assert figures["tokens"] == pytest.approx(100e9 if name == "7b-8k.yaml" else 25e9, rel=0.01)
    assert sum(size for kind, size in figures["memory"].items() if kind != "host") < 80e9


def test_every_config_is_valid_and_names_its_files():
    for path in (CONFIGS / "train").glob("*.yaml"):
        config = load_train_config(path, [])
        assert config.accumulation(config.parallel.processes) >= 1
        assert "checkpoint" in yaml.safe_load(path.read_text()), path
