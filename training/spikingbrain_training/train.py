"""The training loop: build, loop, save. Every process runs this."""

import math
import signal
from typing import Any

import torch

from spikingbrain.experts import record_routing

from . import balance, checkpoint, distributed
from .config import Optim, TrainConfig
from .data import Batch, Samples, micro_batches, open_data
from .distributed import World
from .export import export
from .metrics import Metrics
from .run import MODEL
from .sequence import Piece, cut
from .stages import make_student, make_teacher, stage_loss


class Interrupted(Exception):
    """A signal asked the run to stop; its last step is saved. `number`: which signal."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def train(config: TrainConfig) -> None:
    """Run or resume `config`; leaves the model in `out/model`. Raises `Interrupted` after a signal."""
    if (config.out / MODEL).exists():
        return
    world = distributed.start(config.out, config.parallel.sequence)
    stop = StopSignal()
    dataset = open_data(config.data, config.seed)
    student = make_student(config)
    teacher = make_teacher(config.teacher)
    (first,) = distributed.from_first_rank(world, lambda: checkpoint.newest_good(config.out)[:1])
    if first:
        checkpoint.load_weights(student, config.out, first)
    engine = distributed.make_engine(student, config, world, first)
    if first:
        checkpoint.load_moments(engine, world, config.out, first)
    writer = checkpoint.Writer(config.out, world, config.checkpoint)
    metrics = Metrics(config.out, first, config.steps) if world.rank == 0 else None
    for step in range(first, config.steps):
        row = train_step(engine, teacher, dataset, config, step, world)
        if metrics:
            metrics.write(step + 1, **row)
        stopped, writing = distributed.largest(world, stop.number, writer.busy)
        if writer.pending and not writing:
            writer.finish()
        if stopped or (step + 1) % config.checkpoint.every == 0 or step + 1 == config.steps:
            writer.begin(engine, step + 1)
        if stopped:
            writer.finish()
            raise Interrupted(stopped)
    writer.finish()
    if metrics:
        metrics.close()
    distributed.on_first_rank(world, lambda: export(config.out, config.steps, config.out / MODEL))


def train_step(
    engine: Any, teacher: Any, dataset: Samples, config: TrainConfig, step: int, world: World
) -> dict[str, float]:
    """One step of the optimizer over the whole batch; returns its row of metrics."""
    batches = step_batches(dataset, config, step, world)
    (targets,) = distributed.total(world, sum(batch.num_targets for batch in batches))
    scale = learning_rate_scale(config.optim, step, config.steps)
    for group in engine.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
    sums = balance.Sums.zero(engine.module)
    for batch in batches:
        with (
            torch.autocast(world.device.type, torch.bfloat16, enabled=config.precision == "bf16"),
            record_routing(engine.module) as record,
        ):
            loss = stage_loss(engine, teacher, batch.to(world.device), config.loss)
        unevenness = balance.loss(engine.module, record, len(batch.labels))
        # DeepSpeed divides by the number of micro batches and of processes; the loss is divided by tokens only.
        engine.backward((loss + unevenness) * (len(batches) * world.size / targets))
        norm = distributed.take_step(engine)
        sums = sums.add(loss, unevenness, record)
    sums = sums.over_processes(world)
    balance.shift_(engine.module, sums.loads)
    return {
        "loss": sums.loss / targets,
        "lr": config.optim.lr * scale,
        "grad_norm": norm,
        "tokens": targets,
        **balance.metrics(sums, targets),
    }


def step_batches(dataset: Samples, config: TrainConfig, step: int, world: World) -> list[Batch] | list[Piece]:
    """This process's micro batches of a step, or its pieces of them."""
    whole = micro_batches(dataset, step, config.batch.sequences, config.batch.micro, *world.replica)
    if world.sequence is None:
        return whole
    return [cut(batch, world.sequence, config.parallel.scan) for batch in whole]


def learning_rate_scale(optim: Optim, step: int, steps: int) -> float:
    """The share of the peak rate at `step` (from 0): a pure function, so that resuming needs no schedule's state."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.decay == "constant":
        return 1.0
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    return optim.final_fraction + (1 - optim.final_fraction) * (1 + math.cos(math.pi * progress)) / 2


class StopSignal:
    """SIGINT and SIGTERM end the run after the step in hand. `number`: the signal that came, or 0."""

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: Any) -> None:
        self.number = self.number or number
