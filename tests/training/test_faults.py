"""A run whose processes die or hang: started again from its last checkpoint, or ended with the stacks."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

from spikingbrain_training.config import Watch
from spikingbrain_training.metrics import Metrics

from . import runs

SCRIPT = Path(sys.executable).parent / "spikingbrain"


@pytest.fixture
def start(make_config, tmp_path):
    """Start the small run, with settings replaced, and wait until it has done some steps; gives process and workers."""
    started = []

    def start(*settings, steps=3):
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(make_config().model_dump(mode="json")))
        args = [SCRIPT, "train", file, *settings]
        process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        metrics = tmp_path / "run" / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= steps):
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        return process, [child for child in children if "spikingbrain_training.worker" in child.cmdline()]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()


def test_a_process_that_dies_is_started_again_from_the_last_checkpoint(start, tmp_path):
    process, workers = start("steps=40", "faults.restarts=1", "checkpoint.every=2")
    workers[1].kill()
    said = process.communicate(timeout=180)[1]
    assert process.returncode == 0, said
    assert [row["step"] for row in runs.rows(tmp_path / "run")] == list(range(1, 41))
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_without_restarts_the_run_ends_and_says_which_process_died(start):
    process, workers = start("steps=400")
    workers[1].kill()
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert "training stopped: process 1 ended with exit code -9" in said


def test_a_run_that_hangs_ends_itself_and_shows_where_every_thread_stood(start):
    process, workers = start("steps=400", "faults.hang_seconds=6")
    workers[1].send_signal(signal.SIGSTOP)
    said = process.communicate(timeout=180)[1]
    assert process.returncode == 2
    assert "Timeout (0:00:06)!" in said
    assert "most recent call first" in said
    assert "spikingbrain_training/train.py" in said
    assert "training stopped: process 0" in said


def test_wandb_gets_the_rows_where_a_project_is_named(monkeypatch, tmp_path):
    seen = {}

    class Run:
        def log(self, figures, step):
            seen[step] = figures

        def finish(self):
            seen["finished"] = True

    def init(**settings):
        seen["settings"] = settings
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    metrics = Metrics(tmp_path, 0, 2, Watch(wandb="spikes"), 1e6, 1)
    metrics.write(1, tokens=64, loss=2.5, grad_norm=None)
    metrics.close()
    assert seen["settings"]["project"] == "spikes"
    assert seen[1]["loss"] == 2.5
    assert "grad_norm" not in seen[1]
    assert seen["finished"]
