"""What goes on inside a model in a step: how long gates remember, which channels are silent, where a NaN began."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from spikingbrain.spiking import SpikeEncoder

GATE = ".gate_proj"


@contextlib.contextmanager
def _listening(model: nn.Module, listener: Callable[[str, nn.Module], Any]) -> Iterator[None]:
    """Call what `listener(name, module)` gives, if anything, after each forward pass of the module."""
    hooks = {module: listener(name, module) for name, module in model.named_modules()}
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items() if hook is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def watch(model: Any) -> Iterator[dict[str, Tensor]]:
    """Collect while the block runs, by name: decays of gates, and of encoders each token's share of silent channels."""
    seen: dict[str, Tensor] = {}
    gate = getattr(model.config, "gate", None)

    def listener(name: str, module: nn.Module) -> Any:
        if isinstance(module, SpikeEncoder):
            return lambda _module, _inputs, spikes: seen.update({f"silent/{name}": _silent(spikes.counts)})
        if gate and ".mixer." in name and name.endswith(GATE):
            return lambda _module, _inputs, out: seen.update({f"decay/{name}": _decay(out, gate["normalizer"])})
        return None

    with _listening(model, listener):
        yield seen


def _decay(gate: Tensor, normalizer: float) -> Tensor:
    return (logsigmoid(gate.detach().float()) / normalizer).exp()


def _silent(counts: Tensor) -> Tensor:
    return (counts.detach() == 0).float().mean(-1)


def first_non_finite(model: nn.Module, forward: Callable[[], Any]) -> str:
    """Run `forward` again without gradients and say which module is the first whose output is not finite, or ""."""
    found: list[str] = []

    def listener(name: str, module: nn.Module) -> Any:
        return None if list(module.children()) else lambda _module, _inputs, out: _note(found, name, out)

    with torch.no_grad(), _listening(model, listener):
        forward()
    return f"first in {found[0]}" if found else ""


def _note(found: list[str], name: str, output: Any) -> None:
    tensors = output if isinstance(output, tuple) else (output,)
    if any(isinstance(x, Tensor) and not bool(torch.isfinite(x).all()) for x in tensors):
        found.append(name)
