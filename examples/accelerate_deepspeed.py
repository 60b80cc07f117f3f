"""Train one of our models with a loop of one's own on accelerate and DeepSpeed; without a GPU on gloo.

    ACCELERATE_USE_DEEPSPEED=true torchrun --nproc-per-node 2 examples/accelerate_deepspeed.py MODEL DATA OUT

Without that variable accelerate takes a CPU run for a single process and every process sees the same samples.
"""

import argparse
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import spikingbrain  # noqa: F401  registers the models
from spikingbrain_training.data import TokenDataset


def train(model: Path, data: Path, out: Path, *, steps: int = 20, length: int = 128, batch: int = 2) -> list[int]:
    """Train and save; returns the numbers of the samples that this process was given."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    settings = {
        "zero_optimization": {"stage": 2, "overlap_comm": False},
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": 1,
    }
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings),
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend)],
    )
    samples = TokenDataset(data, length, seed=0)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.1)
    loader = DataLoader(range(samples.num_sequences), batch_size=batch, drop_last=True)
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    seen: list[int] = []
    for step, numbers in enumerate(loader):
        if step == steps:
            break
        seen += numbers.tolist()
        inputs = samples.batch(numbers.tolist()).inputs.to(accelerator.device)
        loss = network(input_ids=inputs, labels=inputs, use_cache=False).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.unwrap_model(network).save_pretrained(
        out, is_main_process=accelerator.is_main_process, state_dict=accelerator.get_state_dict(network)
    )
    return seen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    train(arguments.model, arguments.data, arguments.out)
