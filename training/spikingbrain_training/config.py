"""One run is one YAML file: typed, frozen, every key known."""

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spikingbrain.errors import InputError


class Group(BaseModel):
    """A part of the config; unknown keys are errors and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Group):
    """`init_from`: a model directory, a run or RUN@STEP, or a config .json to start from scratch.

    A Transformer is converted on the way where `mixers` (and `window`) are given. `tokenizer`: a directory to copy.
    """

    init_from: Path
    mixers: list[str] | None = None
    window: int | None = Field(default=None, gt=0)
    tokenizer: Path | None = None


class Source(Group):
    """One of several shards, and its weight among them."""

    path: Path
    weight: float = Field(default=1.0, gt=0)


class Data(Group):
    """`path`: what `spikingbrain data build` wrote, or `sources`: several with weights.

    `packing`: "stream" fills every sequence to the end; "whole" cuts no document that fits into one.
    """

    path: Path | None = None
    sources: list[Source] | None = None
    sequence_length: int = Field(gt=0)
    packing: Literal["stream", "whole"] = "stream"

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if (self.path is None) == (not self.sources):
            raise ValueError("data needs either path or sources")
        return self


class Batch(Group):
    """Sequences a step over all processes, and sequences a process holds at once; the rest is accumulated."""

    sequences: int = Field(gt=0)
    micro: int = Field(gt=0)


class Optim(Group):
    """AdamW. `new_lr`: learning rate of the parameters that conversion added; `neuron_lr`: of the neurons' own.

    `gradient_clipping` 0 is off.

    The rate rises over `warmup_steps`, then stays or falls along a cosine to `final_fraction` of its peak.
    """

    lr: float = Field(gt=0)
    new_lr: float | None = Field(default=None, gt=0)
    neuron_lr: float | None = Field(default=None, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    decay: Literal["cosine", "constant"] = "cosine"
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    gradient_clipping: float = Field(default=1.0, ge=0)


class Loss(Group):
    """With a teacher: KL at `temperature`, plus `ce_weight` times the cross entropy of the text."""

    temperature: float = Field(default=1.0, gt=0)
    ce_weight: float = Field(default=0.0, ge=0)


class Silence(Group):
    """Pressure on a spiking model: `weight` nats a token for each missing share of weights that need not be read.

    `target` is the share wanted at the end; what is wanted rises from 0 to it, evenly, over the first `ramp` of the
    steps. The neuron needs thresholds that can be learned.
    """

    target: float = Field(gt=0, lt=1)
    weight: float = Field(default=1.0, gt=0)
    ramp: float = Field(default=0.5, ge=0, le=1)

    def wanted(self, step: int, steps: int) -> float:
        """The share wanted at `step` (from 0): a pure function, so that resuming needs no state."""
        return self.target * min(1.0, (step + 1) / max(1.0, self.ramp * steps))


class Parallel(Group):
    """How a run is laid out; none of it changes what is computed.

    `processes` on this machine (a launcher's world size wins); DeepSpeed's ZeRO stage, `offload_optimizer` to the
    host's memory, `activation_checkpointing` to compute each layer's activations again in the backward pass.
    `sequence`: ranks that share each sequence; `scan`: how the states of linear layers pass between them.
    `expert`: ranks that share the experts; with `expert_capacity` (which does change what is computed) an expert takes
    at most so many times its even share of tokens, and the others are counted.
    """

    processes: int = Field(default=1, gt=0)
    zero: Literal[0, 1, 2, 3] = 1
    sequence: int = Field(default=1, gt=0)
    scan: Literal["all_gather", "pipelined"] = "all_gather"
    expert: int = Field(default=1, gt=0)
    expert_capacity: float | None = Field(default=None, gt=0)
    offload_optimizer: bool = False
    activation_checkpointing: bool = False

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> Self:
        if self.offload_optimizer and self.zero == 0:
            raise ValueError("offload_optimizer needs parallel.zero of at least 1")
        return self


class Watch(Group):
    """`peak_tflops` of one device, to say MFU; `histograms` every so many steps; `wandb`: a project, if wanted."""

    peak_tflops: float | None = Field(default=None, gt=0)
    histograms: int = Field(default=50, gt=0)
    wandb: str | None = None


class Faults(Group):
    """`skips`: steps that may be left out because they came out as NaN; `restarts` after a process died.

    A process in which no step ends within `hang_seconds` ends itself and shows where it stood.
    """

    skips: int = Field(default=10, ge=0)
    restarts: int = Field(default=0, ge=0)
    hang_seconds: float = Field(default=3600.0, gt=0)


class Checkpoint(Group):
    """Every how many steps one is written; the newest `keep` stay, and each at a multiple of `milestones` steps."""

    every: int = Field(default=100, gt=0)
    keep: int = Field(default=2, gt=0)
    milestones: int | None = Field(default=None, gt=0)


class TrainConfig(Group):
    """A complete run. `out` holds its checkpoints, metrics and, at the end, the model.

    `precision` bf16: matrix products in bf16; parameters (decays and gates too), moments, states and losses stay fp32.
    """

    out: Path
    stage: Literal["pretrain", "distil", "spike"]
    model: Model
    data: Data
    batch: Batch
    optim: Optim
    steps: int = Field(gt=0)
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    teacher: Path | None = None
    spiking: dict[str, Any] | None = None
    loss: Loss = Loss()
    silence: Silence | None = None
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    watch: Watch = Watch()
    faults: Faults = Faults()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.stage == "distil" and self.teacher is None:
            raise ValueError("stage distil needs a teacher")
        if self.stage == "pretrain" and self.teacher is not None:
            raise ValueError("stage pretrain has no teacher; choose distil or spike")
        if (self.stage == "spike") != (self.spiking is not None):
            raise ValueError("spiking belongs to stage spike, and stage spike needs it")
        if self.silence and not self.spiking:
            raise ValueError("silence belongs to stage spike")
        return self

    def accumulation(self, processes: int) -> int:
        """Micro batches a step on each of `processes`; raises `InputError` if they do not divide the batch."""
        shared = self.parallel.sequence
        if processes % shared:
            raise InputError(f"{processes} processes are no multiple of parallel.sequence {shared}")
        if processes % self.parallel.expert:
            raise InputError(f"{processes} processes are no multiple of parallel.expert {self.parallel.expert}")
        tokens = self.batch.micro * self.data.sequence_length
        if tokens % shared:
            raise InputError(f"{shared} ranks cannot share {tokens} tokens evenly (batch.micro x sequence_length)")
        replicas = processes // shared
        if self.batch.sequences % (self.batch.micro * replicas):
            raise InputError(
                f"batch.sequences {self.batch.sequences} is no multiple of {replicas} x {self.batch.micro}"
            )
        return self.batch.sequences // (self.batch.micro * replicas)


def load_train_config(path: str | Path, overrides: list[str]) -> TrainConfig:
    """Read `path`, apply `a.b=c` settings; raises `InputError` naming what is wrong and the keys there are."""
    try:
        keys = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(keys, dict):
        raise InputError(f"{path} holds no settings")
    for override in overrides:
        _override(keys, override)
    try:
        return TrainConfig.model_validate(keys)
    except ValidationError as error:
        raise InputError(f"{path}: " + "; ".join(_describe(problem) for problem in error.errors())) from None


def _override(keys: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals:
        raise InputError(f"{override!r} is no setting; write a.b=c")
    *groups, last = name.split(".")
    for group in groups:
        keys = keys.setdefault(group, {})
        if not isinstance(keys, dict):
            raise InputError(f"{override!r}: {group} is no group of settings")
    keys[last] = yaml.safe_load(value)


def _describe(problem: Any) -> str:
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] != "extra_forbidden":
        return f"{place}: {problem['msg']}" if place else problem["msg"].removeprefix("Value error, ")
    group: Any = TrainConfig
    for name in problem["loc"][:-1]:
        group = group.model_fields[name].annotation
    return f"unknown key {place}; there are {', '.join(group.model_fields)}"
