"""A model directory from any checkpoint of a run, with its tokenizer and where it came from."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from spikingbrain.checkpoint import copy_tokenizer, load_config
from spikingbrain.files import new_directory, read_json, write_json

from . import checkpoint
from .config import TrainConfig
from .directory import ARCHITECTURE, CONFIG, METRICS, START


def export(run: Path, step: int, out: Path) -> None:
    """Write the model of `step` to `out`; raises `InputError` where a checkpoint is missing or damaged."""
    config = TrainConfig.model_validate(read_json(run / CONFIG))
    model = AutoModelForCausalLM.from_config(load_config(run / ARCHITECTURE), dtype=torch.float32)
    checkpoint.load_weights(model, run, step)
    with new_directory(out) as directory:
        model.save_pretrained(directory)
        copy_tokenizer(config.model.tokenizer or _start(config, run), directory)
        write_json(directory / "provenance.json", provenance(config, run, step))


def _start(config: TrainConfig, run: Path) -> Path:
    return run / START if (run / START).exists() else config.model.init_from


def provenance(config: TrainConfig, run: Path, step: int) -> dict[str, Any]:
    """Where a model came from: the run's config, the hash of its start, and what it saw."""
    written = [json.loads(row) for row in (run / METRICS).read_text().splitlines()]
    seen = [row for row in written if row["step"] <= step and "loss" in row]
    return {
        "config": config.model_dump(mode="json"),
        "init_from_sha256": _hash(_start(config, run)),
        "steps": step,
        "tokens": sum(row["tokens"] for row in seen),
        "last_loss": seen[-1]["loss"],
    }


def _hash(source: Path) -> str | None:
    """Of the weights that the run began with; None where they are gone."""
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    if not all(file.exists() for file in files):
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(bytes.fromhex(checkpoint.sha256(file)))
    return digest.hexdigest()
