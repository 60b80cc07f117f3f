"""The examples train our model in two processes, and the processes see different samples."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops import __compatible_ops__
from transformers import AutoModelForCausalLM

from . import runs
from .conftest import LENGTH
from .harness import run_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str, *args: Any) -> list[int]:
    __compatible_ops__["deepspeed_shm_comm"] = False
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.train(*args, steps=3, length=LENGTH)


@pytest.mark.parametrize("name", ["hf_trainer", "accelerate_deepspeed"])
def test_an_example_trains_our_model_and_no_sample_is_seen_twice(ours, data, tmp_path, name):
    seen = run_ranks(2, example, name, ours, data, tmp_path / "out")
    assert all(len(numbers) >= 6 for numbers in seen)
    together = [number for numbers in seen for number in numbers]
    assert len(set(together)) == len(together)
    before, after = runs.tensors(ours), runs.tensors(tmp_path / "out")
    moved = [not torch.equal(tensor, before[key]) for key, tensor in after.items() if key in before]
    assert moved
    assert all(moved)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
