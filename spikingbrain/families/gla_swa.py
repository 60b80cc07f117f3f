"""SpikingBrain-7B, base and chat (arXiv 2509.05276): linear attention on even layers, a sliding window on odd ones."""

from pathlib import Path
from typing import Any

from ..checkpoint import Shards
from ..config import GATE_DEFAULTS
from ..errors import InputError
from ..files import read_json
from ..model import SpikingBrainForCausalLM
from . import FamilyConfig, Released, has_model_type, read_directory

MODEL_TYPE = "gla_swa"

# Ours -> the released config's; what is not named here has the same name in both.
RENAMED = {"rms_norm_eps": "norm_eps", "window": "sliding_window"}
# Settings of the released code that its checkpoints never change and ours does not have.
FIXED = {
    "attention_dropout": 0.0,
    "attn_mode": "chunk",
    "conv_size": 4,
    "elementwise_affine": True,
    "fuse_cross_entropy": True,
    "use_short_conv": False,
}
OWN = {"mixers", "channel_mixers", "head_dim", "hidden_act", "rope_parameters", "spiking", "gate", *RENAMED}
PLAIN = {"qk_norm": False, "o_bias": False, "mlp_bias": False, "num_sinks": 0, "moe": None, "norm": "rms_norm"}
PLAIN |= {"embedding_norm": False, "spike_embedding": False, "lif": None}
OWN |= {"qkv_bias", *PLAIN}
# What tells a W8ASpike checkpoint, which has the same model type.
QUANTIZED_KEY = "quant_weight_group_size"
SCALES = ".weight_quantizer.scales"

NAMES = [
    (r"embeddings\.", "embed_tokens."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.mlp_norm\.", ".post_attention_layernorm."),
    (r"\.attn\.gk_proj\.0\.", ".mixer.gate_down."),
    (r"\.attn\.gk_proj\.1\.", ".mixer.gate_proj."),
    (r"\.attn\.g_norm\.", ".mixer.gla.g_norm."),
    *((rf"\.attn\.{name}_proj\.", f".mixer.{name}_proj.") for name in "qkvo"),
]


class GLAswaConfig(FamilyConfig):
    """`GLAswaConfig` of the released repository."""

    model_type = MODEL_TYPE

    @classmethod
    def implied(cls, keys: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG003
        """What the released code fixes and its config does not say."""
        return {"qkv_bias": True, "gate": GATE_DEFAULTS, "mixers": ["gla", "sliding_window"], "spiking": None}

    @classmethod
    def from_family(cls, keys: dict[str, Any]) -> dict[str, Any]:
        """Raises `InputError` for a setting that no released checkpoint has.

        Even layers (from 0) are linear, odd ones windows: the released code ignores the config's `attn_layers`.
        """
        if QUANTIZED_KEY in keys:
            raise InputError("this is a W8ASpike checkpoint, int8 weights in fp32: run spikingbrain import DIR OUT")
        layers = list(range(1, keys.get("num_hidden_layers", 28), 2))
        for name, value in {**FIXED, "attn_layers": layers}.items():
            if keys.pop(name, value) != value:
                raise InputError(f"gla_swa: {name} must be {value}, as in the released checkpoints")
        if keys.pop("hidden_act", "swish") not in ("swish", "silu"):
            raise InputError("gla_swa: hidden_act must be swish, as in the released checkpoints")
        ours = {name: keys.pop(theirs) for name, theirs in RENAMED.items() if theirs in keys}
        rope = {"rope_type": "default", "rope_theta": keys.pop("rope_theta", 1e6)}
        return {"num_hidden_layers": 28, **keys, **ours, **cls.implied(keys), "rope_parameters": rope}

    def to_family(self, keys: dict[str, Any]) -> dict[str, Any]:
        """Raises `InputError` where layers, biases, gate or spikes differ from SpikingBrain-7B's."""
        wanted = {**self.implied(keys), **PLAIN, "head_dim": self.hidden_size // self.num_attention_heads}
        wanted["mixers"] = [wanted["mixers"][layer % 2] for layer in range(self.num_hidden_layers)]
        wrong = [name for name, value in wanted.items() if getattr(self, name) != value]
        if wrong:
            raise InputError(f"{self.model_type} cannot express this model's {', '.join(wrong)}")
        theirs = {key: value for key, value in keys.items() if key not in OWN}
        theirs |= {released: getattr(self, ours) for ours, released in RENAMED.items()}
        layers = list(range(1, self.num_hidden_layers, 2))
        rope = {"rope_theta": self.rope_parameters["rope_theta"], "hidden_act": "swish"}
        return {**theirs, **FIXED, **rope, "attn_layers": layers}


class GLAswaForCausalLM(SpikingBrainForCausalLM):
    """SpikingBrain-7B with its own tensor names on disk."""

    config_class = GLAswaConfig

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As every model's; says what to do with a W8ASpike directory whose config does not give it away."""
        try:
            return super().from_pretrained(path, *args, **kwargs)
        except InputError as error:
            if SCALES not in str(error):
                raise
            raise InputError(f"{path} is a W8ASpike checkpoint: run spikingbrain import {path} OUT") from None


Config, ForCausalLM = GLAswaConfig, GLAswaForCausalLM


def has_scales(path: Path) -> bool:
    """Whether a gla_swa directory holds a quantiser's scales."""
    if QUANTIZED_KEY in read_json(path / "config.json"):
        return True
    try:
        return any(name.endswith(SCALES) for name in Shards(path))
    except InputError:
        return False


def recognises(path: Path) -> bool:
    """A directory that says so, without scales."""
    return has_model_type(path, MODEL_TYPE) and not has_scales(path)


def read(path: Path) -> Released:
    """Open a released directory."""
    return read_directory(path)


def write(model: GLAswaForCausalLM, directory: Path) -> None:
    """config.json and safetensors."""
    model.save_pretrained(directory)
