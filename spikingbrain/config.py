"""The configuration of the one decoder: Qwen2's names for sizes, norms and positions, and a mixer for each layer."""

from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig

from . import registry
from .errors import InputError

GATE_DEFAULTS = {"rank": 16, "normalizer": 16.0, "feature_map": "relu"}
SPIKING_DEFAULTS: dict[str, Any] = {"neuron": "adaptive", "code": "bitwise", "params": {}, "exclude": []}

# Keys that transformers itself writes into config.json or passes on.
HUGGING_FACE_KEYS = {
    "_commit_hash",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "partial_rotary_factor",
    "quantization_config",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
}


@strict
class SpikingBrainConfig(PreTrainedConfig):
    """Sizes as in Qwen2; in addition:

    mixers: one token mixer a layer, or a shorter pattern that is repeated; `"a+b"` runs two in parallel.
    channel_mixers: the same for the feed-forward half. window: tokens a window mixer sees, the query's own included.
    gate: `{rank, normalizer, feature_map}` of gated linear attention; rank None is one dense projection.
    spiking: None, or `{neuron, code, params, exclude}`; `exclude` names projections that stay dense.

    Raises `InputError` for an unknown key or name.
    """

    model_type = "spikingbrain"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 151936
    hidden_size: int = 896
    intermediate_size: int = 4864
    num_hidden_layers: int = 24
    num_attention_heads: int = 14
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    mixers: list[str] | None = None
    channel_mixers: list[str] | None = None
    window: int = 4096
    gate: dict | None = None
    spiking: dict | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_unknown(kwargs)
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.mixers = self._per_layer("mixers", self.mixers or ["gla", "sliding_window"])
        self.channel_mixers = self._per_layer("channel_mixers", self.channel_mixers or ["swiglu"])
        self.gate = _fill("gate", self.gate or {}, GATE_DEFAULTS)
        if self.spiking is not None:
            self.spiking = _fill("spiking", self.spiking, SPIKING_DEFAULTS)
            check_spiking(self.spiking)
        if self.window < 1:
            raise InputError(f"window must be at least 1, got {self.window}")
        super().__post_init__(**kwargs)

    def _refuse_unknown(self, keys: dict[str, Any]) -> None:
        known = HUGGING_FACE_KEYS | set(GenerationConfig._get_default_generation_params())
        unknown = sorted(key for key in keys if key not in known and not key.startswith("_"))
        if unknown:
            valid = ", ".join(sorted(field.name for field in fields(self)))
            raise InputError(f"unknown config keys {', '.join(unknown)}; {self.model_type} knows {valid}")

    def _per_layer(self, folder: str, pattern: list[str]) -> list[str]:
        """Repeat a short pattern to one name a layer, and look every name up."""
        layers = self.num_hidden_layers
        if len(pattern) > layers:
            raise InputError(f"{folder} names {len(pattern)} layers, the model has {layers}")
        for name in {part for entry in pattern for part in entry.split("+")}:
            registry.load(folder, name)
        return [pattern[layer % len(pattern)] for layer in range(layers)]


def _fill(group: str, given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise InputError(f"unknown keys {', '.join(unknown)} in {group}; it knows {', '.join(sorted(defaults))}")
    return {**defaults, **given}


def check_spiking(spiking: dict[str, Any]) -> None:
    """Raise `InputError` unless the neuron accepts its parameters and the code can carry the neuron's counts."""
    make = registry.load("neurons", spiking["neuron"]).Neuron
    code = registry.load("codes", spiking["code"])
    try:
        neuron = make(1, **spiking["params"])
    except TypeError as error:
        raise InputError(f"spiking.params do not fit neuron {spiking['neuron']!r}: {error}") from None
    if neuron.signed and not code.SIGNED:
        signed = [name for name in registry.names("codes") if registry.load("codes", name).SIGNED]
        raise InputError(
            f"neuron {spiking['neuron']!r} fires with both signs, code {spiking['code']!r} has none; "
            f"choose from {', '.join(signed)}"
        )
