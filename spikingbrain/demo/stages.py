"""Stages that are done once: each says what it depends on, and what is still valid is not made again."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_json, write_json

Figures = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """`make()` writes the files or directories `makes` and returns its figures; `tell` puts them into one line.

    `depends` is what, besides the stages before it, decides whether the result is still valid. A `resumable` stage
    goes on from what an interrupted run left.
    """

    name: str
    make: Callable[[], Figures]
    tell: Callable[[Figures], str]
    makes: tuple[Path, ...] = ()
    depends: str = ""
    resumable: bool = False


class Ledger:
    """Which stages are done, with which key and which figures: `stages.json` in the working directory."""

    def __init__(self, work: Path):
        self.path = work / "stages.json"
        self.entries: dict[str, dict[str, Any]] = read_json(self.path) if self.path.exists() else {}

    def is_done(self, stage: Stage, key: str) -> bool:
        """Whether the stage was finished with this key and what it made is there."""
        entry = self.entries.get(stage.name, {})
        return entry.get("key") == key and "figures" in entry and all(path.exists() for path in stage.makes)

    def begin(self, stage: Stage, key: str) -> None:
        """Note the start; what is left of another key, or cannot be resumed, is removed."""
        if not (stage.resumable and self.entries.get(stage.name, {}).get("key") == key):
            for path in stage.makes:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self._write(stage, {"key": key})

    def finish(self, stage: Stage, key: str, figures: Figures, seconds: float) -> None:
        """Note the figures."""
        self._write(stage, {"key": key, "figures": figures, "seconds": round(seconds, 1)})

    def _write(self, stage: Stage, entry: dict[str, Any]) -> None:
        self.entries[stage.name] = entry
        write_json(self.path, self.entries)


def run_stages(stages: list[Stage], work: Path) -> dict[str, dict[str, Any]]:
    """Run what is not done, one line each; returns every stage's entry of the ledger."""
    work.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(work)
    key = version("spikingbrain")
    for number, stage in enumerate(stages, 1):
        key = hashlib.sha256(json.dumps([key, stage.name, stage.depends]).encode()).hexdigest()
        reused = ledger.is_done(stage, key)
        if not reused:
            ledger.begin(stage, key)
            start = time.perf_counter()
            ledger.finish(stage, key, stage.make(), time.perf_counter() - start)
        entry = ledger.entries[stage.name]
        took = "reused" if reused else f"{entry['seconds']:.0f} s"
        sys.stdout.write(f"[{number:2d}/{len(stages)}] {stage.name:<9} {stage.tell(entry['figures'])} ({took})\n")
        sys.stdout.flush()
    return ledger.entries


def script() -> str:
    """The installed command line of this interpreter."""
    return str(Path(sys.executable).parent / "spikingbrain")


def command(*args: object) -> None:
    """Run a subcommand; its progress shows, its result line is left to the stage. Raises what the subcommand met."""
    done = subprocess.run([script(), *map(str, args)], stdout=subprocess.DEVNULL)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode != 0:
        raise InputError(f"spikingbrain {' '.join(map(str, args))} failed with exit code {done.returncode}")
