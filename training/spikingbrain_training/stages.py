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
from spikingbrain.errors import InputError
from spikingbrain.files import read_json
from spikingbrain.spiking import collect_silence

from .config import Loss, TrainConfig
from .data import IGNORED, Batch


def student_config(config: TrainConfig) -> PreTrainedConfig:
    """The config of the model to train, with spikes where the stage has them; raises `InputError` if there is none."""
    source = config.model.init_from
    ours = _config_file(source) if source.is_file() else load_config(source)
    if config.spiking is None:
        return ours
    if not isinstance(ours, SpikingBrainConfig):
        raise InputError(f"{source} is a {ours.model_type} model; convert it before it can spike")
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
    source, ours = config.model.init_from, student_config(config)
    if source.is_file():
        torch.manual_seed(config.seed)
        return AutoModelForCausalLM.from_config(ours, dtype=torch.float32).train()
    if config.spiking is None:
        return load_model(source, torch.float32).train()
    return spiking_model(source, config.spiking, torch.float32).train()


def make_teacher(path: Path | None) -> Any:
    """The frozen teacher, or None."""
    return None if path is None else load_model(path, torch.float32).requires_grad_(False)


def logits(model: Any, batch: Batch) -> Tensor:
    """`[B * T, vocabulary]`; nothing crosses the edge of a document."""
    module = getattr(model, "module", model)
    if getattr(module, "supports_cu_seqlens", False):
        packed = batch.inputs.flatten()[None]
        return model(input_ids=packed, cu_seqlens=batch.cu_seqlens, use_cache=False).logits.flatten(0, 1)
    return model(
        input_ids=batch.inputs,
        attention_mask=batch.attention_mask,
        position_ids=batch.positions,
        use_cache=False,
    ).logits.flatten(0, 1)


def stage_loss(student: Any, teacher: Any, batch: Batch, loss: Loss) -> Tensor:
    """The batch's summed loss in nats: cross entropy, or KL(teacher || student) with cross entropy besides.

    KL is at `temperature` t and multiplied by t^2, so that its gradient keeps its size (arXiv 1503.02531).
    """
    labels = batch.labels.flatten()
    mine = logits(student, batch)
    if teacher is None:
        return cross_entropy(mine.float(), labels, ignore_index=IGNORED, reduction="sum")
    with torch.no_grad():
        theirs = log_softmax(logits(teacher, batch).float() / loss.temperature, dim=-1)
    counted = labels != IGNORED
    ours = log_softmax(mine.float() / loss.temperature, dim=-1)
    total = kl_div(ours[counted], theirs[counted], reduction="sum", log_target=True) * loss.temperature**2
    if loss.ce_weight:
        total = total + loss.ce_weight * cross_entropy(mine.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total


def step_loss(
    student: Any, teacher: Any, batch: Batch, config: TrainConfig, step: int
) -> tuple[Tensor, Tensor | float]:
    """The batch's summed loss at `step` and, beside it, the pressure towards silence, in nats too."""
    if config.silence is None:
        return stage_loss(student, teacher, batch, config.loss), 0.0
    with collect_silence(getattr(student, "module", student)) as shares:
        loss = stage_loss(student, teacher, batch, config.loss)
    missing = config.silence.wanted(step, config.steps) - torch.stack(shares).sum()
    return loss, config.silence.weight * missing.clamp(min=0) * batch.num_targets
