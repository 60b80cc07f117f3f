"""The training loop: build, loop, save. Every process runs this."""

import hashlib
import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import torch

from spikingbrain.checkpoint import TOKENIZER_FILES
from spikingbrain.files import new_directory, write_json

from . import checkpoint, distributed
from .config import Optim, TrainConfig
from .data import TokenDataset, micro_batches
from .distributed import World
from .metrics import Metrics
from .stages import make_student, make_teacher, step_loss


class Interrupted(Exception):
    """A signal asked the run to stop; its last step is saved. `number`: which signal."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def train(config: TrainConfig) -> None:
    """Run or resume `config`; leaves the model in `out/model`. Raises `Interrupted` after a signal."""
    if (config.out / "model").exists():
        return
    world = distributed.start(config.out)
    stop = StopSignal()
    dataset = TokenDataset(config.data.path, config.data.sequence_length, config.seed)
    student = make_student(config)
    teacher = make_teacher(config.teacher)
    first, _ = checkpoint.newest_good(config.out)
    if first:
        checkpoint.load_weights(student, config.out, first)
    engine = distributed.make_engine(student, config, world, first)
    if first:
        checkpoint.load(engine, config.out, first)
    metrics = Metrics(config.out, first, config.steps) if world.rank == 0 else None
    for step in range(first, config.steps):
        row = train_step(engine, teacher, dataset, config, step, world)
        if metrics:
            metrics.write(step + 1, **row)
        stopped = stop.agreed(world)
        if stopped or (step + 1) % config.checkpoint.every == 0 or step + 1 == config.steps:
            checkpoint.save(engine, world, config.out, step + 1, config.checkpoint.keep)
        if stopped:
            raise Interrupted(stopped)
    if metrics:
        metrics.close()
    export(engine, config, world)


def train_step(
    engine: Any, teacher: Any, dataset: TokenDataset, config: TrainConfig, step: int, world: World
) -> dict[str, float]:
    """One step of the optimizer over the whole batch; returns its row of metrics."""
    batches = micro_batches(dataset, step, config.batch.sequences, config.batch.micro, world.rank, world.size)
    (targets,) = distributed.total(world, sum(batch.num_targets for batch in batches))
    scale = learning_rate_scale(config.optim, step, config.steps)
    for group in engine.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
    summed = 0.0
    for batch in batches:
        loss, pressure = step_loss(engine, teacher, type(batch)(*(x.to(world.device) for x in batch)), config, step)
        # DeepSpeed divides by the number of micro batches and of processes; the loss is divided by tokens only.
        engine.backward((loss + pressure) * (len(batches) * world.size / targets))
        norm = distributed.take_step(engine)
        summed += float(loss.detach())
    (summed,) = distributed.total(world, summed)
    return {
        "loss": summed / targets,
        "lr": config.optim.lr * scale,
        "grad_norm": norm,
        "tokens": targets,
    }


def learning_rate_scale(optim: Optim, step: int, steps: int) -> float:
    """The share of the peak rate at `step` (from 0): a pure function, so that resuming needs no schedule's state."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.decay == "constant":
        return 1.0
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    return optim.final_fraction + (1 - optim.final_fraction) * (1 + math.cos(math.pi * progress)) / 2


class StopSignal:
    """SIGINT and SIGTERM end the run after the step in hand; all processes agree on which step that is."""

    def __init__(self) -> None:
        self._number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: Any) -> None:
        self._number = self._number or number

    def agreed(self, world: World) -> int:
        """The signal that any process got, or 0."""
        number = torch.tensor(self._number, device=world.device)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        return int(number)


def export(engine: Any, config: TrainConfig, world: World) -> None:
    """Write the trained model, its tokenizer and where it came from to `out/model`."""
    tensors = {name: distributed.gather_state(engine, p)["master"].cpu() for name, p in distributed.parameters(engine)}
    # Buffers that a neuron measured once belong to the model; state_dict leaves out those that are computed.
    stored = engine.module.state_dict()
    tensors |= {name: buffer.cpu() for name, buffer in engine.module.named_buffers() if name in stored}

    def write() -> None:
        source = config.model.tokenizer or config.model.init_from
        with new_directory(config.out / "model") as directory:
            engine.module.save_pretrained(directory, state_dict=tensors)
            for name in TOKENIZER_FILES:
                if (source / name).exists() and not (directory / name).exists():
                    shutil.copy(source / name, directory / name)
            write_json(directory / "provenance.json", provenance(config))

    distributed.on_first_rank(world, write)


def provenance(config: TrainConfig) -> dict[str, Any]:
    """Where a model came from: the run's config, the hash of its start, and what it saw."""
    rows = [json.loads(row) for row in (config.out / "metrics.jsonl").read_text().splitlines()]
    return {
        "config": config.model_dump(mode="json"),
        "init_from_sha256": _hash(config.model.init_from),
        "steps": config.steps,
        "tokens": sum(row["tokens"] for row in rows),
        "last_loss": rows[-1]["loss"],
    }


def _hash(source: Path) -> str:
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
