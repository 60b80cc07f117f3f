"""Kill a run with SIGKILL at random moments, inside checkpoint writes too, and go on: nothing may tell it apart.

    python benchmarks/soak_training.py --kills 20 --seed 0 --out benchmarks/results

Two processes, a small hybrid, a checkpoint every second step. The losses must be those of a run that nothing stopped,
to the bit, and so the last checkpoint; every sample of every step is read once in the steps that count.
"""

import argparse
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from training.conftest import LENGTH, SIZES
from training.harness import run_ranks

from spikingbrain import SpikingBrainConfig, SpikingBrainForCausalLM
from spikingbrain.files import write_json
from spikingbrain_training import checkpoint
from spikingbrain_training import train as training
from spikingbrain_training.build import build
from spikingbrain_training.config import TrainConfig
from spikingbrain_training.run import begin_run

STEPS, SEQUENCES, RANKS = 120, 4, 2


def make_inputs(work: Path) -> None:
    """A tokenizer of bytes, a shard of random documents, and a small model."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={**{c: n for n, c in enumerate(alphabet)}, "<end>": 256}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<end>").save_pretrained(work / "tokenizer")
    letters = random.Random(1)
    texts = ["".join(letters.choices("abcdefgh ", k=letters.randrange(5, 200))) for _ in range(150)]
    (work / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build([work / "texts.jsonl"], work / "tokenizer", work / "data")
    torch.manual_seed(0)
    config = SpikingBrainConfig(**SIZES, mixers=["gla", "sliding_window"], window=7)
    SpikingBrainForCausalLM(config).save_pretrained(work / "model")


def settings(work: Path, name: str) -> TrainConfig:
    """The run in a directory of its own."""
    return TrainConfig.model_validate(
        {
            "out": str(work / name),
            "stage": "pretrain",
            "model": {"init_from": str(work / "model"), "tokenizer": str(work / "tokenizer")},
            "data": {"path": str(work / "data"), "sequence_length": LENGTH},
            "batch": {"sequences": SEQUENCES, "micro": 1},
            "optim": {"lr": 1e-3},
            "steps": STEPS,
            "parallel": {"processes": RANKS, "zero": 2},
            "checkpoint": {"every": 2, "keep": 3},
        }
    )


def attempt(config: TrainConfig, kill_after: float, in_write: bool) -> float:
    """Train until killed, so many seconds after the first step began, or inside the next write of a checkpoint.

    Returns the seconds from the first step to the end.
    """
    begun, numbers, original = [], config.out.parent / "numbers.jsonl", training.step_batches
    writing = checkpoint.save_file

    def step_batches(dataset: Any, config: TrainConfig, step: int, world: Any) -> Any:
        if not begun:
            begun.append(time.monotonic())
            if not in_write and math.isfinite(kill_after):
                Timer(kill_after, os.kill, (os.getpid(), signal.SIGKILL)).start()
        first = step * SEQUENCES + world.rank * SEQUENCES // RANKS
        with numbers.open("a") as file:
            file.write(json.dumps([step, world.rank, list(range(first, first + SEQUENCES // RANKS))]) + "\n")
        return original(dataset, config, step, world)

    def save_file(tensors: Any, file: Path) -> None:
        if in_write and time.monotonic() - begun[0] > kill_after:
            file.write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        writing(tensors, file)

    training.step_batches, checkpoint.save_file = step_batches, save_file
    training.train(config)
    return time.monotonic() - begun[0]


def losses(run: Path) -> list[float]:
    """A loss a step."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def samples_once(numbers: Path) -> bool:
    """Whether the last reading of every step and rank together is every sample once."""
    last = {(step, rank): seen for step, rank, seen in map(json.loads, numbers.read_text().splitlines())}
    return sorted(number for seen in last.values() for number in seen) == list(range(STEPS * SEQUENCES))


def _seconds_to_the_end(config: TrainConfig, kill_after: float, in_write: bool) -> float | None:
    try:
        return run_ranks(RANKS, attempt, config, kill_after, in_write)[0]
    except AssertionError as failed:
        # A rank that outlives another one fails in its next collective.
        sys.stderr.write(f"{str(failed).splitlines()[-1]}\n")
        return None


def soak(work: Path, kills: int, seed: int) -> dict[str, Any]:
    """Figures of a soak."""
    make_inputs(work)
    whole, broken = settings(work, "whole"), settings(work, "broken")
    begin_run(whole)
    seconds = _seconds_to_the_end(whole, math.inf, False)
    assert seconds, "the run that nothing stops did not come to its end"
    (work / "numbers.jsonl").unlink()
    chance, died, in_writes, resumed = random.Random(seed), 0, 0, []
    while not (broken.out / "model").exists():
        resumed.append(begin_run(broken))
        in_write = died < kills and chance.random() < 0.5
        # All kills together take less than the run, so that it cannot end before the last one.
        moment = chance.uniform(0, seconds / kills) if died < kills else math.inf
        killed = _seconds_to_the_end(broken, moment, in_write) is None
        died += killed
        in_writes += killed and in_write
    last = [checkpoint.Reader(config.out, STEPS) for config in (whole, broken)]
    held = [[reader.whole(part, name) for name in last[0].shapes for part in checkpoint.PARTS] for reader in last]
    return {
        "kills": died,
        "all_kills_came": died == kills,
        "inside_a_checkpoint_write": in_writes,
        "resumed_from": [line.split("from step ")[1].split(" ")[0] for line in resumed if "from step" in line],
        "losses_bitwise_equal": losses(whole.out) == losses(broken.out),
        "last_checkpoint_bitwise_equal": all(map(torch.equal, *held)),
        "every_sample_once": samples_once(work / "numbers.jsonl"),
    }


def main() -> None:
    """Soak, write the figures, fail if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), arguments.kills, arguments.seed)
    command = f"python benchmarks/soak_training.py --kills {arguments.kills} --seed {arguments.seed}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "soak-training.json", {**found, "command": command})
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    sys.exit(not all(value for value in found.values() if isinstance(value, bool)))


if __name__ == "__main__":
    main()
