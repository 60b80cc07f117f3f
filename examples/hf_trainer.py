"""Train one of our models with the Hugging Face Trainer on DeepSpeed; without a GPU on gloo.

    torchrun --nproc-per-node 2 examples/hf_trainer.py MODEL DATA OUT

MODEL: a model directory; DATA: what `spikingbrain data build` wrote; OUT: where the trained model goes.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import spikingbrain  # noqa: F401  registers the models
from spikingbrain_training.data import TokenDataset

# Clipping is on by default in DeepSpeed and its own optimizer needs a compiler: both are written out.
DEEPSPEED = {
    "zero_optimization": {"stage": 2, "overlap_comm": False},
    "gradient_clipping": 1.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}


class Rows(torch.utils.data.Dataset):
    """Sequences as the Trainer wants them; it shifts the labels itself."""

    def __init__(self, data: Path, length: int):
        self.samples = TokenDataset(data, length, seed=0)

    def __len__(self) -> int:
        return self.samples.num_sequences

    def __getitem__(self, number: int) -> dict[str, Any]:
        inputs = self.samples.batch([number]).inputs[0]
        return {"input_ids": inputs, "labels": inputs, "number": number}


class SeenNumbers(TrainerCallback):
    """Which samples this process trained on."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch of rows."""
        self.numbers += [row["number"] for row in rows]
        return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}


def train(model: Path, data: Path, out: Path, *, steps: int = 20, length: int = 128, batch: int = 2) -> list[int]:
    """Train and save; returns the numbers of the samples that this process was given."""
    # transformers counts one process on a CPU unless it is told that a CPU is meant.
    cpu = not torch.cuda.is_available()
    settings = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=1e-3,
        use_cpu=cpu,
        deepspeed=DEEPSPEED,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        logging_steps=5,
        dataloader_pin_memory=not cpu,
    )
    seen = SeenNumbers()
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=settings,
        train_dataset=Rows(data, length),
        data_collator=seen.collate,
    )
    trainer.train()
    trainer.save_model(str(out))
    return seen.numbers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    train(arguments.model, arguments.data, arguments.out)
