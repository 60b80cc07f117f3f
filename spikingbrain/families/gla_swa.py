"""SpikingBrain-7B, base and chat (arXiv 2509.05276): linear attention on even layers, a sliding window on odd ones."""

from pathlib import Path
from typing import Any

from ..config import GATE_DEFAULTS
from ..errors import InputError
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
IMPLIED = {"qkv_bias": True, "gate": GATE_DEFAULTS}
OWN = {"mixers", "channel_mixers", "head_dim", "hidden_act", "rope_parameters", "spiking", *IMPLIED, *RENAMED}
OWN |= {"o_bias", "mlp_bias", "qk_norm", "num_sinks", "moe"}

NAMES = [
    (r"embeddings\.", "embed_tokens."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.mlp_norm\.", ".post_attention_layernorm."),
    (r"\.attn\.gk_proj\.0\.", ".mixer.gate_down."),
    (r"\.attn\.gk_proj\.1\.", ".mixer.gate_proj."),
    (r"\.attn\.g_norm\.", ".mixer.gla.g_norm."),
    *((rf"\.attn\.{name}_proj\.", f".mixer.{name}_proj.") for name in "qkvo"),
]


def pattern(num_layers: int) -> list[str]:
    """Even layers (from 0) linear, odd layers window: the released code ignores the config's `attn_layers`."""
    return [("gla", "sliding_window")[layer % 2] for layer in range(num_layers)]


class GLAswaConfig(FamilyConfig):
    """`GLAswaConfig` of the released repository."""

    model_type = MODEL_TYPE

    @classmethod
    def from_family(cls, keys: dict[str, Any]) -> dict[str, Any]:
        """Raises `InputError` for a setting that no released checkpoint has."""
        layers = list(range(1, keys.get("num_hidden_layers", 28), 2))
        for name, value in {**FIXED, "attn_layers": layers}.items():
            if keys.pop(name, value) != value:
                raise InputError(f"gla_swa: {name} must be {value}, as in the released checkpoints")
        if keys.pop("hidden_act", "swish") not in ("swish", "silu"):
            raise InputError("gla_swa: hidden_act must be swish, as in the released checkpoints")
        ours = {name: keys.pop(theirs) for name, theirs in RENAMED.items() if theirs in keys}
        rope = {"rope_type": "default", "rope_theta": keys.pop("rope_theta", 1e6)}
        mixers = pattern(keys.get("num_hidden_layers", 28))
        return {**keys, **ours, **IMPLIED, "rope_parameters": rope, "mixers": mixers}

    def to_family(self, keys: dict[str, Any]) -> dict[str, Any]:
        """Raises `InputError` where layers, biases, gate or spikes differ from SpikingBrain-7B's."""
        wanted = {
            **IMPLIED,
            "mixers": pattern(self.num_hidden_layers),
            "qk_norm": False,
            "spiking": None,
            "num_sinks": 0,
            "moe": None,
        }
        wanted |= {"head_dim": self.hidden_size // self.num_attention_heads, "o_bias": False, "mlp_bias": False}
        wrong = [name for name, value in wanted.items() if getattr(self, name) != value]
        if wrong:
            raise InputError(f"gla_swa cannot express this model's {', '.join(wrong)}")
        theirs = {key: value for key, value in keys.items() if key not in OWN}
        theirs |= {released: getattr(self, ours) for ours, released in RENAMED.items()}
        layers = list(range(1, self.num_hidden_layers, 2))
        rope = {"rope_theta": self.rope_parameters["rope_theta"], "hidden_act": "swish"}
        return {**theirs, **FIXED, **rope, "attn_layers": layers}


class GLAswaForCausalLM(SpikingBrainForCausalLM):
    """SpikingBrain-7B with its own tensor names on disk."""

    config_class = GLAswaConfig


Config, ForCausalLM = GLAswaConfig, GLAswaForCausalLM


def recognises(path: Path) -> bool:
    """A directory that says so."""
    return has_model_type(path, MODEL_TYPE)


def read(path: Path) -> Released:
    """Open a released directory."""
    return read_directory(path)


def write(model: GLAswaForCausalLM, directory: Path) -> None:
    """config.json and safetensors."""
    model.save_pretrained(directory)
