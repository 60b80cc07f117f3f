"""The loss of each stage: a sum over the tokens of a batch, so that any division into ranks and batches adds up."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from spikingbrain.calibration import check_target, spiking_model
from spikingbrain.checkpoint import load_config, load_model
from spikingbrain.config import SpikingBrainConfig
from spikingbrain.convert import convert, target_config
from spikingbrain.errors import InputError
from spikingbrain.files import read_json
from spikingbrain.spiking import collect_silence
from spikingbrain_kernels import state_dtype

from .config import Loss, TrainConfig
from .data import IGNORED, Batch
from .directory import ARCHITECTURE, START, is_run, named_step
from .export import export
from .sequence import Piece, StatesAcrossRanks


def start_of(config: TrainConfig) -> Path:
    """What the run begins with: `init_from`, or what `prepare_start` made of it."""
    made = config.out / START
    return made if made.exists() else config.model.init_from


def start_config(config: TrainConfig) -> PreTrainedConfig:
    """The config of what the run begins with, made already or not; raises `InputError` if it cannot be."""
    source = config.model.init_from
    if source.is_file():
        return _config_file(source)
    if is_run(source):
        return load_config(named_step(source)[0] / ARCHITECTURE)
    theirs = load_config(source)
    if config.model.mixers is None:
        return theirs
    if isinstance(theirs, SpikingBrainConfig):
        raise InputError(f"model.mixers: {source} is converted already, with {', '.join(dict.fromkeys(theirs.mixers))}")
    return target_config(theirs, config.model.mixers, config.model.window)


def prepare_start(config: TrainConfig) -> None:
    """Convert the Transformer or export the run that the run begins with, unless that was done before."""
    source, made = config.model.init_from, config.out / START
    if made.exists() or source.is_file():
        return
    if is_run(source):
        export(*named_step(source), made)
    elif config.model.mixers is not None:
        convert(source, made, config.model.mixers, window=config.model.window, seed=config.seed)


def student_config(config: TrainConfig) -> PreTrainedConfig:
    """The config of the model to train, with spikes where the stage has them; raises `InputError` if there is none."""
    ours = start_config(config)
    if config.spiking is None:
        return ours
    if not isinstance(ours, SpikingBrainConfig):
        raise InputError(f"{config.model.init_from} is a {ours.model_type} model; convert it before it can spike")
    if config.silence:
        check_target(config.spiking["neuron"], config.silence.target)
    return type(ours).from_dict({**ours.to_dict(), "spiking": config.spiking})


def _config_file(path: Path) -> PreTrainedConfig:
    keys = read_json(path)
    try:
        return AutoConfig.from_pretrained(path)
    except InputError:
        raise
    except (StrictDataclassError, ValueError, KeyError, TypeError, AttributeError) as error:
        kind = keys.get("model_type") if isinstance(keys, dict) else None
        raise InputError(f"{path} ({kind}): {' '.join(str(error).split())}") from None


def make_student(config: TrainConfig) -> Any:
    """The model to train, fp32; from scratch with the run's seed where `init_from` is a config file."""
    source, ours = start_of(config), student_config(config)
    if source.is_file():
        torch.manual_seed(config.seed)
        return AutoModelForCausalLM.from_config(ours, dtype=torch.float32).train()
    if config.spiking is None:
        return load_model(source, torch.float32).train()
    return spiking_model(source, config.spiking, torch.float32).train()


def make_teacher(path: Path | None) -> Any:
    """The frozen teacher, or None."""
    return None if path is None else load_model(path, torch.float32).requires_grad_(False)


def logits(model: Any, batch: Batch | Piece) -> Tensor:
    """`[B * T, vocabulary]`, or a piece's `[T / P, vocabulary]`; nothing crosses the edge of a document."""
    module = getattr(model, "module", model)
    if isinstance(batch, Piece):
        return model(
            input_ids=batch.batch.inputs,
            position_ids=batch.batch.positions,
            cu_seqlens=batch.batch.cu_seqlens,
            past_key_values=StatesAcrossRanks(module, batch),
            use_cache=False,
        ).logits.flatten(0, 1)
    if getattr(module, "supports_cu_seqlens", False):
        packed = batch.inputs.flatten()[None]
        return model(input_ids=packed, cu_seqlens=batch.cu_seqlens, use_cache=False).logits.flatten(0, 1)
    return model(
        input_ids=batch.inputs,
        attention_mask=batch.attention_mask,
        position_ids=batch.positions,
        use_cache=False,
    ).logits.flatten(0, 1)


def _exact(values: Tensor) -> Tensor:
    """In fp32, or fp64 where they are."""
    return values.to(state_dtype(values.dtype))


def stage_loss(student: Any, teacher: Any, batch: Batch | Piece, loss: Loss) -> Tensor:
    """The batch's summed loss in nats: cross entropy, or KL(teacher || student) with cross entropy besides.

    KL is at `temperature` t and multiplied by t^2, so that its gradient keeps its size (arXiv 1503.02531).
    """
    labels = batch.labels.flatten()
    mine = _exact(logits(student, batch))
    if teacher is None:
        return cross_entropy(mine, labels, ignore_index=IGNORED, reduction="sum")
    with torch.no_grad():
        theirs = log_softmax(_exact(logits(teacher, batch)) / loss.temperature, dim=-1)
    counted = labels != IGNORED
    ours = log_softmax(mine / loss.temperature, dim=-1)
    total = kl_div(ours[counted], theirs[counted], reduction="sum", log_target=True) * loss.temperature**2
    if loss.ce_weight:
        total = total + loss.ce_weight * cross_entropy(mine, labels, ignore_index=IGNORED, reduction="sum")
    return total


def step_loss(
    student: Any, teacher: Any, batch: Batch | Piece, config: TrainConfig, step: int
) -> tuple[Tensor, Tensor | float]:
    """The batch's summed loss at `step` and, beside it, the pressure towards silence, in nats too."""
    if config.silence is None:
        return stage_loss(student, teacher, batch, config.loss), 0.0
    with collect_silence(getattr(student, "module", student)) as silence:
        loss = stage_loss(student, teacher, batch, config.loss)
    missing = config.silence.wanted(step, config.steps) - silence.share()
    return loss, config.silence.weight * missing.clamp(min=0) * batch.num_targets
