"""What tests do inside a rank and read from a run's directory."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from spikingbrain_training import train as training
from spikingbrain_training.checkpoint import PARTS, WRITER_THREAD, Reader
from spikingbrain_training.config import TrainConfig
from spikingbrain_training.run import begin_run

from .harness import run_ranks


def train(ranks: int, config: TrainConfig) -> str:
    """The run of `config` from wherever it is, on so many ranks; returns the line that it began with."""
    said = begin_run(config)
    run_ranks(ranks, training.train, config)
    return said


def train_until_killed(ranks: int, config: TrainConfig, step: int) -> None:
    """As `train`, but every rank is killed before `step` (from 0) begins."""
    begin_run(config)
    run_ranks(ranks, _train_until_killed, config, step)


def _train_until_killed(config: TrainConfig, step: int) -> None:
    original = training.train_step

    def train_step(*args: Any) -> Any:
        if step in args:
            os.kill(os.getpid(), signal.SIGKILL)
        # What was begun is on disk before the step ends, so that tests know from where a run goes on.
        for thread in threading.enumerate():
            if thread.name == WRITER_THREAD:
                thread.join()
        return original(*args)

    training.train_step = train_step
    training.train(config)


def rows(run: Path) -> list[dict[str, Any]]:
    """The run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """The loss of each step; every step stands once and in order."""
    assert [row["step"] for row in rows(run)] == list(range(1, len(rows(run)) + 1))
    return [row["loss"] for row in rows(run)]


def checkpoint(run: Path, step: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint, whole."""
    reader = Reader(run, step)
    return {f"{part}/{name}": reader.whole(part, name) for name in reader.shapes for part in PARTS}


def tensors(model: Path) -> dict[str, Tensor]:
    """The tensors of a model's directory."""
    return load_file(model / "model.safetensors")
