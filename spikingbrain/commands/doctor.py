"""Say what is installed, which backend serves which op, what is missing and how to get it."""

import argparse
import sys
from importlib.metadata import PackageNotFoundError, version

EXTRAS = {
    "": ("torch", "transformers", "accelerate", "safetensors", "sentencepiece"),
    "train": ("deepspeed", "pydantic", "pyyaml"),
    "serve": ("fastapi", "uvicorn"),
    "demo": ("matplotlib", "jinja2", "openai"),
    "eval": ("lm-eval", "peft"),
    "cuda": ("triton", "flash-linear-attention"),
    "vllm": ("vllm",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace) -> None:  # noqa: ARG001
    """Print the report."""
    import torch

    from .. import registry

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    lines = [f"python {sys.version.split()[0]}, {torch.get_num_threads()} threads, devices: {', '.join(devices)}", ""]
    lines += [line for extra, packages in EXTRAS.items() for line in _packages(extra, packages)]
    lines += ["", *(line for device in devices for line in _backends(device)), ""]
    lines += [f"{folder}: {', '.join(registry.names(folder))}" for folder in registry.FOLDERS]
    sys.stdout.write("\n".join(lines) + "\n")


def _packages(extra: str, packages: tuple[str, ...]) -> list[str]:
    get = f"pip install 'spikingbrain[{extra}]'" if extra else "pip install spikingbrain"
    lines = []
    for package in packages:
        try:
            lines.append(f"  ok       {package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"  missing  {package}: {get}")
    return [extra or "core", *lines]


def _backends(device: str) -> list[str]:
    from spikingbrain_kernels import BACKENDS, OPS

    lines = [f"backends on {device} (the first that can run serves the op)"]
    for op in OPS:
        states = [
            f"{b.name}{'' if b.missing(device) is None else f' ({b.missing(device)})'}"
            for b in BACKENDS
            if op in b.ops and device in b.devices
        ]
        lines.append(f"  {op}: {', '.join(states)}")
    return lines
