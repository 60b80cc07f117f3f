"""The configuration of the one decoder: Qwen2's names for sizes, norms and positions, and a mixer for each layer."""

from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig

from . import registry
from .errors import InputError
from .integer import WEIGHTS

GATE_DEFAULTS = {"rank": 16, "normalizer": 16.0, "feature_map": "relu", "tied": False}
# Decay = 1 - k needs k in (0, 1) and no gate of its own.
TIED_GATE = {"rank": None, "normalizer": 1.0, "feature_map": "sigmoid", "tied": True}
MOE_DEFAULTS: dict[str, Any] = {
    "num_experts": 16,
    "top_k": 1,
    "num_shared": 1,
    "score": "softmax",
    "aux_loss": 0.01,
    "bias_rate": 0.0,
}
LIF_DEFAULTS = {"tau": 2.0, "v_th": 1.0, "v_reset": 0.0, "decay_input": True}
SPIKING_DEFAULTS: dict[str, Any] = {
    "neuron": "adaptive",
    "code": "bitwise",
    "params": {},
    "exclude": [],
    "head": False,
    "weights": "float",
    "gain": None,
}

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
    num_sinks: learned keys and values that every token of a softmax or window mixer sees besides.
    gate: `{rank, normalizer, feature_map, tied}` of gated linear attention; rank None is one dense projection;
    `{"tied": true}` takes the decay from the key, 1 - sigmoid(k), and has no gate.
    moe: `{num_experts, top_k, num_shared, score, aux_loss, bias_rate}` of the layers whose channel mixer is "moe", None
    without any: routed experts, how many of them a token is sent to at most, experts all tokens are sent to, "softmax",
    "sigmoid" or "spike" of the router, weight of the balance loss, step of the loss-free balance.
    norm: `rms_norm`, `simple_rms_norm` (no weight) or `layer_norm`, before every block and the head. conv_size: taps of
    mixers with a short convolution. embedding_norm: a norm after the embedding. spike_embedding: only the embedding's
    signs are used. lif: None, or `{tau, v_th, v_reset, decay_input}`: every block's output passes spiking neurons.
    spiking: None, or `{neuron, code, params, exclude, head, weights, gain}`; `exclude` names projections that stay
    dense; `head`: whether the head reads spikes too; `weights` of the other projections: "float", "ternary" or "wage";
    `gain`: the norms before neurons with a fixed threshold v_th start at gain v_th (tdBN, arXiv 2011.05280), which sets
    how often a model that starts from scratch fires.

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
    num_sinks: int = 0
    gate: dict | None = None
    moe: dict | None = None
    norm: str = "rms_norm"
    conv_size: int = 4
    embedding_norm: bool = False
    spike_embedding: bool = False
    lif: dict | None = None
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
        self.gate = _fill_gate(self.gate or {})
        if self.moe is not None or "moe" in self.channel_mixers:
            self.moe = _fill("moe", self.moe or {}, MOE_DEFAULTS)
            check_moe(self.moe, self.channel_mixers)
        if self.lif is not None:
            self.lif = _fill("lif", self.lif, LIF_DEFAULTS)
        if self.spiking is not None:
            self.spiking = _fill("spiking", self.spiking, SPIKING_DEFAULTS)
            check_spiking(self.spiking)
            if self.spiking["gain"] is not None and self.norm == "simple_rms_norm":
                raise InputError("spiking.gain is where norms with a weight start; simple_rms_norm has none")
        if self.window < 1:
            raise InputError(f"window must be at least 1, got {self.window}")
        if self.num_sinks < 0:
            raise InputError(f"num_sinks must not be negative, got {self.num_sinks}")
        super().__post_init__(**kwargs)

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer, 0 without any: Hugging Face's name, by which serving engines know of them."""
        return 0 if self.moe is None else self.moe["num_experts"]

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


def _fill_gate(given: dict[str, Any]) -> dict[str, Any]:
    if not given.get("tied"):
        return _fill("gate", given, GATE_DEFAULTS)
    gate = _fill("gate", given, TIED_GATE)
    if gate != TIED_GATE:
        raise InputError(f"a tied gate has no settings besides: it is {TIED_GATE}, got {gate}")
    return gate


def check_moe(moe: dict[str, Any], channel_mixers: list[str]) -> None:
    """Raise `InputError` unless every setting has its type and range and some layer has experts."""
    if "moe" not in channel_mixers:
        raise InputError("moe is set, but channel_mixers has no moe layer")
    experts = moe["num_experts"]
    valid = {
        "num_experts": type(experts) is int and experts >= 1,
        "top_k": type(moe["top_k"]) is int and type(experts) is int and 1 <= moe["top_k"] <= experts,
        "num_shared": type(moe["num_shared"]) is int and moe["num_shared"] >= 0,
        "score": moe["score"] in ("softmax", "sigmoid", "spike"),
        "aux_loss": type(moe["aux_loss"]) in (int, float) and moe["aux_loss"] >= 0,
        "bias_rate": type(moe["bias_rate"]) in (int, float) and moe["bias_rate"] >= 0,
    }
    wrong = [f"{name}={moe[name]!r}" for name, good in valid.items() if not good]
    if wrong:
        raise InputError(
            f"moe: {', '.join(wrong)}; needs integers num_experts >= top_k >= 1 and num_shared >= 0, "
            "score softmax, sigmoid or spike, aux_loss and bias_rate >= 0"
        )


def check_spiking(spiking: dict[str, Any]) -> None:
    """Raise `InputError` unless the neuron accepts its parameters and the code can carry the neuron's counts."""
    make = registry.load("neurons", spiking["neuron"]).Neuron
    code = registry.load("codes", spiking["code"])
    try:
        neuron = make(1, **spiking["params"])
    except TypeError as error:
        raise InputError(f"spiking.params do not fit neuron {spiking['neuron']!r}: {error}") from None
    if spiking["weights"] not in WEIGHTS:
        raise InputError(f"unknown weights {spiking['weights']!r} in spiking; choose from {', '.join(WEIGHTS)}")
    if type(spiking["head"]) is not bool:
        raise InputError(f"spiking.head is true or false, got {spiking['head']!r}")
    if spiking["head"] and not neuron.parallel:
        raise InputError(f"spiking.head: neuron {spiking['neuron']!r} has a memory of earlier tokens, a head has none")
    gain = spiking["gain"]
    if gain is not None and not (type(gain) in (int, float) and gain > 0 and hasattr(neuron, "v_th")):
        raise InputError(f"spiking.gain is above 0, for a neuron with a fixed threshold; got {gain!r}")
    if neuron.signed and not code.SIGNED:
        signed = [name for name in registry.names("codes") if registry.load("codes", name).SIGNED]
        raise InputError(
            f"neuron {spiking['neuron']!r} fires with both signs, code {spiking['code']!r} has none; "
            f"choose from {', '.join(signed)}"
        )
