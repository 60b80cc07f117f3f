"""What a run refuses before it writes anything, and how it says so."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from spikingbrain.cli import main
from spikingbrain.errors import InputError
from spikingbrain.files import read_json
from spikingbrain_training.commands import data as data_command
from spikingbrain_training.config import load_train_config
from spikingbrain_training.run import begin_run

from . import runs
from .conftest import LENGTHS

SCRIPT = Path(sys.executable).parent / "spikingbrain"


@pytest.fixture
def file(make_config, tmp_path) -> Path:
    """The small run as a file."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(make_config().model_dump(mode="json")))
    return path


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lrr=1", "unknown key optim.lrr; there are lr, new_lr, neuron_lr, betas"),
        ("speed=fast", "unknown key speed; there are out, stage, model"),
        ("steps=many", "steps: .*integer"),
        ("steps", "'steps' is no setting; write a.b=c"),
        ("stage=align", "stage: .*'pretrain', 'distil' or 'spike'"),
        ("stage=distil", "stage distil needs a teacher"),
        ("teacher=somewhere", "stage pretrain has no teacher"),
        ("spiking={neuron: adaptive}", "spiking belongs to stage spike"),
        ("parallel.zero=4", "parallel.zero"),
        ("optim.gradient_clipping=-1", "optim.gradient_clipping"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(file, override, said):
    with pytest.raises(InputError, match=said) as error:
        load_train_config(file, [override])
    assert "\n" not in str(error.value)


def test_settings_replace_those_of_the_file_and_nothing_changes_afterwards(file):
    config = load_train_config(file, ["optim.lr=2e-4", "out=elsewhere", "optim.betas=[0.8, 0.9]"])
    assert (config.optim.lr, config.out, config.optim.betas) == (2e-4, Path("elsewhere"), (0.8, 0.9))
    assert config.optim.weight_decay == 0.1
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 7


def test_a_batch_that_the_processes_cannot_share_is_refused(make_config):
    with pytest.raises(InputError, match="4 is no multiple of 3 x 2"):
        make_config().accumulation(3)


def broken_model(qwen2, tmp_path) -> str:
    path = shutil.copytree(qwen2, tmp_path / "broken")
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-100])
    return str(path)


def test_inputs_that_cannot_be_read_are_named_before_anything_is_written(make_config, qwen2, tmp_path):
    (tmp_path / "other.json").write_text('{"model_type": "nonesuch"}')
    small = tmp_path / "small.json"
    small.write_text((qwen2 / "config.json").read_text().replace('"vocab_size": 257', '"vocab_size": 200'))
    cases = {
        "nowhere is not a model directory": {"model": {"init_from": "nowhere"}},
        "damaged or truncated": {"model": {"init_from": broken_model(qwen2, tmp_path)}},
        "nonesuch": {"model": {"init_from": str(tmp_path / "other.json")}},
        "nowhere/index.json does not exist": {"data": {"path": "nowhere"}},
        "built with 257 tokens, the model knows 200": {"model": {"init_from": str(small)}},
        "no conversion.json": {"optim": {"new_lr": 1e-2}},
        "nowhere is not a model": {"stage": "distil", "teacher": "nowhere"},
        "tokenizer": {"model": {"init_from": str(small), "tokenizer": str(tmp_path)}},
    }
    for said, changes in cases.items():
        with pytest.raises(InputError, match=said):
            begin_run(make_config(**changes))
        assert not make_config().out.exists(), said


def test_a_run_with_other_settings_is_refused_and_the_keys_are_named(make_config):
    begin_run(make_config())
    with pytest.raises(InputError, match=r"another optim\.lr, seed; choose another out"):
        begin_run(make_config(optim={"lr": 2e-3}, seed=12))
    assert read_json(make_config().out / "config.json")["seed"] == 11
    # On how many processes is not what is computed.
    begin_run(make_config(parallel={"processes": 1, "zero": 3}, batch={"micro": 1}))


def test_a_directory_that_holds_something_else_is_refused(make_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(InputError, match="not empty"):
        begin_run(make_config())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_an_unknown_key_is_exit_code_2_and_one_line(file, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(file), "optim.speed=3"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "optim.speed" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


def test_data_is_built_by_the_command_that_says_how_much_there_is(texts, tokenizer, data, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    data_command.add_arguments(parser)
    folder = str(texts[0].parent)
    args = ["build", folder, str(tmp_path / "shard"), "--tokenizer", str(tokenizer), "--glob", "*.txt"]
    data_command.run(parser.parse_args(args))
    assert f"{sum(LENGTHS) + len(LENGTHS)} tokens in {len(LENGTHS)} documents" in capsys.readouterr().out
    assert (tmp_path / "shard" / "tokens.bin").read_bytes() == (data / "tokens.bin").read_bytes()


def test_ctrl_c_is_exit_code_130_and_the_same_command_goes_on_without_a_compiler(file, tmp_path):
    args = [SCRIPT, "train", file, "steps=60", "checkpoint.every=50", "optim.lr=1e-4"]
    environment = {**os.environ, "CXX": "/bin/false", "CC": "/bin/false"}
    process = subprocess.Popen(args, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        time.sleep(0.05)
    # As a terminal does: to the launcher and to every worker.
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert said.endswith("interrupted\n")
    stopped = len(runs.losses(tmp_path / "run"))
    assert 3 <= stopped < 60
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{stopped}"]
    done = subprocess.run(args, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"from step {stopped} to 60" in done.stdout
    assert len(runs.losses(tmp_path / "run")) == 60
    assert not (tmp_path / "run" / "extensions").exists()
