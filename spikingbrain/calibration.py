"""Turning spikes on: the same weights behind neurons, and thresholds measured on texts before or without training.

Silence is spread by sensitivity. Silencing channel c where it is x_c costs about h_c x_c^2 / 2 nats with
h_c = E[(dL/dx_c)^2], the diagonal Fisher information (as in Optimal Brain Damage); it saves the weights of the
o outputs that read the channel. With one price a weight for the whole model, a channel is silent below
sqrt(price o / h_c), except where there is next to nothing to be saved.
"""

import contextlib
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from . import registry
from .checkpoint import copy_tokenizer, load_config, load_model, load_tokenizer
from .config import SpikingBrainConfig
from .errors import InputError
from .evaluation import pieces
from .files import new_directory
from .integer import ternary
from .neurons import Observation
from .quantization import quantize_projections
from .spiking import SpikeEncoder, SpikingHead, SpikingLinear, encoders, readers, weights_read_by

# Values kept of all encoders together; the quantiles of more would be no better.
MAX_SAMPLES = 20_000_000
BATCH = 8
# A channel whose gradient is always 0 would have an infinite threshold.
MAX_THETA = 100.0
# An encoder that fewer weights read than this part of the average is not silenced. Silence saves nothing there, and its
# cost is not what the diagonal says: a low-rank gate's few channels carry a constant that all tokens lose together
# (measured once: 30 to 200 times the predicted loss; of most others, up to 3 times).
FEW_WEIGHTS = 0.15


def spiking_model(path: str | Path, spiking: dict[str, Any], dtype: torch.dtype | str = "auto") -> Any:
    """The model of `path` with `spiking` in its config: the same weights, its neurons as their parameters say.

    Neurons that the model already has in the same form keep their tensors. Raises `InputError` if it is none of ours.
    """
    config = load_config(path)
    if not isinstance(config, SpikingBrainConfig):
        raise InputError(f"{path} is a {config.model_type} model; convert it first")
    dense = load_model(path, dtype)
    ours = type(config).from_dict({**config.to_dict(), "spiking": spiking})
    model = AutoModelForCausalLM.from_config(ours, dtype=dense.dtype)
    keep = config.spiking is not None and config.spiking["neuron"] == spiking["neuron"]
    tensors = {name: tensor for name, tensor in dense.state_dict().items() if keep or ".neuron." not in name}
    missing = [name for name in model.load_state_dict(tensors, strict=False)[0] if ".neuron." not in name]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}")
    return model.eval()


def turn_on_spikes(
    path: str | Path,
    out: str | Path,
    spiking: dict[str, Any],
    *,
    texts: list[Path] | None = None,
    num_texts: int = 128,
    context: int = 256,
    silence: float | None = None,
    weights: str | None = None,
) -> dict[str, Any]:
    """Write the model of `path` to `out` with spikes; the weights stay as they are, or become "int8" or "ternary".

    With `texts` (files), what the neurons measure is measured on `num_texts` pieces of `context` tokens of them, and
    `silence` is the share of weights that need not be read. Returns the thresholds by encoder. Raises `InputError`.
    """
    model = spiking_model(path, spiking)
    if weights == "ternary":
        for module in model.modules():
            if isinstance(module, SpikingLinear) and not isinstance(module, SpikingHead):
                module.weight.data = ternary(module.weight.data)
    rows = token_rows(path, texts, num_texts, context) if texts else None
    thresholds = calibrate(model, rows, silence)
    if weights == "int8":
        quantize_projections(model)
    with new_directory(out) as directory:
        model.save_pretrained(directory)
        copy_tokenizer(path, directory)
        if (Path(path) / "provenance.json").exists():
            shutil.copy(Path(path) / "provenance.json", directory)
    return thresholds


def token_rows(path: str | Path, texts: list[Path], num_texts: int, context: int) -> Tensor:
    """`num_texts` pieces of texts as token ids `[N, context + 1]`; raises `InputError` where no text is that long."""
    tokenizer = load_tokenizer(path)
    tokenizer.model_max_length = int(1e9)
    rows = list(pieces(tokenizer, texts, context, num_texts * context))
    if not rows:
        raise InputError(f"no document has {context + 1} tokens; choose a smaller context")
    return torch.stack(rows)


def calibrate(model: Any, rows: Tensor | None, silence: float | None) -> dict[str, float]:
    """Set the neurons of `model` from token ids `rows [N, T + 1]`; returns the mean threshold of each encoder.

    Raises `InputError` for a target that the neuron cannot have or that needs texts.
    """
    found = encoders(model)
    neuron = model.config.spiking["neuron"]
    if silence is not None:
        check_target(neuron, silence)
    if rows is None:
        if silence is not None:
            raise InputError("a target of silence is measured on texts; name some")
        return {}
    if silence is not None:
        for encoder in found.values():
            encoder.neuron.theta.data.zero_()
    observed = {name: item.observation() for name, item in _observe(model, rows).items()}
    for name, item in observed.items():
        found[name].neuron.calibrate(item)
    if silence is None:
        return {}
    price = _price(list(observed.values()), silence)
    sizes = weights_read_by(model)
    few = FEW_WEIGHTS * mean(sizes.values())
    for name, item in observed.items():
        if sizes[name] < few:
            continue
        theta = (price * item.outputs / item.fisher).sqrt() / item.mean
        found[name].neuron.theta.data.copy_(theta.clamp(max=MAX_THETA))
    return {name: float(found[name].neuron.theta.mean()) for name in observed}


def check_target(neuron: str, silence: float) -> None:
    """Raise `InputError` unless `silence` is a share that the thresholds of `neuron` can be set to."""
    if not 0 < silence < 1:
        raise InputError(f"a target of silence is above 0 and below 1, got {silence:g}: at 1 nothing would be computed")
    able = [name for name in registry.names("neurons") if hasattr(registry.load("neurons", name).Neuron, "silence")]
    if neuron not in able:
        raise InputError(f"neuron {neuron!r} has no threshold of silence; choose from {', '.join(able)}")


@dataclass
class _Observer:
    """Collects what one encoder reads and what depends on it."""

    outputs: int
    hessian: Tensor
    keep: int
    tokens: int = 0
    magnitude: float = 0.0
    squares: Tensor = field(default_factory=lambda: torch.zeros(1))
    samples: list[Tensor] = field(default_factory=list)

    def see(self, _encoder: SpikeEncoder, inputs: tuple[Tensor, ...]) -> None:
        (x, *_) = inputs
        values = x.detach().flatten(0, -2).float()
        self.tokens += len(values)
        self.magnitude += float(values.abs().mean(-1).sum())
        self.samples.append(values[:: max(1, len(values) // self.keep)][: self.keep])
        x.register_hook(self.see_gradient)

    def see_gradient(self, gradient: Tensor) -> None:
        self.squares = self.squares.to(gradient.device) + gradient.flatten(0, -2).float().square().sum(0)

    def observation(self) -> Observation:
        fisher = (self.squares / self.tokens).clamp(min=torch.finfo(torch.float32).tiny)
        return Observation(
            torch.cat(self.samples), fisher, self.hessian, self.magnitude / self.tokens, float(self.outputs)
        )


def _observe(model: Any, rows: Tensor) -> dict[str, _Observer]:
    """Run the model, its thresholds out of the way, forward and backward over all rows."""
    found = encoders(model)
    batches = math.ceil(len(rows) / BATCH)
    channels = sum(encoder.neuron.channels for encoder in found.values())
    keep = max(1, MAX_SAMPLES // (channels * batches))
    observers = {name: _Observer(*_read_by(model, name), keep) for name in found}
    with contextlib.ExitStack() as hooks:
        for name, encoder in found.items():
            hooks.enter_context(encoder.register_forward_pre_hook(observers[name].see))
        for start in range(0, len(rows), BATCH):
            ids = rows[start : start + BATCH].to(model.device)
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
            cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
            model.zero_grad(set_to_none=True)
    return observers


def _read_by(model: Any, name: str) -> tuple[int, Tensor]:
    """How many outputs read an encoder's channels, and the sum of their squared weights `[C]`."""
    weights = [linear.weight.detach().float() for linear in readers(model, name).values()]
    return sum(map(len, weights)), torch.stack([weight.square().sum(0) for weight in weights]).sum(0)


def _price(observed: list[Observation], silence: float) -> float:
    """What one weight may cost so that `silence` of all weights need not be read: a weighted quantile."""
    costs = torch.cat([(x.sample.square() * x.fisher / x.outputs).flatten() for x in observed])
    # A sample stands for all tokens, and each of its channels for `outputs` weights.
    weights = torch.cat([torch.full((x.sample.numel(),), x.outputs / len(x.sample)) for x in observed])
    costs, order = costs.sort()
    share = weights[order].double().cumsum(0)
    return float(costs[torch.searchsorted(share, silence * share[-1]).clamp(max=len(costs) - 1)])
