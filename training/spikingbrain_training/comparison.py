"""Runs side by side, as a table and as curves."""

import json
from pathlib import Path
from typing import Any

from spikingbrain.errors import InputError
from spikingbrain.files import read_json

from . import checkpoint
from .directory import CONFIG, METRICS, MODEL, is_run

COLUMNS = ("run", "stage", "step", "loss", "best", "tokens", "tokens/s", "checkpoints", "state")


def find_runs(folders: list[Path]) -> list[Path]:
    """The runs that `folders` are or hold, sorted; raises `InputError` where there are none."""
    found = [config.parent for folder in folders for config in sorted(folder.rglob(CONFIG)) if is_run(config.parent)]
    if not found:
        raise InputError(f"no runs in {', '.join(map(str, folders))}")
    return found


def rows(run: Path) -> list[dict[str, Any]]:
    """The run's metrics, a row a step that was not left out."""
    file = run / METRICS
    seen = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row for row in seen if "loss" in row]


def summary(run: Path) -> dict[str, Any]:
    """A run in one line of `COLUMNS`."""
    config, seen = read_json(run / CONFIG), rows(run)
    known: dict[str, Any] = {"run": str(run), "stage": config["stage"], "step": f"{len(seen)}/{config['steps']}"}
    if seen:
        seconds = sum(row["seconds"] for row in seen)
        known["loss"] = f"{seen[-1]['loss']:.4f}"
        known["best"] = f"{min(row['loss'] for row in seen):.4f}"
        known["tokens"] = f"{sum(row['tokens'] for row in seen):,}"
        known["tokens/s"] = f"{sum(row['tokens'] for row in seen) / seconds:,.0f}" if seconds else ""
    known["checkpoints"] = ",".join(map(str, reversed(checkpoint.available(run))))
    known["state"] = "finished" if (run / MODEL).exists() else "unfinished"
    return known


def table(runs: list[Path]) -> str:
    """Runs as aligned lines, and the settings in which they differ."""
    lines = [dict(zip(COLUMNS, COLUMNS, strict=True)), *map(summary, runs)]
    widths = {column: max(len(line.get(column, "")) for line in lines) for column in COLUMNS}
    text = ["  ".join(line.get(column, "").ljust(widths[column]) for column in COLUMNS).rstrip() for line in lines]
    return "\n".join(text)


def differences(runs: list[Path]) -> str:
    """Settings in which runs differ, a line each."""
    settings = [flat(read_json(run / CONFIG)) for run in runs]
    names = sorted(set().union(*settings) - {"out"})
    different = [name for name in names if len({json.dumps(known.get(name)) for known in settings}) > 1]
    return "\n".join(f"{name}: {' | '.join(json.dumps(known.get(name)) for known in settings)}" for name in different)


def flat(keys: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `a.b.c`."""
    found: dict[str, Any] = {}
    for key, value in keys.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def plot(runs: list[Path], out: Path) -> None:
    """Write the loss of each run over its tokens to `out`, a picture of the kind its suffix names."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("a plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        seen, tokens = rows(run), 0
        places = []
        for row in seen:
            tokens += row["tokens"]
            places.append(tokens)
        axes.plot(places, [row["loss"] for row in seen], label=str(run))
    axes.set(xlabel="tokens", ylabel="loss (nats a token)")
    axes.legend()
    figure.savefig(out)
