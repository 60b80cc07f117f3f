"""W8ASpike, the quantised SpikingBrain-7B (arXiv 2509.05276, section 4.3): int8 weights in groups of 128, spike counts.

Released as fp32 weights beside the scales they are rounded by in every forward pass, under the model type gla_swa; held
here as int8 codes, under a model type of its own. `read` makes the one of the other, `write` goes back.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spikingbrain_kernels.quantized import dequantize

from ..checkpoint import Shards, ShardWriter
from ..config import GATE_DEFAULTS, SPIKING_DEFAULTS
from ..errors import InputError
from ..files import read_json, write_json
from ..model import SpikingBrainForCausalLM
from ..quantization import GROUP_SIZE, METHOD, QuantizedLinear, int8_tensors
from . import Released, gla_swa, has_model_type, their_name
from .gla_swa import QUANTIZED_KEY, SCALES, GLAswaConfig

MODEL_TYPE = "w8aspike"
# Declared quantised, but computed past its quantiser by the released code; the report says "all linear projections".
BYPASSED = "down_proj"
K = 3.0

NAMES = [
    *(pair for pair in gla_swa.NAMES if "gk_proj" not in pair[0]),
    (r"\.attn\.gk_proj\.", ".mixer.gate_proj."),
]


class W8ASpikeConfig(GLAswaConfig):
    """The released config; `quantization_config.exclude` says what stays dense, in weights and in spikes."""

    model_type = MODEL_TYPE

    @classmethod
    def implied(cls, keys: dict[str, Any]) -> dict[str, Any]:
        """A dense gate, spikes of k = 3 before every projection that is not excluded and in window layers."""
        if "quantization_config" not in keys:
            raise InputError("w8aspike cannot express a model without quantization_config")
        spiking = {**SPIKING_DEFAULTS, "neuron": "adaptive", "code": "bitwise", "params": {"k": K}}
        spiking["exclude"] = keys["quantization_config"]["exclude"]
        mixers = ["gla", "spiking_window"]
        return {"qkv_bias": True, "gate": {**GATE_DEFAULTS, "rank": None}, "mixers": mixers, "spiking": spiking}


class W8ASpikeForCausalLM(SpikingBrainForCausalLM):
    """SpikingBrain-7B with int8 weights."""

    config_class = W8ASpikeConfig


Config, ForCausalLM = W8ASpikeConfig, W8ASpikeForCausalLM


def recognises(path: Path) -> bool:
    """A gla_swa directory with a quantiser's scales."""
    return has_model_type(path, gla_swa.MODEL_TYPE) and gla_swa.has_scales(path)


class Int8Tensors:
    """The released tensors one by one, projections as int8 codes, scales and outliers."""

    def __init__(self, shards: Shards, exclude: list[str]):
        self._shards = shards
        self._exclude = exclude
        self._made: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[str]:
        for name in self._shards:
            self._made = self._tensors(name)
            yield from self._made

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """What a released tensor becomes; a projection's scales come with its weight."""
        base, _, part = name.rpartition(".")
        if name.endswith(SCALES):
            if f"{name.removesuffix(SCALES)}.weight" not in self._shards.names:
                raise InputError(f"{name} has no weight beside it")
            return {}
        if part != "weight" or base + SCALES not in self._shards.names:
            return {name: self._shards.get(name)}
        weight, scale = self._shards.get(name), self._shards.get(base + SCALES)
        if scale.numel() * GROUP_SIZE != weight.numel() or scale.shape[0] != weight.shape[0]:
            raise InputError(f"{base + SCALES} is {list(scale.shape)}, which does not fit weights {list(weight.shape)}")
        scale = scale.flatten(1).contiguous()
        if base.rpartition(".")[2] in self._exclude:
            return {name: weight, f"{name}_scale": scale}
        return int8_tensors(base, weight, scale)

    def get(self, name: str) -> Tensor:
        """One tensor, by a name that iterating gave last."""
        return self._made[name]


def read(path: Path, down_proj: str = "code") -> Released:
    """Open a released directory.

    `down_proj`: "code" leaves it dense, as the authors' code computes it, "paper" quantises it and sends it spikes, as
    their report says.
    """
    exclude = {"code": [BYPASSED], "paper": []}[down_proj]
    keys = {name: value for name, value in read_json(path / "config.json").items() if name != QUANTIZED_KEY}
    quantization = {"quant_method": METHOD, "group_size": GROUP_SIZE, "exclude": exclude}
    config = W8ASpikeConfig.from_dict({**keys, "model_type": MODEL_TYPE, "quantization_config": quantization})
    return Released(config, Int8Tensors(Shards(path), exclude))


def write(model: W8ASpikeForCausalLM, directory: Path) -> None:
    """fp32 weights and scales under the released names, with the released config."""
    keys = {**model.config.to_diff_dict(), "model_type": gla_swa.MODEL_TYPE, QUANTIZED_KEY: None}
    del keys["quantization_config"]
    write_json(directory / "config.json", {**keys, "architectures": ["GLAswaForCausalLM"]})
    writer = ShardWriter(directory)
    for name, tensor in _released_tensors(model):
        writer.add(name, tensor)
    writer.close()


def _released_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors as their authors have them, by their names."""
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        base, _, part = name.rpartition(".")
        if part == "weight" and isinstance(modules[base], QuantizedLinear):
            tensor = dequantize(modules[base].quantized_weight)
        if part == "weight_scale":
            name, tensor = f"{base}{SCALES}", tensor[..., None]
        if not part.startswith("weight_outlier"):
            yield their_name(NAMES, name), tensor
