"""Our own format, free of topology: each parameter's fp32 master and both moments in pieces, buffers; with checksums.

A checkpoint is a directory `step-N`, complete or absent: a safetensors file from each process, and an index of which
elements of which parameter lie in which file. Any number of processes and any ZeRO stage write and read the same.
"""

import hashlib
import re
import shutil
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from spikingbrain.errors import InputError
from spikingbrain.files import read_json, sync, write_json

from .config import Checkpoint
from .distributed import MOMENTS, World, buffers, local_pieces, on_first_rank, raise_anywhere, set_moment

INDEX = "index.json"
PARTS = ("master", *MOMENTS)
WRITER_THREAD = "checkpoint-writer"
STEP = re.compile(r"step-(\d+)")


class Writer:
    """Writes checkpoints of a run beside the training: a step waits for a copy of the tensors only.

    Every process writes its own pieces into a directory set aside; when all are on disk, the first renames it.
    """

    def __init__(self, run: Path, world: World, settings: Checkpoint):
        self.run, self.world, self.settings = run, world, settings
        self._step = 0
        self._thread: Thread | None = None
        self._error: OSError | None = None

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was begun and is not in place yet."""
        return self._thread is not None

    @property
    def busy(self) -> bool:
        """Whether this process is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, engine: Any, step: int) -> None:
        """Copy this process's pieces of the state after `step` and start writing them."""
        self.finish()
        tensors: dict[str, Tensor] = {}
        pieces: dict[str, tuple[int, int]] = {}
        shapes: dict[str, list[int]] = {}
        for name, shape, start, parts in local_pieces(engine, self.world):
            shapes[name] = list(shape)
            if not parts or not parts["master"].numel():
                continue
            tensors.update({f"{part}/{name}": value.detach().to("cpu", copy=True) for part, value in parts.items()})
            pieces[name] = (start, start + parts["master"].numel())
        for name, buffer in buffers(engine.module).items():
            shapes[name] = list(buffer.shape)
            if self.world.rank == 0:
                tensors[f"master/{name}"] = buffer.flatten().to("cpu", copy=True)
                pieces[name] = (0, buffer.numel())
        self._step = step
        self._thread = Thread(name=WRITER_THREAD, target=self._write, args=(tensors, pieces, shapes))
        self._thread.start()

    @property
    def _aside(self) -> Path:
        return self.run / "checkpoints" / f".step-{self._step}.partial"

    def _write(self, tensors: dict[str, Tensor], pieces: dict[str, Any], shapes: dict[str, list[int]]) -> None:
        name = f"rank-{self.world.rank}.safetensors"
        try:
            self._aside.mkdir(parents=True, exist_ok=True)
            file = self._aside / name
            save_file(tensors, file)
            sync(file)
            report = {"sha256": sha256(file), "bytes": file.stat().st_size, "pieces": pieces, "shapes": shapes}
            write_json(self._aside / f"{name}.json", report)
        except OSError as error:
            self._error = error

    def finish(self) -> None:
        """Wait until what was begun is in place; every process must call it. Raises what any process met."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        try:
            raise_anywhere(self.world, error)
        except OSError:
            on_first_rank(self.world, lambda: shutil.rmtree(self._aside, ignore_errors=True))
            raise
        on_first_rank(self.world, self._commit)

    def _commit(self) -> None:
        files, shapes = {}, {}
        for rank in range(self.world.size):
            report = self._aside / f"rank-{rank}.safetensors.json"
            files[report.stem] = read_json(report)
            shapes.update(files[report.stem].pop("shapes"))
            report.unlink()
        write_json(self._aside / INDEX, {"step": self._step, "parameters": shapes, "files": files})
        sync(self._aside)
        self._aside.rename(self.run / "checkpoints" / f"step-{self._step}")
        sync(self.run / "checkpoints")
        for old in superseded(available(self.run), self.settings):
            shutil.rmtree(self.run / "checkpoints" / f"step-{old}")


def superseded(steps: list[int], settings: Checkpoint) -> list[int]:
    """Which of `steps`, newest first, are not to be kept: neither among the newest nor milestones."""
    every = settings.milestones
    return [step for step in steps[settings.keep :] if every is None or step % every]


def available(run: Path) -> list[int]:
    """Steps of the checkpoints of a run, newest first."""
    found = (STEP.fullmatch(path.name) for path in (run / "checkpoints").glob("step-*"))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def newest_good(run: Path) -> tuple[int, list[str]]:
    """The newest step whose checkpoint is whole (0: none), and what is wrong with newer ones."""
    complaints = []
    for step in available(run):
        try:
            verify(run / "checkpoints" / f"step-{step}")
        except InputError as error:
            complaints.append(str(error))
        else:
            return step, complaints
    return 0, complaints


def verify(directory: Path) -> None:
    """Compare every file with its checksum; raises `InputError` naming the first that is missing or damaged."""
    files = read_json(directory / INDEX).get("files")
    if not files:
        raise InputError(f"{directory / INDEX} has no checksums")
    for name, report in files.items():
        file = directory / name
        if not file.exists() or file.stat().st_size != report["bytes"] or sha256(file) != report["sha256"]:
            raise InputError(f"{file} is missing or damaged")


def discard_unfinished(run: Path, step: int) -> None:
    """Remove checkpoints after `step`, which are damaged, and what a killed run had not finished writing."""
    for newer in available(run):
        if newer > step:
            shutil.rmtree(run / "checkpoints" / f"step-{newer}")
    for partial in (run / "checkpoints").glob(".step-*.partial"):
        shutil.rmtree(partial)


class Reader:
    """The tensors of a checkpoint, whole or any range of their elements, from whichever files hold them."""

    def __init__(self, run: Path, step: int):
        self.directory = run / "checkpoints" / f"step-{step}"
        index = read_json(self.directory / INDEX)
        self.shapes: dict[str, list[int]] = index["parameters"]
        self._pieces: dict[str, list[tuple[int, int, str]]] = {}
        for file, report in index["files"].items():
            for name, (start, stop) in report["pieces"].items():
                self._pieces.setdefault(name, []).append((start, stop, file))
        self._files = {file: safe_open(self.directory / file, framework="pt") for file in index["files"]}

    def read(self, part: str, name: str, start: int, stop: int) -> Tensor:
        """Elements `[stop - start]` of a part of a flattened parameter."""
        values, covered = torch.empty(stop - start), 0
        for begin, end, file in self._pieces.get(name, []):
            low, high = max(start, begin), min(stop, end)
            if low < high:
                held = self._files[file].get_slice(f"{part}/{name}")
                values[low - start : high - start] = held[low - begin : high - begin]
                covered += high - low
        if covered != stop - start:
            raise InputError(f"{self.directory} lacks elements of {part}/{name}")
        return values

    def whole(self, part: str, name: str) -> Tensor:
        """A part of a parameter in its shape."""
        shape = torch.Size(self.shapes[name])
        return self.read(part, name, 0, shape.numel()).view(shape)

    def require(self, names: set[str]) -> None:
        """Raise `InputError` naming the parameters that only one of the model and the checkpoint has."""
        if names != set(self.shapes):
            lacking, surplus = sorted(names - set(self.shapes)), sorted(set(self.shapes) - names)
            raise InputError(f"{self.directory} lacks {lacking} and has {surplus}, which this model lacks")


def load_weights(model: torch.nn.Module, run: Path, step: int) -> None:
    """The weights, into a model that no engine has taken yet; raises `InputError` naming tensors that do not fit."""
    reader = Reader(run, step)
    tensors = {**dict(model.named_parameters()), **buffers(model)}
    reader.require(set(tensors))
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(reader.whole("master", name))


def load_moments(engine: Any, world: World, run: Path, step: int) -> None:
    """Each process its part of the moments, into an engine whose weights are those of `step`."""
    reader = Reader(run, step)
    for name, _, start, parts in local_pieces(engine, world, everywhere=True):
        for moment in MOMENTS if parts else ():
            stop = start + parts[moment].numel()
            set_moment(engine, name, moment, reader.read(moment, name, start, stop))


def sha256(path: Path) -> str:
    """The file's checksum, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
