"""A model directory made into an engine; every way in which it can be wrong is an `InputError` of one line."""

from pathlib import Path

import torch

from spikingbrain import InputError, SpikingBrainConfig
from spikingbrain.checkpoint import load_config, load_model, load_tokenizer

from .config import EngineConfig
from .engine import Engine

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")


def load_engine(model_dir: str | Path, config: EngineConfig | None = None) -> Engine:
    """The engine for a local model directory; raises `InputError` if the directory or a setting is wrong."""
    config = config or EngineConfig()
    _require_choice("dtype", config.dtype, DTYPES)
    device = _device(config.device)
    # What is small is read first, so that a wrong directory is known at once.
    _require_our_model(model_dir)
    tokenizer = load_tokenizer(model_dir)
    return Engine(load_model(model_dir, config.dtype).to(device), tokenizer, config)


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
