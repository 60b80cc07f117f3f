"""int8 weights for spike counts, as transformers' quantisation method `spikingbrain_int8`.

On disk and in memory a projection X is `X.weight` int8 `[out, in]`, `X.weight_scale` fp32 `[out, in / group_size]` and,
where codes do not fit int8, `X.weight_outlier_index` int32 and `X.weight_outlier_code` int16.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spikingbrain_kernels.quantized import INT8, Int8Weight, quantize, spike_linear

from . import registry
from .errors import InputError
from .families import our_name
from .model import MixerBlock
from .neurons import Spikes
from .spiking import SpikingLinear

METHOD = "spikingbrain_int8"
GROUP_SIZE = 128


class QuantizedLinear(SpikingLinear):
    """A projection of spikes with int8 weights: scale * (counts W^T) + b, exact for any code and any count.

    Raises `InputError` if `group_size` does not divide `in_features`.
    """

    weight_scale: Tensor
    weight_outlier_index: Tensor | None
    weight_outlier_code: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, group_size: int, num_outliers: int):
        super().__init__(in_features, out_features, bias)
        if in_features % group_size:
            raise InputError(f"{METHOD}: {in_features} inputs are not whole groups of {group_size}")
        # transformers is not to draw codes from a normal distribution where a file lacks them.
        self._is_hf_initialized = True
        codes = torch.zeros(out_features, in_features, dtype=torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("weight_scale", torch.zeros(out_features, in_features // group_size, dtype=torch.float32))
        outliers = num_outliers > 0
        index, code = (torch.zeros(num_outliers, dtype=dtype) for dtype in (torch.int32, torch.int16))
        self.register_buffer("weight_outlier_index", index if outliers else None)
        self.register_buffer("weight_outlier_code", code if outliers else None)

    @property
    def quantized_weight(self) -> Int8Weight:
        """The weight as the kernels take it."""
        return Int8Weight(self.weight, self.weight_scale, self.weight_outlier_index, self.weight_outlier_code)

    def forward(self, spikes: Spikes) -> Tensor:  # type: ignore[override]
        """`Spikes [..., in]` -> `[..., out]`."""
        return spike_linear(spikes.counts, spikes.scale, self.quantized_weight, self.bias)


class UnquantizedLinear(nn.Linear):
    """A projection left as it is, beside scales that its checkpoint has for it and its authors' code does not use."""

    def __init__(self, in_features: int, out_features: int, bias: bool, num_groups: int):
        super().__init__(in_features, out_features, bias)
        self.register_buffer("weight_scale", torch.zeros(out_features, num_groups, dtype=torch.float32))


@register_quantization_config(METHOD)
@dataclass
class Int8Config(QuantizationConfigMixin):
    """`group_size`: inputs that share a scale. `exclude`: names, or their last parts, of what is not quantised."""

    quant_method: str = METHOD  # type: ignore[assignment]
    group_size: int = GROUP_SIZE
    exclude: list[str] = field(default_factory=list)


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):
    """Puts int8 projections in place of spiking ones before the checkpoint is loaded; it never quantises itself."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_options: Any
    ) -> None:
        sizes = _stored_sizes(checkpoint_files or [], model.config.model_type)
        inner = "" if hasattr(model, model.base_model_prefix) else f"{model.base_model_prefix}."
        for block_name, block in list(model.named_modules()):
            for name in block.projections if isinstance(block, MixerBlock) else ():
                linear = block.get_submodule(name)
                setattr(block, name, self._replacement(f"{inner}{block_name}.{name}", linear, sizes))
        self._shapes = _shapes(model)

    def _process_model_after_weight_loading(self, model: Any, **_options: Any) -> None:
        # Older versions of transformers (5.19) take tensors of any shape where a model is quantised.
        found = _shapes(model)
        wrong = [
            f"{name} {list(found[name])} where {list(shape)} is needed"
            for name, shape in self._shapes.items()
            if found[name] != shape
        ]
        if wrong:
            raise InputError(f"mismatched: {', '.join(wrong)}")

    def _replacement(self, name: str, linear: Any, sizes: dict[str, list[int]]) -> nn.Module:
        config: Any = self.quantization_config
        shape = (linear.in_features, linear.out_features, linear.bias is not None)
        if any(f".{name}".endswith(f".{end}") for end in config.exclude):
            scale = sizes.get(f"{name}.weight_scale")
            return linear if scale is None else UnquantizedLinear(*shape, scale[1])
        if not isinstance(linear, SpikingLinear):
            raise InputError(f"{METHOD}: {name} takes no spikes; name it in exclude or turn spikes on")
        (outliers,) = sizes.get(f"{name}.weight_outlier_index", [0])
        return QuantizedLinear(*shape, config.group_size, outliers)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@torch.no_grad()
def quantize_projections(model: Any) -> Any:
    """Round the spiking projections of `model` to int8 in groups of 128 inputs, in place, and give it back.

    The largest weight of a group gets the code 127. Projections whose inputs are not whole groups stay as they are and
    are named in the config. Raises `InputError` where none is.
    """
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, MixerBlock)}
    found = {f"{place}.{name}": (block, name) for place, block in blocks.items() for name in block.projections}
    exclude = [name for name, (block, part) in found.items() if not _can_be_int8(block.get_submodule(part))]
    if len(exclude) == len(found):
        raise InputError(f"int8 weights: no spiking projection has whole groups of {GROUP_SIZE} inputs")
    for name, (block, part) in found.items():
        if name not in exclude:
            linear: Any = block.get_submodule(part)
            setattr(block, part, _quantized(linear))
    model.config.quantization_config = {"quant_method": METHOD, "group_size": GROUP_SIZE, "exclude": exclude}
    return model


def _can_be_int8(linear: Any) -> bool:
    return isinstance(linear, SpikingLinear) and linear.in_features % GROUP_SIZE == 0


def _quantized(linear: Any) -> QuantizedLinear:
    weight = linear.reading(linear.weight.float())
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    scale = groups.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) / INT8.max
    made = QuantizedLinear(linear.in_features, linear.out_features, linear.bias is not None, GROUP_SIZE, 0)
    made.weight.copy_(quantize(weight, scale).codes)
    made.weight_scale.copy_(scale)
    made.bias = linear.bias
    return made


def int8_tensors(name: str, weight: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The tensors on disk of projection `name`: `weight [out, in]` on the grid of `scale [out, in / group]`.

    Raises `InputError` naming the projection if a weight has no code.
    """
    try:
        int8 = quantize(weight, scale)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{name}: {error}") from None
    parts = ("weight", "weight_scale", "weight_outlier_index", "weight_outlier_code")
    return {f"{name}.{part}": x.contiguous() for part, x in zip(parts, int8, strict=True) if x is not None}


def _stored_sizes(files: list[str], model_type: str) -> dict[str, list[int]]:
    """Shapes, by our names, of the tensors whose size the config does not tell."""
    names = registry.load("families", model_type).NAMES if model_type in registry.names("families") else []
    sizes = {}
    for file in files:
        with safe_open(file, framework="pt") as shard:
            for name in set(shard.keys()):
                if name.endswith((".weight_scale", ".weight_outlier_index")):
                    sizes[our_name(names, name)] = shard.get_slice(name).get_shape()
    return sizes
