"""Loss against silence on the demo's trained model: `adaptive` at k = 3, `dead_zone` under two targets, other neurons.

    python benchmarks/spikes.py trained      three paired seeds of `adaptive` and of `dead_zone` at 50 and 65 %
    python benchmarks/spikes.py others       one seed of these and of every other neuron, in one plot
    python benchmarks/spikes.py untrained    tables over k and over calibrated silence, and the readings at k = 3

Needs what `make demo` leaves in demo-work/. Each trained run starts from the same model, the demo's with its residual
stream along its principal axes (the same function), sees the same tokens in the same order for its seed and has the
same teacher and learning rates. What is finished is not made again, and an interrupted run goes on from its last
checkpoint. Writes benchmarks/results/spikes-PART.json and .svg, prints a table.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from spikingbrain import registry

CONFIG = "configs/train/spike-silence.yaml"
TARGETS = (0.5, 0.65)
# Training towards silence holds this much more than its target, so that held-out text has it too.
MARGIN = 0.002
KS = (2, 2.5, 3, 3.5, 4)
CALIBRATED = (0.3, 0.5, 0.65, 0.8)
BASELINE = "adaptive k=3"

Runs = dict[str, list[dict[str, Any]]]


class Bench:
    """Makes what a part asks for in `work`, from what the demo left in `demo`."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.demo = Path(args.demo)
        self.plain = self.demo / "pretrain" / "model"
        self.work = self.demo / f"bench-spikes-{args.steps}x{args.sequences}"
        self.work.mkdir(parents=True, exist_ok=True)

    def command(self, log: str, *words: object) -> None:
        """Run a subcommand, its output in `log`; raises CalledProcessError if it fails."""
        with (self.work / f"{log}.log").open("a") as file:
            subprocess.run(
                [str(Path(sys.executable).parent / "spikingbrain"), *map(str, words)],
                check=True,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def texts(self, split: str) -> list[object]:
        """Where the texts of a split are, as options."""
        return ["--text", self.demo / "corpus" / split, "--glob", "*.py"]

    @property
    def rotated(self) -> Path:
        """The demo's trained model along its principal axes."""
        out = self.work / "rotated"
        if not out.exists():
            self.command("rotated", "rotate", self.plain, out, *self.texts("train"), "--num-texts", 64)
        return out

    def calibrate(self, model: Path, neuron: str, *settings: str, name: str = "") -> Path:
        """A model with calibrated spikes."""
        name = f"calibrated-{name or neuron}"
        if not (self.work / name).exists():
            # `adaptive` has nothing to measure.
            texts = [] if neuron == "adaptive" else [*self.texts("train"), "--num-texts", 64]
            self.command(name, "spike", model, self.work / name, "--neuron", neuron, *texts, *settings)
        return self.work / name

    def measure(self, name: str, model: Path) -> dict[str, Any]:
        """Held-out loss and statistics of a model."""
        file = self.work / f"{name}.json"
        if not file.exists():
            self.command(name, "eval", model, *self.texts("heldout"), "--max-tokens", self.args.tokens, "--json", file)
        return json.loads(file.read_text())

    def train(self, name: str, start: Path, seed: int, *settings: str) -> dict[str, Any]:
        """Train one run and measure it."""
        out = self.work / name
        if not (out / "model").exists():
            size = [f"steps={self.args.steps}", f"batch.sequences={self.args.sequences}"]
            places = [f"model.init_from={start}", f"teacher={self.plain}", f"data.path={self.demo / 'data'}"]
            self.command(name, "train", CONFIG, f"out={out}", f"seed={seed}", *size, *places, *settings)
        return self.measure(name, out / "model")

    def trained(self) -> Runs:
        """`adaptive` and both targets of `dead_zone`, a row a seed; thresholds start where the target is met."""
        rows: Runs = {BASELINE: [], **{f"dead_zone {target:.0%}": [] for target in TARGETS}}
        for seed in range(self.args.seeds):
            rows[BASELINE].append(self.train(f"adaptive-k3-{seed}", self.rotated, seed, *of_neuron("adaptive")))
            for target in TARGETS:
                wanted = [f"silence.target={target + MARGIN}", "silence.ramp=0"]
                start = self.silent(self.rotated, target)
                run = self.train(f"dead_zone-{target * 100:.0f}-{seed}", start, seed, *wanted)
                rows[f"dead_zone {target:.0%}"].append(run)
        return rows

    def silent(self, model: Path, target: float) -> Path:
        """`dead_zone` calibrated to a share of silence, spread by sensitivity."""
        settings = ["--set", "k=6", "--target-silence", str(target)]
        name = f"dead_zone-{target * 100:.0f}" + ("-plain" if model == self.plain else "")
        return self.calibrate(model, "dead_zone", *settings, name=name)

    def others(self) -> Runs:
        """`trained`, and one seed of every other neuron and of what is not rotated."""
        names = [name for name in registry.names("neurons") if name not in ("adaptive", "dead_zone")]
        rows = self.trained()
        rows |= {n: [self.train(f"{n}-0", self.calibrate(self.rotated, n), 0, *of_neuron(n))] for n in names}
        rows["adaptive k=3, not rotated"] = [self.train("adaptive-k3-plain-0", self.plain, 0, *of_neuron("adaptive"))]
        return rows

    def untrained(self) -> Runs:
        """`adaptive` at k = 2 to 4, as in the paper's Table 11, and `dead_zone` calibrated to shares of silence."""
        rows = {"dense": [self.measure("untrained-dense", self.plain)]}
        for k in KS:
            start = self.calibrate(self.plain, "adaptive", "--set", f"k={k}", name=f"k{k}")
            rows[f"adaptive k={k}"] = [self.measure(f"untrained-k{k}", start)]
        for target in CALIBRATED:
            for model, note in ((self.rotated, ""), (self.plain, ", not rotated")):
                start = self.silent(model, target)
                rows[f"dead_zone {target:.0%}{note}"] = [self.measure(f"un{start.name}", start)]
        return rows

    def readings(self) -> dict[str, Any]:
        """Every reading of "sparsity" at k = 3: noise, and the model's own activations."""
        file = self.work / "energy.json"
        if not file.exists():
            start = self.calibrate(self.plain, "adaptive", "--set", "k=3", name="k3")
            self.command("energy", "energy", start, *self.texts("heldout"), "--json", file)
        return json.loads(file.read_text())["readings"]


def of_neuron(name: str) -> list[str]:
    """What turns the config's run into one of another neuron, without a target."""
    return [f"spiking={{neuron: {name}, code: bitwise}}", "silence=null"]


def spread(values: list[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (None of one value), and the values, seed by seed."""
    return {"mean": mean(values), "spread": stdev(values) if len(values) > 1 else None, "seeds": values}


def summary(rows: Runs) -> dict[str, Any]:
    """Each figure over the seeds; the loss also beside `adaptive` at k = 3 of the same seed (or of no training)."""
    baseline = [row["loss"] for row in rows.get(BASELINE, [])]
    table = {}
    for name, runs in rows.items():
        losses = [run["loss"] for run in runs]
        table[name] = {"loss": spread(losses)}
        if len(baseline) == len(losses):
            table[name]["loss_over_adaptive"] = spread([a / b - 1 for a, b in zip(losses, baseline, strict=True)])
        if runs[0]["spikes"]:
            table[name] |= firing([run["spikes"] for run in runs])
    return table


def firing(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Named statistics; `by_encoder` are silent channels, `counts_up_to_7` a mean over encoders."""
    encoders = runs[0]["encoders"]
    small = [sum(f["histogram"][:8]) for run in runs for f in run["encoders"].values()]
    sent = [f["spikes_per_channel"] for run in runs for f in run["encoders"].values()]
    return {
        "unread_weights": spread([run["unread_weights"] for run in runs]),
        **{key: mean(run["overall"][key] for run in runs) for key in runs[0]["overall"]},
        "spikes_per_channel": mean(sent),
        "counts_up_to_7": mean(small),
        "by_encoder": {n: mean(run["encoders"][n]["silent_channels"] for run in runs) for n in encoders},
    }


def lines(table: dict[str, Any]) -> list[str]:
    """A Markdown table."""
    text = [
        "| run | loss | beside adaptive k = 3 | weights not read | silent channels | mean count |",
        "|---" * 6 + "|",
    ]
    for name, row in table.items():
        over, unread = row.get("loss_over_adaptive"), row.get("unread_weights")
        cells = [name, _number(row["loss"], "{:.4f}"), _number(over, "{:+.2%}"), _number(unread, "{:.1%}")]
        cells += [f"{row['silent_channels']:.1%}", f"{row['mean_spikes']:.2f}"] if unread else ["", ""]
        text.append("| " + " | ".join(cells) + " |")
    return text


def _number(figure: dict[str, Any] | None, form: str) -> str:
    if figure is None:
        return ""
    spread_text = "" if figure["spread"] is None else " ± " + form.format(figure["spread"]).lstrip("+")
    return form.format(figure["mean"]) + spread_text


def plot(table: dict[str, Any], path: Path) -> None:
    """Loss against the share of weights that need not be read, and silent channels by encoder."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 9), layout="constrained")
    loss, layers = figure.subplots(2)
    for name, row in table.items():
        if "unread_weights" not in row:
            loss.axhline(row["loss"]["mean"], linestyle="--", color="#94a3b8", label=name)
            continue
        x, y = row["unread_weights"], row["loss"]
        loss.errorbar(x["mean"], y["mean"], xerr=x["spread"] or 0, yerr=y["spread"] or 0, fmt="o", label=name)
        labels = [n.removeprefix("model.layers.").replace(".encoders.", " ") for n in row["by_encoder"]]
        layers.plot(labels, list(row["by_encoder"].values()), "o-", linewidth=0.8, markersize=3, label=name)
    loss.set(xlabel="share of the spiking projections' weights not read", ylabel="held-out loss, nats a token")
    layers.set(ylabel="silent channels")
    layers.tick_params(axis="x", rotation=90, labelsize=7)
    loss.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Run a part and write its files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["trained", "others", "untrained"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--sequences", type=int, default=8, help="sequences of 256 tokens a step")
    parser.add_argument("--tokens", type=int, default=49_152, help="held-out tokens")
    parser.add_argument("--demo", default="demo-work", help="what the demo left")
    parser.add_argument("--results", default="benchmarks/results")
    args = parser.parse_args()
    bench = Bench(args)
    table = summary(getattr(bench, args.part)())
    report = {"command": "python benchmarks/spikes.py " + " ".join(sys.argv[1:]), "settings": vars(args), "rows": table}
    if args.part == "untrained":
        report["readings at k = 3"] = bench.readings()
    results = Path(args.results)
    results.mkdir(parents=True, exist_ok=True)
    (results / f"spikes-{args.part}.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(table, results / f"spikes-{args.part}.svg")
    sys.stdout.write("\n".join(lines(table)) + "\n")


if __name__ == "__main__":
    main()
