"""What a run will take, before it takes it: parameters, memory a rank, tokens, FLOPs, communication, checkpoints."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from .config import TrainConfig
from .flops import active_parameters, flops_per_token
from .sequence import received_numbers
from .stages import student_config

FP32 = 4
# Master, two moments.
OPTIMIZER_NUMBERS = 3


def plan(config: TrainConfig, processes: int) -> dict[str, Any]:
    """Figures of the run on `processes` ranks; bytes are a rank's, communication is received a step and rank."""
    accumulation = config.accumulation(processes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(student_config(config), dtype=torch.float32)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = config.batch.sequences * config.data.sequence_length
    flops = flops_per_token(model, config.data.sequence_length)
    return {
        "parameters": parameters,
        "active_parameters": active_parameters(model),
        "processes": processes,
        "accumulation": accumulation,
        "steps": config.steps,
        "tokens_per_step": tokens,
        "tokens": tokens * config.steps,
        "flops_per_token": flops,
        "flops": flops * tokens * config.steps,
        "memory": memory(config, model, parameters, processes),
        "communication": communication(config, model, parameters, processes),
        "checkpoint_bytes": OPTIMIZER_NUMBERS * FP32 * parameters,
        "checkpoints": checkpoints(config),
    }


def memory(config: TrainConfig, model: Any, parameters: int, processes: int) -> dict[str, int]:
    """Bytes a rank by what they hold; activations are an estimate from the projections' outputs and the logits."""
    zero, share = config.parallel.zero, parameters // processes
    optimizer = OPTIMIZER_NUMBERS * FP32 * (share if zero else parameters) - (0 if zero else FP32 * parameters)
    held = {
        "weights": FP32 * (share if zero == 3 else parameters),
        "gradients": FP32 * (share if zero >= 2 else parameters),
        "activations": activation_bytes(config, model),
    }
    return {**held, "host" if config.parallel.offload_optimizer else "optimizer": optimizer}


def activation_bytes(config: TrainConfig, model: Any) -> int:
    """Outputs of all linear layers and logits twice; with checkpointing each layer's input and one layer's outputs."""
    tokens = config.batch.micro * config.data.sequence_length // config.parallel.sequence
    width = 2 if config.precision == "bf16" else FP32
    layers, known = model.config.num_hidden_layers, model.config
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    outputs = sum(module.out_features for name, module in linears.items() if ".layers." in name)
    if config.parallel.activation_checkpointing:
        outputs = outputs // layers + layers * known.hidden_size
    return tokens * (width * outputs + 2 * FP32 * known.vocab_size)


def communication(config: TrainConfig, model: Any, parameters: int, processes: int) -> dict[str, int]:
    """Bytes received a step by a rank: gradients and weights by ZeRO, states and tokens by sequence parallelism."""
    micro = config.accumulation(processes)
    # A reduction is a reduce-scatter and an all-gather; stage 3 gathers weights for every forward and backward pass.
    passes = 2 * micro + micro if config.parallel.zero == 3 else (micro if config.parallel.zero == 2 else 1) + 1
    found = {"zero": passes * FP32 * parameters * (processes - 1) // processes}
    size = config.parallel.sequence
    if size > 1:
        length = config.batch.micro * config.data.sequence_length // size
        width = 2 if config.precision == "bf16" else FP32
        found["sequence"] = 2 * micro * received_numbers(model, length, size, config.parallel.scan, width)
    return found


def checkpoints(config: TrainConfig) -> int:
    """How many lie on disk at the end."""
    written = {*range(config.checkpoint.every, config.steps + 1, config.checkpoint.every), config.steps}
    every = config.checkpoint.milestones
    newest = sorted(written)[-config.checkpoint.keep :]
    return len({*newest, *(step for step in written if every and step % every == 0)})


def describe(figures: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [
        f"parameters     {figures['parameters']:,} ({figures['active_parameters']:,} multiply each token)",
        f"processes      {figures['processes']}, {figures['accumulation']} micro batches a step",
        f"tokens         {figures['tokens_per_step']:,} a step, {figures['tokens']:,} in {figures['steps']:,} steps",
        f"FLOPs          {figures['flops_per_token']:.3e} a token, {figures['flops']:.3e} in all",
        f"memory a rank  {_parts(figures['memory'])}",
        f"received       {_parts(figures['communication'])} a step and rank",
        f"checkpoints    {figures['checkpoints']} of {_size(figures['checkpoint_bytes'])} at the end",
    ]
    return "\n".join(lines)


def _parts(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {_size(size)}" for name, size in parts.items())


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
