"""The demo's stages in order, and the checks its report makes."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint import load_config
from ..evaluation import text_files
from ..files import read_json
from . import corpus, measure, report, server
from .stages import Figures, Stage, command, run_stages

CONTEXT = 256
EVAL_TOKENS = 32_768
WINDOW = 64
SPIKES = {"neuron": "adaptive", "k": 3.0, "code": "bitwise"}
# What the report promises: see the README's table.
BASE_BELOW_UNIGRAM, GAP_CLOSED, SPIKING_NEAR_TRAINED = 0.40, 0.80, 0.03


class Demo:
    """Paths and settings of one demo. `base`: a model directory to use instead of training one."""

    def __init__(self, work: Path, out: Path, configs: Path, seed: int, base: Path | None):
        self.work, self.out, self.configs, self.seed = work, out, configs, seed
        self.base = base or work / "base" / "model"
        self.own_base = base is None
        self.tokenizer = work / "tokenizer" if self.own_base else self.base

    def run(self) -> dict[str, Any]:
        """Run every stage; returns the figures of the report."""
        entries = run_stages(self.stages(), self.work)
        return entries["report"]["figures"]

    def stages(self) -> list[Stage]:
        """In order; each depends on those before it."""
        work = self.work
        stages = [
            Stage(
                "corpus", partial(corpus.make_corpus, work / "corpus"), _tell_corpus, (work / "corpus",), str(self.base)
            ),
            *([self._tokenizer_stage()] if self.own_base else []),
            Stage("data", self._data, lambda f: f"{f['tokens']:,} tokens to train on", (work / "data",)),
            *([self._train("base", "a softmax Transformer (Qwen2)")] if self.own_base else []),
            Stage("convert", self._convert, _tell_conversion, (work / "converted",)),
            self._train("distil", "the linear model learns from the base"),
            self._train("pretrain", "next-token training"),
            self._train("spike", "training with spikes on"),
            Stage("losses", self._losses, _tell_losses),
            Stage("lengths", self._lengths, _tell_lengths),
            Stage("serve", self._serve, _tell_server),
        ]
        return [*stages, Stage("report", partial(self._report, stages), _tell_report, (self.out,), str(self.out))]

    def _tokenizer_stage(self) -> Stage:
        make = partial(corpus.make_tokenizer, self.work / "corpus", self.tokenizer)
        return Stage("tokenizer", make, lambda f: f"{f['vocabulary']:,} entries, trained", (self.tokenizer,))

    def _data(self) -> Figures:
        source, target = self.work / "corpus" / "train", self.work / "data"
        command("data", "build", source, target, "--tokenizer", self.tokenizer, "--glob", "*.py")
        return {"tokens": read_json(target / "index.json")["num_tokens"]}

    def _train(self, name: str, what: str) -> Stage:
        config = self.configs / f"demo-{name}.yaml"
        make = partial(self._run_training, name, config)
        depends = json.dumps([self.seed, config.read_text()])
        return Stage(name, make, lambda f: f"{what}: {_steps(f)}", (self.work / name,), depends, resumable=True)

    def _run_training(self, name: str, config: Path) -> Figures:
        settings = [f"seed={self.seed}", f"out={self.work / name}"]
        paths = {
            "base": {"model.tokenizer": self.tokenizer},
            "distil": {"model.init_from": self.work / "converted", "teacher": self.base},
            "pretrain": {"model.init_from": self.work / "distil" / "model"},
            "spike": {"model.init_from": self.work / "pretrain" / "model"},
        }[name]
        paths["data.path"] = self.work / "data"
        command("train", config, *settings, *(f"{key}={value}" for key, value in paths.items()))
        rows = metrics(self.work / name)
        return {"steps": rows[-1]["step"], "first_loss": rows[0]["loss"], "last_loss": rows[-1]["loss"]}

    def _convert(self) -> Figures:
        options = ["--mixers", "gla,sliding_window", "--window", WINDOW, "--seed", self.seed]
        command("convert", self.base, self.work / "converted", *options)
        return read_json(self.work / "converted" / "conversion.json")

    def _losses(self) -> Figures:
        models = {
            "base": self.base,
            "converted": self.work / "converted",
            "distilled": self.work / "distil" / "model",
            "trained": self.work / "pretrain" / "model",
            "spiking": self.work / "spike" / "model",
        }
        train, heldout = (text_files([self.work / "corpus" / split], "*.py") for split in ("train", "heldout"))
        losses = {"unigram": measure.unigram_loss(self.base, train, heldout, CONTEXT, EVAL_TOKENS)}
        spikes = None
        for name, path in models.items():
            target = self.work / f"eval-{name}.json"
            options = ["--context", CONTEXT, "--max-tokens", EVAL_TOKENS, "--json", target]
            command("eval", path, "--text", self.work / "corpus" / "heldout", "--glob", "*.py", *options)
            figures = read_json(target)
            losses[name] = figures["loss"]
            spikes = figures["spikes"] or spikes
        return {"losses": losses, "spikes": spikes}

    def _lengths(self) -> Figures:
        return {
            "softmax base": measure.decode_by_length(self.base, self.seed),
            "spiking": measure.decode_by_length(self.work / "spike" / "model", self.seed),
        }

    def _serve(self) -> Figures:
        longest = load_config(self.base).max_position_embeddings
        return server.ask(self.work / "spike" / "model", self.work / "serve.log", min(longest, 16_384))

    def _report(self, stages: list[Stage]) -> Figures:
        entries = read_json(self.work / "stages.json")
        losses = entries["losses"]["figures"]
        text = next(iter(text_files([self.work / "corpus" / "heldout"], "*.py"))).read_text()
        figures = {
            "seed": self.seed,
            "seconds": sum(entries[stage.name]["seconds"] for stage in stages),
            "parameters": entries["convert"]["figures"]["num_parameters"],
            "stages": {stage.name: entries[stage.name] for stage in stages},
            "losses": losses["losses"],
            "spikes": losses["spikes"],
            "lengths": entries["lengths"]["figures"],
            "server": entries["serve"]["figures"],
            "raster": measure.raster(self.work / "spike" / "model", text),
        }
        figures["checks"] = checks(figures, own_base=self.own_base)
        runs = [stage.name for stage in stages if stage.resumable]
        report.write_report(self.out, figures, {name: metrics(self.work / name) for name in runs})
        return {"out": str(self.out), "checks": figures["checks"]}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a training run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def checks(figures: dict[str, Any], *, own_base: bool) -> list[dict[str, Any]]:
    """What is promised, the figure, and whether it is met."""
    losses, answers = figures["losses"], figures["server"]
    below = 1 - losses["base"] / losses["unigram"]
    closed = (losses["converted"] - losses["trained"]) / (losses["converted"] - losses["base"])
    near = losses["spiking"] / losses["trained"] - 1
    sizes = set(answers["state_bytes"].values())
    rows = [
        ("training closes at least 80 % of the gap that conversion opened", f"{closed:.1%}", closed >= GAP_CLOSED),
        ("the spiking model is within 3 % of the trained one", f"{near:+.2%}", near <= SPIKING_NEAR_TRAINED),
        (
            "served greedy tokens equal generate()",
            f"{answers['num_tokens_compared']} tokens",
            answers["tokens_equal_generate"],
        ),
        (
            "streamed text equals the whole",
            "yes" if answers["streamed_equals_whole"] else "no",
            answers["streamed_equals_whole"],
        ),
        ("state bytes do not grow with the sequence", f"{max(sizes):,} bytes", len(sizes) == 1),
        ("the server ends cleanly on SIGTERM", f"exit code {answers['exit_code']}", answers["exit_code"] == 0),
    ]
    if own_base:
        rows.insert(
            0, ("the base is at least 40 % under the unigram model", f"{below:.1%}", below >= BASE_BELOW_UNIGRAM)
        )
    return [{"what": what, "figure": figure, "met": bool(met)} for what, figure, met in rows]


def _steps(figures: Figures) -> str:
    return f"{figures['steps']} steps, loss {figures['first_loss']:.3f} -> {figures['last_loss']:.3f}"


def _tell_corpus(figures: Figures) -> str:
    files = figures["files"]
    return f"{figures['bytes'] / 1e6:.1f} MB of Python: {files['train']} files to train on, {files['heldout']} held out"


def _tell_conversion(figures: Figures) -> str:
    new = figures["num_new_parameters"]
    return f"{figures['num_copied_tensors']} tensors copied, {len(figures['new_parameters'])} new ({new:,} parameters)"


def _tell_losses(figures: Figures) -> str:
    return ", ".join(f"{name} {loss:.3f}" for name, loss in figures["losses"].items()) + " nats a token"


def _tell_lengths(figures: Figures) -> str:
    parts = []
    for name, rows in figures.items():
        first, last = rows[0], rows[-1]
        parts.append(
            f"{name}: {first['bytes']:,} bytes at {first['length']} tokens, {last['bytes']:,} at {last['length']}"
        )
    return "; ".join(parts)


def _tell_server(figures: Figures) -> str:
    same = "equal" if figures["tokens_equal_generate"] else "DIFFER FROM"
    sizes = " / ".join(f"{size:,}" for size in figures["state_bytes"].values())
    lengths = " / ".join(f"{int(length):,}" for length in figures["state_bytes"])
    return f"{figures['num_tokens_compared']} greedy tokens {same} generate(); state {sizes} bytes at {lengths} tokens"


def _tell_report(figures: Figures) -> str:
    met = sum(check["met"] for check in figures["checks"])
    return f"{figures['out']}/report.html and report.json; {met} of {len(figures['checks'])} checks met"
