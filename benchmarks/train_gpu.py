"""True MFU of training a hybrid of about 1B parameters on one GPU, and tokens a second as the sequence grows.

    python benchmarks/train_gpu.py --peak-tflops 989 --out benchmarks/results

bf16 with fp32 master weights, activation checkpointing, AdamW, random tokens. MFU counts the operations of
`spikingbrain_training.flops`, which has no quadratic term for linear layers and nothing for recomputed activations.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from spikingbrain import SpikingBrainConfig, SpikingBrainForCausalLM
from spikingbrain.errors import InputError
from spikingbrain.files import write_json
from spikingbrain_training.flops import flops_per_token

SIZES = {
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "tie_word_embeddings": True,
}
WINDOW = 4096
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
TOKENS_PER_STEP = 131072
# Of the paper's training run, for comparison.
PAPER_MFU = 0.234


def make_model(sizes: dict[str, Any], device: torch.device) -> SpikingBrainForCausalLM:
    """Linear and window layers in turn, ready to train."""
    config = SpikingBrainConfig(**sizes, mixers=["gla", "sliding_window"], window=WINDOW)
    model = SpikingBrainForCausalLM(config).to(device).train()
    model.gradient_checkpointing_enable()
    return model


def step(model: Any, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> None:
    """One step over `tokens [N, T]`, a row at a time."""
    for row in tokens:
        with torch.autocast(tokens.device.type, torch.bfloat16):
            loss = model(input_ids=row[None], labels=row[None], use_cache=False).loss
        (loss / len(tokens)).backward()
    optimizer.step()
    optimizer.zero_grad()


def seconds_a_step(model: Any, length: int, num_tokens: int, steps: int, synchronize: Any) -> float:
    """The median over `steps`, after one that is not counted."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    shape = (num_tokens // length, length)
    tokens = torch.randint(0, model.config.vocab_size, shape, device=model.device)
    taken = []
    for _ in range(steps + 1):
        synchronize()
        begin = time.perf_counter()
        step(model, optimizer, tokens)
        synchronize()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])


def measure(model: Any, length: int, args: argparse.Namespace, synchronize: Any) -> dict[str, float]:
    """Tokens a second and MFU at a length."""
    num_tokens = max(length, args.tokens)
    rate = num_tokens / seconds_a_step(model, length, num_tokens, args.steps, synchronize)
    mfu = rate * flops_per_token(model, length) / (args.peak_tflops * 1e12)
    return {"length": length, "tokens_per_second": round(rate, 1), "mfu": round(mfu, 4)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command's settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peak-tflops", type=float, required=True, help="dense bf16 of this GPU, by its data sheet")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--tokens", type=int, default=TOKENS_PER_STEP, help="a step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args(arguments)


def main() -> None:
    """Measure every length, write the figures."""
    args = parse()
    if not torch.cuda.is_available():
        raise InputError("benchmarks/train_gpu.py needs a CUDA device; there is none here")
    model = make_model(SIZES, torch.device("cuda"))
    rows = [measure(model, length, args, torch.cuda.synchronize) for length in args.lengths]
    found = {
        "device": torch.cuda.get_device_name(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "paper_mfu": PAPER_MFU,
        "rows": rows,
        "command": " ".join(["python", *sys.argv]),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "train-gpu.json", found)
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
