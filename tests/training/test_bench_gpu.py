"""The GPU benchmark of training runs on the CPU in small, and refuses to run as itself without a GPU."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_gpu.py"


def test_every_length_gets_its_rate_and_mfu():
    spec = importlib.util.spec_from_file_location("train_gpu", SCRIPT)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    args = bench.parse(["--peak-tflops", "0.05", "--lengths", "16", "32", "--tokens", "32", "--steps", "1"])
    model = bench.make_model(small, torch.device("cpu"))
    before = model.model.embed_tokens.weight.clone()
    rows = [bench.measure(model, length, args, lambda: None) for length in args.lengths]
    assert [row["length"] for row in rows] == [16, 32]
    for row in rows:
        assert row["mfu"] == pytest.approx(
            row["tokens_per_second"] * bench.flops_per_token(model, row["length"]) / 0.05e12, abs=1e-4
        )
    assert not torch.equal(before, model.model.embed_tokens.weight)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, SCRIPT, "--peak-tflops", "989"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: benchmarks/train_gpu.py needs a CUDA device; there is none here\n"
