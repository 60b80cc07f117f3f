"""A loaded model made ready for fast inference: weights packed, what shares an input multiplied at once."""

from typing import Any

import torch
from torch import Tensor, nn

from spikingbrain_kernels import KINDS, Packed, linear, pack, pack_codes, rms_norm, spike_linear
from spikingbrain_kernels.backends import backends
from spikingbrain_kernels.packed import GROUP

from .errors import InputError
from .model import MixerBlock
from .neurons import Spikes
from .quantization import QuantizedLinear
from .spiking import SpikeEncoder, SpikingHead, SpikingLinear

KIND_OF = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# By type of device: what multiplies packed weights and the kinds to choose from. On a GPU torch multiplies the rest.
PACKED_ON = {"cpu": ("native", ("auto", *KINDS)), "cuda": ("triton", ("int8",))}


class PackedLinear(nn.Module):
    """One product for all projections that read the same input; for inference only, it cannot be saved.

    `encoder`: what turns the input into spikes first, where that is not done by the block.
    """

    bias: Tensor | None

    def __init__(self, linears: dict[str, Any], kind: str, encoder: SpikeEncoder | None = None):
        super().__init__()
        self.encoder = encoder
        self.names = tuple(linears)
        self.sizes = [module.out_features for module in linears.values()]
        self.packed = _pack(list(linears.values()), kind)
        biases = [_bias(module) for module in linears.values()]
        has_bias = any(module.bias is not None for module in linears.values())
        self.register_buffer("bias", torch.cat(biases) if has_bias else None, persistent=False)
        self.register_state_dict_pre_hook(_refuse)

    def forward(self, x: Tensor | Spikes) -> Tensor:
        """`x [..., in]` -> `[..., sum of the outputs]`."""
        if self.encoder is not None:
            x = self.encoder(x)
        if isinstance(x, Spikes):
            return spike_linear(x.counts, x.scale, self.packed, self.bias)
        return linear(x, self.packed, self.bias)

    def by_name(self, x: Tensor | Spikes) -> dict[str, Tensor]:
        """Each projection's part of the output."""
        out = self.forward(x)
        parts = torch.split_with_sizes(out, self.sizes, -1) if len(self.sizes) > 1 else (out,)
        return dict(zip(self.names, parts, strict=True))


class PackedNorm(nn.Module):
    """An RMS norm in one pass."""

    weight: Tensor

    def __init__(self, norm: nn.RMSNorm, device: torch.device):
        super().__init__()
        self.epsilon = norm.eps
        self.normalized_shape = norm.normalized_shape
        ones = torch.ones(norm.normalized_shape, device=device)
        weight = ones if norm.weight is None else norm.weight.detach().float()
        self.register_buffer("weight", weight, persistent=False)
        self.register_state_dict_pre_hook(_refuse)

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., n]` -> the same."""
        return rms_norm(x, self.weight, self.epsilon)


def prepare(model: Any, kind: str = "auto", *, head_kind: str | None = None) -> Any:
    """Pack every projection and the head of `model`, in place, and give it back.

    `kind`: fp32, bf16, int8 (rounded in groups of 128 inputs) or auto, the model's own; on a GPU int8 alone.
    `head_kind`: the head's, by default the same. On a CPU a row of a packed product has the same bits in every batch
    and chunk and with any number of threads. Projections in int8 keep their codes; those with codes beyond int8,
    groups of another size or a module of their own stay as they are. The model keeps only the packed weights, so it
    can no longer be trained or saved. Raises `InputError` for an unknown kind, a model that is not in fp32 or bf16,
    or where the kernels for its device are missing.
    """
    kinds = kind, head_kind or kind
    reason = why_not(model, *kinds)
    if reason:
        raise InputError(reason)
    kind, head_kind = (KIND_OF[model.dtype] if name == "auto" else name for name in kinds)
    for block in [module for module in model.modules() if isinstance(module, MixerBlock)]:
        _pack_block(block, kind)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.RMSNorm):
                setattr(parent, name, PackedNorm(child, model.device))
    encoder = model.lm_head.encoder if isinstance(model.lm_head, SpikingHead) else None
    model.lm_head = PackedLinear({"lm_head": model.lm_head}, head_kind, encoder)
    return model.eval()


def why_not(model: Any, *kinds: str) -> str | None:
    """Why `prepare` would refuse to pack `model` in `kinds`, by default its own; None if it would not."""
    device = model.device.type
    if device not in PACKED_ON or model.dtype not in KIND_OF:
        dtypes = " or ".join(str(dtype) for dtype in KIND_OF)
        return f"packing takes a model in {dtypes} on the CPU or a GPU, not in {model.dtype} on {device}"
    name, choices = PACKED_ON[device]
    (backend,) = (backend for backend in backends("linear") if backend.name == name)
    reason = backend.missing(device, model.dtype)
    if reason:
        return f"{name} {reason}"
    unknown = [kind for kind in kinds or ("auto",) if kind not in choices]
    if unknown:
        return f"kind {unknown[0]!r} cannot be packed on {device}; choose from {', '.join(choices)}"
    return "this model is packed already" if isinstance(model.lm_head, PackedLinear) else None


def _pack_block(block: MixerBlock, kind: str) -> None:
    for source in dict.fromkeys(projection.source for projection in block.projections.values()):
        linears = {name: block.get_submodule(name) for name, p in block.projections.items() if p.source == source}
        types = {type(module) for module in linears.values()}
        if len(types) > 1 or not types <= {nn.Linear, SpikingLinear, QuantizedLinear} or not _fit(linears):
            continue
        for name in linears:
            delattr(block, name)
        block.packed[source] = PackedLinear(linears, kind)


def _fit(linears: dict[str, Any]) -> bool:
    """Whether int8 projections have the packed form's groups and no code beyond int8."""
    int8 = [module for module in linears.values() if isinstance(module, QuantizedLinear)]
    groups = all(-(-module.in_features // GROUP) == module.weight_scale.shape[1] for module in int8)
    return groups and all(module.weight_outlier_index is None for module in int8)


def _pack(linears: list[Any], kind: str) -> Packed:
    weight = torch.cat([_weight(module) for module in linears])
    if weight.dtype == torch.int8:
        return pack_codes(weight, torch.cat([module.weight_scale for module in linears]))
    return pack(weight, kind)


def _weight(module: nn.Linear) -> Tensor:
    weight = module.weight.detach()
    return module.reading(weight) if isinstance(module, SpikingLinear) else weight


def _bias(module: nn.Linear) -> Tensor:
    if module.bias is None:
        return module.weight.new_zeros(module.out_features, dtype=torch.float32)
    return module.bias.detach().float()


def _refuse(*_: Any) -> None:
    raise InputError("this model was packed for inference and cannot be saved; load it again to save it")
