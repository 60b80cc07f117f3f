"""Our own format, free of topology: for each parameter the fp32 master and both moments, with checksums.

A checkpoint is a directory `step-N`, complete or absent, that any number of processes and any ZeRO stage can read.
"""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from spikingbrain.errors import InputError
from spikingbrain.files import new_directory, read_json, write_json

from .distributed import World, gather_state, on_first_rank, parameters, scatter_state

STATE, INDEX = "state.safetensors", "index.json"


def save(engine: Any, world: World, run: Path, step: int, keep: int) -> None:
    """Write `run/checkpoints/step-N` (rank 0 writes, all take part) and remove all but the newest `keep`."""
    tensors = {}
    for name, parameter in parameters(engine):
        state = gather_state(engine, parameter)
        if world.rank == 0:
            tensors.update({f"{part}/{name}": value.detach().cpu().clone() for part, value in state.items()})

    def write() -> None:
        with new_directory(run / "checkpoints" / f"step-{step}") as directory:
            save_file(tensors, directory / STATE)
            write_json(directory / INDEX, {"step": step, "sha256": _sha256(directory / STATE)})
        for old in available(run)[keep:]:
            shutil.rmtree(run / "checkpoints" / f"step-{old}")

    on_first_rank(world, write)


def available(run: Path) -> list[int]:
    """Steps of the checkpoints of a run, newest first."""
    found = (run / "checkpoints").glob("step-*")
    return sorted((int(path.name.removeprefix("step-")) for path in found), reverse=True)


def newest_good(run: Path) -> tuple[int, list[str]]:
    """The newest step whose checkpoint is whole (0: none), and what is wrong with newer ones."""
    complaints = []
    for step in available(run):
        directory = run / "checkpoints" / f"step-{step}"
        try:
            index = read_json(directory / INDEX)
        except InputError as error:
            complaints.append(str(error))
            continue
        if (directory / STATE).exists() and _sha256(directory / STATE) == index.get("sha256"):
            return step, complaints
        complaints.append(f"{directory / STATE} is missing or damaged")
    return 0, complaints


def discard_newer(run: Path, step: int) -> None:
    """Remove the checkpoints after `step`: damaged, they would stand where the run is to write and count as kept."""
    for newer in available(run):
        if newer > step:
            shutil.rmtree(run / "checkpoints" / f"step-{newer}")


def load(engine: Any, run: Path, step: int) -> None:
    """Put an engine made for `step` where it was after it; raises `InputError` naming tensors that do not fit."""
    tensors = load_file(run / "checkpoints" / f"step-{step}" / STATE)
    for name, parameter in parameters(engine):
        parts = {part: tensors.pop(f"{part}/{name}", None) for part in ("master", "exp_avg", "exp_avg_sq")}
        if any(value is None for value in parts.values()):
            raise InputError(f"the checkpoint of step {step} lacks {name}")
        scatter_state(engine, parameter, {part: value.to(parameter.device) for part, value in parts.items()})
    if tensors:
        raise InputError(f"the checkpoint of step {step} has tensors this model lacks: {', '.join(sorted(tensors))}")


def load_weights(model: torch.nn.Module, run: Path, step: int) -> None:
    """Only the weights, into a model that no engine has taken yet."""
    tensors = load_file(run / "checkpoints" / f"step-{step}" / STATE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"master/{name}"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
