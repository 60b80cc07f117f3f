"""Tokens a second of training our hybrid, beside the Hugging Face Trainer on a Qwen2 of the same size, in one run.

    python benchmarks/train_throughput.py --length 2048 --sequences 4 --steps 5 --rounds 1
    python benchmarks/train_throughput.py --length 16384 --sequences 2 --steps 4 --peer-steps 2

Two processes of one thread each, fp32, the same random tokens a step. Both trainers run one after the other, as often
as there are rounds; figures are medians of the steps after each run's first. Ours writes a checkpoint beside every
other step: what those steps take longer is the stall. The load of the machine before each run is recorded.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {
    "vocab_size": 8192,
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_hidden_layers": 6,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
    "bos_token_id": None,
}
WINDOW = 512
PROCESSES = 2
CHECKPOINT_EVERY = 2
PEER = "peer.json"


def write_inputs(work: Path, length: int, sequences: int, steps: int) -> None:
    """Random tokens as a shard, and both configs."""
    from spikingbrain.files import write_json
    from spikingbrain_training.data import DOCUMENTS, INDEX, TOKENS, file_sha256

    data = work / "data"
    data.mkdir()
    count = (steps + 1) * sequences * length + 1
    np.random.default_rng(0).integers(1, 8192, count).astype("uint16").tofile(data / TOKENS)
    np.array([0, count], "int64").tofile(data / DOCUMENTS)
    checksums = {name: file_sha256(data / name) for name in (TOKENS, DOCUMENTS)}
    index = {"num_tokens": count, "num_documents": 1, "dtype": "uint16", "vocabulary": 8192, "sha256": checksums}
    write_json(data / INDEX, index)
    write_json(work / "qwen2.json", {"model_type": "qwen2", **SIZES})
    ours = {"model_type": "spikingbrain", **SIZES, "mixers": ["gla", "sliding_window"], "window": WINDOW}
    write_json(work / "ours.json", {**ours, "qkv_bias": True})


def run_ours(work: Path, length: int, sequences: int, steps: int) -> list[float]:
    """Seconds of each step of our trainer."""
    import yaml

    run = Path(tempfile.mkdtemp(dir=work)) / "run"
    config = {
        "out": str(run),
        "stage": "pretrain",
        "model": {"init_from": str(work / "ours.json")},
        "data": {"path": str(work / "data"), "sequence_length": length},
        "batch": {"sequences": sequences, "micro": 1},
        "optim": {"lr": 1e-3},
        "steps": steps,
        "parallel": {"processes": PROCESSES, "zero": 1},
        "checkpoint": {"every": CHECKPOINT_EVERY, "keep": 1},
    }
    (work / "run.yaml").write_text(yaml.safe_dump(config))
    subprocess.run([Path(sys.executable).parent / "spikingbrain", "train", work / "run.yaml"], check=True)
    return [json.loads(row)["seconds"] for row in (run / "metrics.jsonl").read_text().splitlines()]


def run_peer(work: Path, length: int, sequences: int, steps: int) -> list[float]:
    """Seconds of each step of the Hugging Face Trainer."""
    script = [__file__, "--peer", work, "--length", length, "--sequences", sequences, "--steps", steps]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", PROCESSES]
    subprocess.run([str(part) for part in (*launcher, *script)], check=True)
    return json.loads((work / PEER).read_text())["seconds"]


def peer(work: Path, length: int, sequences: int, steps: int) -> None:
    """One process of the Hugging Face Trainer; the first writes the seconds of each step."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    torch.set_num_threads(1)
    tokens = np.memmap(work / "data" / "tokens.bin", "uint16", mode="r")
    rows = [torch.from_numpy(tokens[n * length : (n + 1) * length].astype("int64")) for n in range(sequences * steps)]

    class Clock(TrainerCallback):
        ends = [time.perf_counter()]

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            self.ends.append(time.perf_counter())

    settings = TrainingArguments(
        output_dir=str(work / "peer"),
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=sequences // PROCESSES,
        learning_rate=1e-3,
        use_cpu=True,
        ddp_backend="gloo",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(work / "qwen2.json"), dtype=torch.float32)
    dataset: Any = [{"input_ids": row, "labels": row} for row in rows]
    clock = Clock()
    Trainer(model=model, args=settings, train_dataset=dataset, callbacks=[clock]).train()
    if settings.process_index == 0:
        seconds = np.diff(clock.ends).tolist()
        count = sum(parameter.numel() for parameter in model.parameters())
        (work / PEER).write_text(json.dumps({"seconds": seconds, "parameters": count}))


def loader_seconds(work: Path, length: int, sequences: int) -> float:
    """Time to read the batches of a step."""
    from spikingbrain_training.data import TokenDataset, micro_batches

    dataset = TokenDataset(work / "data", length, seed=0)
    dataset.place(0)
    begin = time.perf_counter()
    micro_batches(dataset, 1, sequences, 1, 0, PROCESSES)
    return time.perf_counter() - begin


def alternate(work: Path, length: int, sequences: int, steps: int, peer_steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of each step of both trainers, run by run, and the machine's load before each run."""
    seconds: dict[str, Any] = {"ours_seconds": [], "peer_seconds": [], "ours_load": [], "peer_load": []}
    for _ in range(rounds):
        for name, run, count in (("ours", run_ours, steps), ("peer", run_peer, peer_steps)):
            seconds[f"{name}_load"].append(round(os.getloadavg()[0], 2))
            seconds[f"{name}_seconds"].append([round(one, 4) for one in run(work, length, sequences, count)])
    return seconds


def stall(runs: list[list[float]]) -> float:
    """What a checkpoint adds to the step beside which it is copied and written, as a share of a step without one."""
    beside = [one for run in runs for one in run[CHECKPOINT_EVERY::CHECKPOINT_EVERY]]
    alone = [one for run in runs for number, one in enumerate(run) if number % CHECKPOINT_EVERY and number]
    return statistics.median(beside) / statistics.median(alone) - 1


def compare(work: Path, length: int, sequences: int, steps: int, peer_steps: int, rounds: int) -> dict[str, Any]:
    """Both trainers in turn, and what follows."""
    write_inputs(work, length, sequences, max(steps, peer_steps))
    seconds = alternate(work, length, sequences, steps, peer_steps, rounds)
    ours, theirs = (
        statistics.median([one for run in seconds[f"{name}_seconds"] for one in run[1:]]) for name in ("ours", "peer")
    )
    tokens = length * sequences
    return {
        "length": length,
        "tokens_per_step": tokens,
        "ours_tokens_per_second": round(tokens / ours, 1),
        "hf_trainer_qwen2_tokens_per_second": round(tokens / theirs, 1),
        "ratio": round(theirs / ours, 3),
        "checkpoint_stall": round(stall(seconds["ours_seconds"]), 4),
        "loader_share": round(loader_seconds(work, length, sequences) / ours, 5),
        **seconds,
        "peer_parameters": json.loads((work / PEER).read_text())["parameters"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=4, help="a step, over both processes")
    parser.add_argument("--steps", type=int, default=5, help="of a run; at least 3")
    parser.add_argument("--peer-steps", type=int, help="of a run of the peer; at least 2, by default as many")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    figures = (arguments.length, arguments.sequences, arguments.steps)
    if arguments.peer:
        peer(arguments.peer, *figures)
        sys.exit()
    figures = (*figures, arguments.peer_steps or arguments.steps, arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), *figures)
    options = "--length {} --sequences {} --steps {} --peer-steps {} --rounds {}".format(*figures)
    found["command"] = f"python benchmarks/train_throughput.py {options}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"train-throughput-{arguments.length}.json").write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
