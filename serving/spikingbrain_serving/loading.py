"""A model directory made into an engine; every way in which it can be wrong is an `InputError` of one line."""

import logging
from pathlib import Path
from typing import Any

import torch

from spikingbrain import InputError, SpikingBrainConfig, prepare
from spikingbrain.checkpoint import load_config, load_model, load_tokenizer
from spikingbrain.packing import why_not
from spikingbrain_kernels import KINDS

from .config import EngineConfig
from .engine import Engine

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
PACKINGS = ("auto", "none", *KINDS)


def load_engine(model_dir: str | Path, config: EngineConfig | None = None) -> Engine:
    """The engine for a local model directory; raises `InputError` if the directory or a setting is wrong."""
    config = config or EngineConfig()
    _require_choice("dtype", config.dtype, DTYPES)
    _require_choice("pack", config.pack, PACKINGS)
    device = _device(config.device)
    # What is small is read first, so that a wrong directory is known at once.
    _require_our_model(model_dir)
    tokenizer = load_tokenizer(model_dir)
    model = load_model(model_dir, config.dtype).to(device)
    return Engine(packed(model, config.pack), tokenizer, config)


def packed(model: Any, pack: str) -> Any:
    """The model with weights packed as `EngineConfig.pack` says."""
    reason = why_not(model) if pack == "auto" else None
    if reason is not None:
        logger.info("weights are not packed: %s", reason)
    return model if pack == "none" or reason is not None else prepare(model, pack)


def _require_our_model(model_dir: str | Path) -> None:
    config = load_config(model_dir)
    if not isinstance(config, SpikingBrainConfig):
        raise InputError(
            f"{model_dir} holds a {config.model_type} model, not one of ours; convert it first: "
            f"spikingbrain convert {model_dir} OUT"
        )


def _device(name: str) -> str:
    _require_choice("device", name, DEVICES)
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, but PyTorch sees no GPU")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _require_choice(setting: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"unknown {setting} {value!r}; choose from {', '.join(choices)}")
