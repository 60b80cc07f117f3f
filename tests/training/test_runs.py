"""Runs are listed, compared, exported and begun from; faults are left out or end with where they were."""

import argparse
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from spikingbrain.errors import InputError
from spikingbrain.files import read_json
from spikingbrain_training import train as training
from spikingbrain_training.commands import runs as runs_command
from spikingbrain_training.faults import skipped
from spikingbrain_training.run import begin_run

from . import runs
from .harness import run_ranks


def command(*args: str) -> None:
    parser = argparse.ArgumentParser()
    runs_command.add_arguments(parser)
    runs_command.run(parser.parse_args(args))


@pytest.fixture(scope="module")
def finished(configure, tmp_path_factory):
    """A run of four steps with a checkpoint after each."""
    config = configure(tmp_path_factory.mktemp("finished") / "run", steps=4)
    runs.train(2, config)
    return config


def test_runs_are_listed_and_compared(finished, configure, tmp_path, capsys):
    other = configure(tmp_path / "other", steps=2, optim={"lr": 2e-3})
    runs.train(1, other)
    command("list", str(finished.out.parent), str(tmp_path))
    listed = capsys.readouterr().out
    assert str(finished.out) in listed
    assert "2/2" in listed
    assert "finished" in listed
    command("compare", str(finished.out), str(other.out), "--plot", str(tmp_path / "losses.svg"))
    compared = capsys.readouterr().out
    assert "optim.lr: 0.001 | 0.002" in compared
    assert f"{runs.losses(other.out)[-1]:.4f}" in compared
    assert "<svg" in (tmp_path / "losses.svg").read_text()
    with pytest.raises(InputError, match="no runs in"):
        command("list", str(tmp_path / "losses.svg"))


def test_any_checkpoint_is_exported_and_says_which_it_is(finished, tmp_path):
    command("export", f"{finished.out}@2", str(tmp_path / "second"))
    second = runs.checkpoint(finished.out, 2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert all(torch.equal(parameter, second[f"master/{name}"]) for name, parameter in model.named_parameters())
    provenance = read_json(tmp_path / "second" / "provenance.json")
    assert (provenance["steps"], provenance["last_loss"]) == (2, runs.losses(finished.out)[1])
    command("export", str(finished.out), str(tmp_path / "last"))
    for name, tensor in runs.tensors(tmp_path / "last").items():
        assert torch.equal(tensor, runs.tensors(finished.out / "model")[name])
    with pytest.raises(InputError, match="no checkpoint of step 9; there are 4, 3, 2, 1"):
        command("export", f"{finished.out}@9", str(tmp_path / "none"))


def test_a_run_begins_from_a_step_of_another_run(finished, make_config):
    config = make_config(model={"init_from": f"{finished.out}@3"}, steps=1, optim={"lr": 1e-9})
    runs.train(2, config)
    third = runs.checkpoint(finished.out, 3)
    for name, tensor in runs.tensors(config.out / "model").items():
        torch.testing.assert_close(tensor, third[f"master/{name}"], rtol=0, atol=1e-7)


def test_a_transformer_is_converted_on_the_way(make_config, qwen2):
    config = make_config(
        model={"init_from": str(qwen2), "mixers": ["gla", "sliding_window"], "window": 7},
        optim={"new_lr": 1e-2},
        parallel={"sequence": 2},
        data={"sequence_length": 28},
    )
    runs.train(2, config)
    model = AutoModelForCausalLM.from_pretrained(config.out / "model")
    assert model.config.mixers == ["gla", "sliding_window"]
    report = read_json(config.out / "start" / "conversion.json")
    before, after = runs.tensors(config.out / "start"), runs.tensors(config.out / "model")
    assert all(not torch.equal(before[name], after[name]) for name in report["new_parameters"])


def test_a_step_that_comes_out_as_nan_is_left_out_and_named(make_config, ours):
    config = make_config(model={"init_from": str(ours)}, steps=5, checkpoint={"every": 2, "keep": 9})
    begin_run(config)
    assert run_ranks(2, train_with_nan, config) == [None, None]
    assert skipped(config.out) == {3: "first in model.layers.1.mixer.k_proj"}
    seen = runs.rows(config.out)
    assert [row["step"] for row in seen] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in seen if "skipped" in row] == [4]
    assert all(math.isfinite(row["loss"]) for row in seen if "loss" in row)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in runs.tensors(config.out / "model").values())


def train_with_nan(config) -> None:
    original = training.train_step

    def train_step(engine, teacher, dataset, config, step, world, metrics=None):
        # One rank only, in the fourth step.
        handles = []
        if step == 3 and world.rank == 1:
            projection = engine.module.get_submodule("model.layers.1.mixer.k_proj")
            handles.append(projection.register_forward_hook(lambda *_: torch.tensor(math.nan).expand(_[2].shape)))
        try:
            return original(engine, teacher, dataset, config, step, world, metrics)
        finally:
            for handle in handles:
                handle.remove()

    training.train_step = train_step
    try:
        training.train(config)
    finally:
        # However a run ends on all ranks: the group's threads would abort an interpreter that is gone.
        assert not torch.distributed.is_initialized()


def test_too_many_such_steps_end_the_run(make_config, ours):
    config = make_config(model={"init_from": str(ours)}, steps=5, faults={"skips": 0})
    begin_run(config)
    said = run_ranks(2, refused, config)
    assert all("step 4: not finite, first in" in line and "0 steps" in line for line in said)


def refused(config) -> str:
    with pytest.raises(InputError) as error:
        train_with_nan(config)
    return str(error.value)


def test_a_run_writes_events_for_tensorboard(finished):
    assert list((finished.out / "tensorboard").glob("events.out.tfevents.*"))
