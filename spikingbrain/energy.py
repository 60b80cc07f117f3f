"""Energy of one token under named constants: the spiking model beside dense ones of the same shape.

Operations and bytes are counted, picojoules are multiplied: what they come to is an estimate under its constants. The
constants are 45 nm figures (Horowitz, ISSCC 2014, as the spiking literature uses them). The bar for spikes is a
quantised network of the same bits whose memory traffic counts too (arXiv 2409.08290). Not counted: thresholds, shifts,
control.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from .errors import InputError
from .spiking import SpikingLinear


@dataclass(frozen=True)
class Constants:
    """Picojoules of an operation, or (memory) of a byte."""

    mac_fp16: float = 1.5
    mac_int8: float = 0.23
    add_int8: float = 0.03
    dram_byte: float = 160.0
    sram_byte: float = 1.25

    def changed(self, settings: list[str]) -> "Constants":
        """With `name=value` settings; raises `InputError` naming the constants there are."""
        names = [field.name for field in fields(self)]
        values = {}
        for setting in settings:
            name, _, value = setting.partition("=")
            try:
                values[name] = float(value)
            except ValueError:
                raise InputError(f"{setting!r} is no constant; write NAME=PICOJOULES") from None
            if name not in names or values[name] < 0:
                raise InputError(f"{setting!r}: constants are {', '.join(names)}, and not negative")
        return replace(self, **values)


def energy_table(model: nn.Module, statistics: dict[str, Any], constants: Constants) -> list[dict[str, Any]]:
    """A row for fp16, int8, a quantised network of the counts' bits, and the spikes: per token of batch 1.

    `statistics`: what `recorded_statistics` gave. Each row: `macs`, `adds`, `weight_bytes` read from DRAM,
    `activation_bytes` written and read in SRAM, and picojoules `compute`, `memory` and `total`. All rows hold the same
    projections: the spiking ones. Weights of the spiking row and of int8 have one byte.
    """
    channels, macs = statistics["membrane_updates_per_token"], statistics["dense_operations_per_token"]
    bits = max(1, max(figures["steps"] for figures in statistics["encoders"].values()) + 1)
    adds, read = statistics["synaptic_operations_per_token"], 1 - statistics["unread_weights"]
    quantised = constants.mac_int8 * bits / 8
    rows = [
        _row("fp16", macs, 0, constants.mac_fp16, 2.0 * macs, 2.0 * channels, constants),
        _row("int8", macs, 0, constants.mac_int8, 1.0 * macs, 1.0 * channels, constants),
        _row(f"int8 weights, {bits}-bit activations", macs, 0, quantised, macs, channels * bits / 8, constants),
        _row("spikes", 0, adds, constants.add_int8, macs * read, channels * bits / 8, constants),
    ]
    return [{**row, "parameters": _parameters(model)} for row in rows]


def _row(
    name: str, macs: float, adds: float, each: float, weights: float, activations: float, constants: Constants
) -> dict[str, Any]:
    compute = (macs + adds) * each
    memory = weights * constants.dram_byte + 2 * activations * constants.sram_byte
    return {
        "network": name,
        "macs": macs,
        "adds": adds,
        "weight_bytes": weights,
        "activation_bytes": activations,
        "compute": compute,
        "memory": memory,
        "total": compute + memory,
    }


def _parameters(model: nn.Module) -> int:
    """Weights of the spiking projections."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, SpikingLinear))
