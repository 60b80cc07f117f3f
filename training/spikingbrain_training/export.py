"""A model directory from any checkpoint of a run, with its tokenizer and where it came from."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from spikingbrain.checkpoint import TOKENIZER_FILES, load_config
from spikingbrain.errors import InputError
from spikingbrain.files import new_directory, read_json, write_json

from . import checkpoint
from .config import TrainConfig
from .run import ARCHITECTURE, CONFIG


def export(run: Path, step: int, out: Path) -> None:
    """Write the model of `step` to `out`; raises `InputError` where a checkpoint is missing or damaged."""
    config = TrainConfig.model_validate(read_json(run / CONFIG))
    model = AutoModelForCausalLM.from_config(load_config(run / ARCHITECTURE), dtype=torch.float32)
    checkpoint.load_weights(model, run, step)
    source = config.model.tokenizer or config.model.init_from
    with new_directory(out) as directory:
        model.save_pretrained(directory)
        for name in TOKENIZER_FILES:
            if (source / name).exists() and not (directory / name).exists():
                shutil.copy(source / name, directory / name)
        write_json(directory / "provenance.json", provenance(config, run, step))


def named_step(name: str) -> tuple[Path, int]:
    """`RUN` (its newest whole checkpoint) or `RUN@STEP`; raises `InputError` naming the steps there are."""
    path, _, wanted = name.partition("@")
    run = Path(path)
    if not (run / CONFIG).exists():
        raise InputError(f"{run} holds no run")
    steps = checkpoint.available(run)
    if not wanted:
        step, complaints = checkpoint.newest_good(run)
        if not step:
            raise InputError(f"{run} has no whole checkpoint" + "".join(f"; {complaint}" for complaint in complaints))
        return run, step
    if not wanted.isdigit() or int(wanted) not in steps:
        raise InputError(f"{run} has no checkpoint of step {wanted}; there are {', '.join(map(str, steps)) or 'none'}")
    checkpoint.verify(run / "checkpoints" / f"step-{wanted}")
    return run, int(wanted)


def provenance(config: TrainConfig, run: Path, step: int) -> dict[str, Any]:
    """Where a model came from: the run's config, the hash of its start, and what it saw."""
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    seen = [row for row in rows if row["step"] <= step]
    return {
        "config": config.model_dump(mode="json"),
        "init_from_sha256": _hash(config.model.init_from),
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
