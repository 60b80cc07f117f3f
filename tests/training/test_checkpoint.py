"""A run that was stopped, however, is the run that was not."""

import errno
import os
import shutil
import signal
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spikingbrain.files import read_json
from spikingbrain_training import checkpoint
from spikingbrain_training import train as training
from spikingbrain_training.run import begin_run
from spikingbrain_training.train import train

from . import runs
from .harness import run_ranks

STEPS = 6
OPTIONS = {
    "steps": STEPS,
    "batch": {"micro": 1},
    "checkpoint": {"every": 2, "keep": 2},
    "optim": {"gradient_clipping": 1.0},
}


@pytest.fixture(scope="module")
def undisturbed(configure, tmp_path_factory):
    """`undisturbed(zero)`: the directory of a run that nothing stopped."""

    @cache
    def run(zero: int) -> Path:
        config = configure(tmp_path_factory.mktemp("whole") / "run", **OPTIONS, parallel={"zero": zero})
        runs.train(2, config)
        return config.out

    return run


def assert_same_run(run, reference, *, exactly: bool = True) -> None:
    """Every loss, and what the last checkpoint and the model hold; bitwise, or to 1e-5."""
    tolerance = 0.0 if exactly else 1e-5
    assert runs.losses(run) == pytest.approx(runs.losses(reference), rel=tolerance, abs=0.0)
    for name, tensor in runs.tensors(run / "model").items():
        torch.testing.assert_close(tensor, runs.tensors(reference / "model")[name], rtol=tolerance, atol=tolerance)
    if exactly:
        theirs = runs.checkpoint(reference, STEPS)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in runs.checkpoint(run, STEPS).items())


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_killed_run_goes_on_bitwise(make_config, undisturbed, zero):
    config = make_config(**OPTIONS, parallel={"zero": zero})
    runs.train_until_killed(2, config, 5)
    assert not (config.out / "model").exists()
    assert runs.losses(config.out) == runs.losses(undisturbed(zero))[:5]
    assert "from step 4 to 6" in runs.train(2, config)
    assert_same_run(config.out, undisturbed(zero))


def test_a_run_killed_inside_a_write_goes_on_from_the_checkpoint_before(make_config, undisturbed):
    config = make_config(**OPTIONS)
    begin_run(config)
    assert run_ranks(2, train_until_killed_in_a_write, config) == [None, None]
    left = sorted(path.name for path in (config.out / "checkpoints").iterdir())
    assert left == [".step-4.partial", "step-2"]
    assert "from step 2 to 6" in runs.train(2, config)
    assert_same_run(config.out, undisturbed(1))
    assert sorted(path.name for path in (config.out / "checkpoints").iterdir()) == ["step-4", "step-6"]


def train_until_killed_in_a_write(config) -> None:
    original = checkpoint.save_file

    def save_file(tensors, file) -> None:
        if ".step-4" not in str(file):
            return original(tensors, file)
        file.write_bytes(b"half")
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = save_file
    train(config)


def test_steps_go_on_while_a_checkpoint_is_written(make_config):
    config = make_config(steps=6, checkpoint={"every": 5, "keep": 9})
    begin_run(config)
    # The write of step 5 waits for step 6 to begin, which would never come if the step waited for it.
    assert run_ranks(2, train_with_a_slow_disk, config) == [6, 6]
    assert checkpoint.available(config.out) == [6, 5]


def train_with_a_slow_disk(config) -> int:
    original, one_step, begun = checkpoint.save_file, training.train_step, []

    def save_file(tensors, file) -> None:
        while len(begun) < 6:
            time.sleep(0.01)
        original(tensors, file)

    def train_step(*args):
        begun.append(1)
        return one_step(*args)

    checkpoint.save_file, training.train_step = save_file, train_step
    train(config)
    return len(begun)


def test_the_newest_and_the_milestones_are_kept(make_config):
    config = make_config(steps=7, checkpoint={"every": 1, "keep": 2, "milestones": 3})
    runs.train(2, config)
    assert checkpoint.available(config.out) == [7, 6, 3]


def test_a_run_killed_before_its_first_checkpoint_starts_again(make_config, undisturbed):
    config = make_config(**OPTIONS)
    runs.train_until_killed(2, config, 1)
    assert "from step 0 to 6" in runs.train(2, config)
    assert_same_run(config.out, undisturbed(1))


@pytest.mark.parametrize(("before", "ranks", "zero"), [(1, 4, 2), (3, 1, 0), (1, 2, 3)])
def test_a_run_goes_on_with_other_ranks_and_another_zero_stage(make_config, undisturbed, before, ranks, zero):
    runs.train_until_killed(2, make_config(**OPTIONS, parallel={"zero": before}), 3)
    other = make_config(**OPTIONS, parallel={"processes": ranks, "zero": zero})
    assert "from step 2 to 6" in runs.train(ranks, other)
    assert_same_run(other.out, undisturbed(1), exactly=False)


def test_a_run_goes_on_from_before_a_damaged_checkpoint_and_writes_it_again(make_config, undisturbed):
    config = make_config(**OPTIONS)
    runs.train_until_killed(2, config, 5)
    newest = config.out / "checkpoints" / "step-4"
    flip_a_bit(newest / "rank-1.safetensors")
    said = runs.train(2, config)
    assert "from step 2 to 6" in said
    assert str(newest) in said
    assert_same_run(config.out, undisturbed(1))


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "a flipped bit": lambda newest: flip_a_bit(newest / "rank-1.safetensors"),
    "a cut file": lambda newest: os.truncate(newest / "rank-1.safetensors", 1000),
    "no tensors": lambda newest: (newest / "rank-1.safetensors").unlink(),
    "no index": lambda newest: (newest / "index.json").unlink(),
    "half an index": lambda newest: (newest / "index.json").write_text('{"step": 6, '),
    "an index without a checksum": lambda newest: (newest / "index.json").write_text('{"step": 6}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_chosen(undisturbed, tmp_path, damage):
    run = shutil.copytree(undisturbed(1), tmp_path / "run")
    assert checkpoint.newest_good(run) == (6, [])
    newest = run / "checkpoints" / "step-6"
    DAMAGES[damage](newest)
    step, (complaint,) = checkpoint.newest_good(run)
    assert step == 4
    assert str(newest) in complaint


def test_only_the_newest_checkpoints_are_kept_and_the_model_says_where_it_came_from(make_config, qwen2):
    config = make_config(steps=5, checkpoint={"every": 1, "keep": 2})
    runs.train(2, config)
    assert sorted(path.name for path in (config.out / "checkpoints").iterdir()) == ["step-4", "step-5"]
    provenance = read_json(config.out / "model" / "provenance.json")
    assert provenance["config"]["model"]["init_from"] == str(qwen2)
    assert provenance["steps"] == 5
    assert provenance["tokens"] == sum(row["tokens"] for row in runs.rows(config.out))
    assert provenance["last_loss"] == runs.losses(config.out)[-1]
    assert len(provenance["init_from_sha256"]) == 64


def test_the_model_is_the_last_master_and_loads_with_its_tokenizer(make_config, ours):
    config = make_config(model={"init_from": str(ours)}, parallel={"zero": 3})
    runs.train(2, config)
    model = AutoModelForCausalLM.from_pretrained(config.out / "model")
    last = runs.checkpoint(config.out, config.steps)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, last[f"master/{name}"])
    assert AutoTokenizer.from_pretrained(config.out / "model")("ab").input_ids


def test_a_finished_run_is_left_alone(make_config):
    config = make_config()
    runs.train(2, config)
    before = {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}
    assert "finished" in begin_run(config)
    assert {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()} == before


def test_every_rank_learns_that_the_disk_is_full(make_config):
    config = make_config()
    begin_run(config)
    assert run_ranks(2, train_on_a_full_disk, config) == [errno.ENOSPC, errno.ENOSPC]
    assert not any((config.out / "checkpoints").iterdir())


def train_on_a_full_disk(config) -> int:
    def save_file(_tensors, file) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoint.save_file = save_file
    with pytest.raises(OSError, match="No space left") as error:
        train(config)
    return error.value.errno
