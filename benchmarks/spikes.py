"""Loss against silence on the demo's trained model: `adaptive` at k = 3, `dead_zone` under two targets, other neurons.

Needs what `make demo` leaves in demo-work/. Run by `make bench-spikes` (three paired seeds) and `make bench-spikes-all`
(one seed of every other neuron). Each run starts from the same model, sees the same tokens in the same order for its
seed and has the same teacher; finished runs are not made again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from spikingbrain import registry

DEMO = Path("demo-work")
CONFIG = "configs/train/spike-silence.yaml"
RESULTS = Path("benchmarks/results")
TARGETS = (0.5, 0.65)
# Where training towards silence starts: thresholds spread by sensitivity, without training.
CALIBRATED = 0.5


def spikingbrain(*args: object) -> None:
    """Run a subcommand; raises CalledProcessError if it fails."""
    subprocess.run([str(Path(sys.executable).parent / "spikingbrain"), *map(str, args)], check=True)


def calibrate(work: Path, neuron: str, *settings: str) -> Path:
    """The demo's trained model with calibrated spikes."""
    out = work / f"calibrated-{neuron}"
    if not out.exists():
        texts = ["--text", DEMO / "corpus" / "train", "--glob", "*.py", "--num-texts", 64]
        spikingbrain("spike", DEMO / "pretrain" / "model", out, "--neuron", neuron, *texts, *settings)
    return out


def measure(work: Path, name: str, model: Path, tokens: int) -> dict[str, Any]:
    """Held-out loss and statistics of a model."""
    file = work / f"{name}.json"
    if not file.exists():
        texts = ["--text", DEMO / "corpus" / "heldout", "--glob", "*.py", "--max-tokens", tokens]
        spikingbrain("eval", model, *texts, "--json", file)
    return json.loads(file.read_text())


def train(work: Path, name: str, start: Path, args: argparse.Namespace, seed: int, *settings: str) -> dict[str, Any]:
    """Train one run and measure it."""
    out = work / name
    if not (out / "model").exists():
        common = [f"out={out}", f"seed={seed}", f"steps={args.steps}", f"batch.sequences={args.sequences}"]
        spikingbrain("train", CONFIG, *common, f"model.init_from={start}", *settings)
    return measure(work, name, out / "model", args.tokens)


def neuron_settings(name: str) -> list[str]:
    """What turns the config's run into one of another neuron, without a target."""
    return [f"spiking={{neuron: {name}, code: bitwise}}", "silence=null"]


def main_runs(work: Path, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """`adaptive` and both targets of `dead_zone`, a row a seed."""
    start = calibrate(work, "dead_zone", "--set", "k=6", "--target-silence", str(CALIBRATED))
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in range(args.seeds):
        runs = {"adaptive k=3": (DEMO / "pretrain" / "model", neuron_settings("adaptive"))}
        runs |= {f"dead_zone {target:.0%}": (start, [f"silence.target={target}"]) for target in TARGETS}
        for name, (init, settings) in runs.items():
            slug = f"{name.replace(' ', '-').replace('%', '').replace('=', '')}-{seed}"
            rows.setdefault(name, []).append(train(work, slug, init, args, seed, *settings))
    return rows


def other_runs(work: Path, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """One seed of every other neuron."""
    names = [name for name in registry.names("neurons") if name not in ("adaptive", "dead_zone")]
    return {name: [train(work, name, calibrate(work, name), args, 0, *neuron_settings(name))] for name in names}


def k_table(work: Path, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """`adaptive` at k = 2 to 4 without training, as in the paper's Table 11."""
    rows = {}
    for k in (2, 2.5, 3, 3.5, 4):
        out = work / f"k{k}"
        if not out.exists():
            spikingbrain("spike", DEMO / "pretrain" / "model", out, "--neuron", "adaptive", "--set", f"k={k}")
        rows[f"k={k}, not trained"] = [measure(work, f"k{k}-figures", out, args.tokens)]
    return rows


def summary(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Mean and spread of each figure, and of the loss beside `adaptive` at k = 3 of the same seed."""
    baseline = [row["loss"] for row in rows.get("adaptive k=3", [])]
    table = {}
    for name, runs in rows.items():
        losses = [run["loss"] for run in runs]
        table[name] = {
            "loss": mean(losses),
            "loss_spread": stdev(losses) if len(losses) > 1 else None,
            "seeds": len(runs),
            "unread_weights": mean(run["spikes"]["unread_weights"] for run in runs),
            **{key: mean(run["spikes"]["overall"][key] for run in runs) for key in runs[0]["spikes"]["overall"]},
            "by_encoder": {n: f["silent_channels"] for n, f in runs[0]["spikes"]["encoders"].items()},
        }
        if len(baseline) == len(losses):
            table[name]["loss_over_adaptive"] = mean(a / b - 1 for a, b in zip(losses, baseline, strict=True))
    return table


def plot(table: dict[str, Any], path: Path) -> None:
    """Loss against the share of weights that need not be read."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    for name, row in table.items():
        axis.scatter(row["unread_weights"], row["loss"])
        axis.annotate(name, (row["unread_weights"], row["loss"]), xytext=(4, 4), textcoords="offset points")
    axis.set_xlabel("share of the spiking projections' weights that need not be read")
    axis.set_ylabel("held-out loss, nats a token")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Run, write benchmarks/results/spikes*.json and .svg."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every other neuron too, and the table over k")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--sequences", type=int, default=8, help="sequences of 256 tokens a step")
    parser.add_argument("--tokens", type=int, default=24_576, help="held-out tokens")
    args = parser.parse_args()
    work = DEMO / f"bench-spikes-{args.steps}x{args.sequences}"
    rows = main_runs(work, args)
    if args.all:
        rows |= other_runs(work, args) | k_table(work, args)
    name = "spikes-all" if args.all else "spikes"
    table = summary(rows)
    RESULTS.mkdir(exist_ok=True, parents=True)
    report = {"command": "python benchmarks/spikes.py " + " ".join(sys.argv[1:]), "settings": vars(args), "rows": table}
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(table, RESULTS / f"{name}.svg")


if __name__ == "__main__":
    main()
