"""int8 weights for spike counts as a quantisation method of vLLM; on a CPU in the packed form of our kernels."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.utils import set_weight_attrs

from spikingbrain.errors import InputError
from spikingbrain.quantization import GROUP_SIZE, METHOD
from spikingbrain_kernels import state_dtype
from spikingbrain_kernels.library import missing
from spikingbrain_kernels.quantized import Int8Weight, pack_parts, spike_linear, spike_linear_parts


class SpikeInt8Config(QuantizationConfig):
    """`group_size`: inputs that share a scale. `exclude`: names, or their last parts, of what is not quantised."""

    def __init__(self, group_size: int, exclude: list[str]):
        super().__init__()
        self.group_size, self.exclude = group_size, exclude

    def get_name(self) -> Any:
        """The method's name in config.json."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Counts may come in any of these."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Plain torch: any GPU."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None besides config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SpikeInt8Config":
        """From `quantization_config`."""
        return cls(config.get("group_size", GROUP_SIZE), config.get("exclude", []))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:  # noqa: ARG002
        """Our linears ask only for the projections that read spikes; all else is as it is."""
        return SpikeInt8Method(self) if isinstance(layer, LinearBase) else None


class SpikeInt8Method(LinearMethodBase):
    """counts W^T in fp32 with W = code * scale; the caller multiplies by what a spike is worth."""

    def __init__(self, config: SpikeInt8Config):
        self.config = config

    def create_weights(  # type: ignore[override]
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        weight_loader: Any,
        **_sizes: Any,
    ) -> None:
        """Codes `[out, in]`, scales `[out, in / group]` and a list of outliers (place, code), filled when loading.

        Raises `InputError` where a rank's inputs are not whole groups.
        """
        size, columns = self.config.group_size, input_size_per_partition
        if columns % size:
            raise InputError(f"{METHOD}: {columns} inputs on each rank are not whole groups of {size}")
        rows = sum(output_partition_sizes)
        for name, shape, dtype in (
            ("weight", (rows, columns), torch.int8),
            ("weight_scale", (rows, columns // size), torch.float32),
        ):
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"input_dim": 1, "output_dim": 0, "weight_loader": weight_loader})
            layer.register_parameter(name, parameter)
        layer.outliers = []

    def process_weights_after_loading(self, layer: Any) -> None:
        """One list of outliers for the merged weight; on a CPU the weight is packed and only that is kept."""
        index = code = None
        if layer.outliers:
            index, code = (torch.cat(parts).to(layer.weight.device) for parts in zip(*layer.outliers, strict=True))
        layer.int8 = Int8Weight(layer.weight.data, layer.weight_scale.data, index, code)
        native = layer.weight.device.type == "cpu" and missing() is None
        layer.parts = pack_parts(layer.int8) if native else None
        if layer.parts is not None:
            layer.weight = layer.weight_scale = layer.int8 = None

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Counts `x [..., in]` -> `[..., out]` in fp32."""
        counts = x.to(state_dtype(x.dtype))
        ones = torch.ones_like(counts[..., :1])
        if layer.parts is None:
            return spike_linear(counts, ones, layer.int8, bias)
        return spike_linear_parts(counts, ones, layer.parts, bias)
