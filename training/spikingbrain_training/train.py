"""The training loop: build, loop, save. Every process runs this."""

import math
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spikingbrain.errors import InputError
from spikingbrain.experts import record_routing

from . import balance, checkpoint, distributed
from .config import Optim, TrainConfig
from .data import Batch, Samples, micro_batches, open_data
from .directory import MODEL
from .distributed import World
from .expert import dropped_tokens, share_experts
from .export import export
from .faults import NonFinite, expect_progress, skip, skipped
from .flops import flops_per_token
from .metrics import Metrics
from .sequence import Piece, cut
from .stages import make_student, make_teacher, start_of, step_loss
from .watching import first_non_finite, watch


class Interrupted(Exception):
    """A signal asked the run to stop; its last step is saved. `number`: which signal."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def train(config: TrainConfig) -> None:
    """Run or resume `config`; leaves the model in `out/model`. Raises `Interrupted` after a signal."""
    if (config.out / MODEL).exists():
        return
    world = distributed.start(config.out, config.parallel.sequence, config.parallel.expert)
    try:
        _train(config, world)
    except (InputError, OSError, Interrupted):
        distributed.leave()
        raise
    distributed.leave()


def _train(config: TrainConfig, world: World) -> None:
    stop = StopSignal()
    while True:
        try:
            _run(config, world, stop)
        except NonFinite as fault:
            distributed.on_first_rank(world, partial(skip, config.out, fault, config.faults.skips))
        else:
            break
    distributed.on_first_rank(world, lambda: export(config.out, config.steps, config.out / MODEL))


def _run(config: TrainConfig, world: World, stop: "StopSignal") -> None:
    """From the newest whole checkpoint to the last step; raises `NonFinite` where a step came out as NaN."""
    dataset = open_data(config.data, config.seed)
    student, teacher = make_student(config), make_teacher(config.teacher)
    (first,) = distributed.from_first_rank(world, lambda: checkpoint.newest_good(config.out)[:1])
    if first:
        checkpoint.load_weights(student, config.out, first)
    flops = flops_per_token(student, config.data.sequence_length)
    new = distributed.new_parameters(start_of(config))
    if world.expert:
        share_experts(student, world.expert, config.parallel.expert_capacity)
    engine = distributed.make_engine(student, config, world, first, new)
    if first:
        checkpoint.load_moments(engine, world, config.out, first)
    writer = checkpoint.Writer(config.out, world, config.checkpoint)
    metrics = None
    if world.rank == 0:
        metrics = Metrics(config.out, first, config.steps, config.watch, flops, world.size)
    left_out = distributed.from_first_rank(world, lambda: skipped(config.out))
    for step in range(first, config.steps):
        expect_progress(config.faults.hang_seconds)
        if step not in left_out:
            row = train_step(engine, teacher, dataset, config, step, world, metrics)
            if metrics:
                metrics.write(step + 1, **row)
        elif metrics:
            metrics.skip(step + 1, left_out[step])
        _after_step(writer, engine, config, step + 1, world, stop)
    writer.finish()
    expect_progress(0)
    if metrics:
        metrics.close()


def _after_step(
    writer: checkpoint.Writer, engine: Any, config: TrainConfig, done: int, world: World, stop: "StopSignal"
) -> None:
    """Put what is written in place, begin the next checkpoint where it is due, and end where a signal came."""
    stopped, writing = distributed.largest(world, stop.number, writer.busy)
    if writer.pending and not writing:
        writer.finish()
    if stopped or done % config.checkpoint.every == 0 or done == config.steps:
        writer.begin(engine, done)
    if stopped:
        writer.finish()
        expect_progress(0)
        raise Interrupted(stopped)


def train_step(
    engine: Any,
    teacher: Any,
    dataset: Samples,
    config: TrainConfig,
    step: int,
    world: World,
    metrics: Metrics | None = None,
) -> dict[str, float]:
    """One step of the optimizer over the whole batch; returns its row of metrics.

    Raises `NonFinite` on every process where the loss or the gradient's norm is not finite on any.
    """
    batches = step_batches(dataset, config, step, world)
    (targets,) = distributed.total(world, sum(batch.num_targets for batch in batches))
    scale = _set_learning_rate(engine, config, step)
    watched = metrics is not None and step % config.watch.histograms == 0
    sums = balance.Sums.zero(engine.module)
    runs, losses = [], []
    for batch in batches:
        batch = batch.to(world.device)
        runs.append(partial(forward, engine, teacher, batch, config, step))
        (loss, pressure), record, seen = _observed(engine.module, runs[-1], watched)
        losses.append(float(loss.detach()))
        if len(losses) == len(batches):
            _require_finite(losses, runs, engine, step, world)
        unevenness = balance.loss(engine.module, record, batch)
        # DeepSpeed divides by the number of micro batches and of processes; the loss is divided by tokens only.
        engine.backward((loss + unevenness + pressure) * (len(batches) * world.size / targets))
        norm = distributed.take_step(engine)
        sums = sums.add(loss, unevenness, record)
    if norm is not None and not math.isfinite(norm):
        raise NonFinite(step, "in a gradient")
    sums = sums.over_processes(world)
    (dropped,) = distributed.total(world, dropped_tokens(engine.module))
    balance.shift_(engine.module, sums.loads)
    if watched:
        metrics.histograms(step + 1, seen)
    row = {"loss": sums.loss / targets, "lr": config.optim.lr * scale, "grad_norm": norm, "tokens": targets}
    row |= balance.metrics(sums, targets)
    return row | ({"dropped_tokens": int(dropped)} if world.expert else {})


def _set_learning_rate(engine: Any, config: TrainConfig, step: int) -> float:
    """Give every group its rate at `step`; returns the share of the peak rate."""
    scale = learning_rate_scale(config.optim, step, config.steps)
    for group in engine.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
    return scale


def _observed(module: Any, compute: Callable[[], Any], watched: bool) -> tuple[Any, Any, Any]:
    """What `compute` returns, what the routers decided meanwhile, and what histograms are made of if `watched`."""
    context: Any = watch(module) if watched else nullcontext({})
    with context as seen, record_routing(module) as record:
        out = compute()
    return out, record, seen


def forward(
    engine: Any, teacher: Any, batch: Batch | Piece, config: TrainConfig, step: int
) -> tuple[Tensor, Tensor | float]:
    """The summed loss of a micro batch and the pressure towards silence, in the precision that the config asks for."""
    with torch.autocast(batch.labels.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        return step_loss(engine, teacher, batch, config, step)


def _require_finite(
    losses: list[float], runs: Sequence[Callable[[], Any]], engine: Any, step: int, world: World
) -> None:
    """Raise `NonFinite` on every process where a micro batch's loss is not finite on any.

    Once a step, as all wait for the slowest; each runs the same micro batch again, which may exchange what they share.
    """
    bad = [not math.isfinite(loss) for loss in losses]
    (from_last,) = distributed.largest(world, len(bad) - bad.index(True) if any(bad) else 0)
    if from_last:
        found = distributed.everywhere(world, first_non_finite(engine.module, runs[-from_last]))
        raise NonFinite(step, next((place for place in found if place), "in the loss"))


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
