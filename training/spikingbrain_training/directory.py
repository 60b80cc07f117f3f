"""A run's directory: what lies where, and how a run or one of its checkpoints is named."""

from pathlib import Path

from spikingbrain.errors import InputError

from . import checkpoint

# The run's settings, the model it ends with, the config of that model, and what it began with where that was made.
CONFIG, MODEL, ARCHITECTURE, START = "config.json", "model", "architecture", "start"
METRICS, EVENTS = "metrics.jsonl", "tensorboard"


def is_run(path: Path) -> bool:
    """Whether `path` is the directory of a run, or `RUN@STEP`."""
    return (_run(path) / ARCHITECTURE / "config.json").exists()


def _run(path: Path) -> Path:
    return Path(str(path).partition("@")[0])


def named_step(name: str | Path) -> tuple[Path, int]:
    """`RUN` (its newest whole checkpoint) or `RUN@STEP`; raises `InputError` naming the steps there are."""
    run, wanted = _run(Path(name)), str(name).partition("@")[2]
    if not is_run(run):
        raise InputError(f"{run} holds no run")
    if not wanted:
        step, complaints = checkpoint.newest_good(run)
        if not step:
            raise InputError("; ".join([f"{run} has no whole checkpoint", *complaints]))
        return run, step
    steps = checkpoint.available(run)
    if not wanted.isdigit() or int(wanted) not in steps:
        raise InputError(f"{run} has no checkpoint of step {wanted}; there are {', '.join(map(str, steps)) or 'none'}")
    checkpoint.verify(run / "checkpoints" / f"step-{wanted}")
    return run, int(wanted)
