"""MetaLA, 378M, 1B and 3B (arXiv 2411.10741): one linear layer for all, tied embeddings, norms without parameters."""

from pathlib import Path
from typing import Any

from ..errors import InputError
from ..model import SpikingBrainForCausalLM
from . import FamilyConfig, Released, has_model_type, read_directory

MODEL_TYPE = "metala"

# Ours -> the released config's; what is not named here has the same name in both.
RENAMED = {
    "hidden_size": "decoder_embed_dim",
    "num_hidden_layers": "decoder_layers",
    "num_attention_heads": "decoder_attention_heads",
    "intermediate_size": "glu_dim",
    "hidden_act": "glu_act",
    "initializer_range": "init_std",
}
# Settings of the released code that its checkpoints never change and ours does not have.
FIXED = {
    "add_bos_token": False,
    "bias": False,
    "causal": True,
    "no_scale_embedding": True,
    "norm_type": "simplermsnorm",
}
IMPLIED = {
    "norm": "simple_rms_norm",
    "conv_size": 4,
    "tie_word_embeddings": True,
    "gate": {"rank": None, "normalizer": 16.0, "feature_map": "identity", "tied": False},
}
# What else a MetaLA model has one value for, and what it does not use.
DEFAULTS = {"qkv_bias": False, "o_bias": False, "mlp_bias": False, "qk_norm": False, "rms_norm_eps": 1e-6}
DEFAULTS |= {
    "spiking": None,
    "moe": None,
    "num_sinks": 0,
    "lif": None,
    "embedding_norm": False,
    "spike_embedding": False,
}
UNUSED = {"window", "rope_parameters", "max_position_embeddings"}
OWN = {"mixers", "channel_mixers", "head_dim", "num_key_value_heads", *IMPLIED, *DEFAULTS, *UNUSED, *RENAMED}

NAMES = [
    (r"\.token_mixer\.conv1d\.", ".mixer.metala.conv1d."),
    (r"\.token_mixer\.aug_balance", ".mixer.metala.augmentation.balance"),
    (r"\.token_mixer\.k_gate\.", ".mixer.gate_proj."),
    (r"\.token_mixer\.out_proj\.", ".mixer.o_proj."),
    *((rf"\.token_mixer\.{name}_proj\.", f".mixer.{name}_proj.") for name in "qvg"),
    (r"\.channel_mixer\.l1\.", ".mlp.gate_proj."),
    (r"\.channel_mixer\.l2\.", ".mlp.up_proj."),
    (r"\.channel_mixer\.l3\.", ".mlp.down_proj."),
]


class MetaLAConfig(FamilyConfig):
    """`MetaLAConfig` of the released repository."""

    model_type = MODEL_TYPE

    @classmethod
    def from_family(cls, keys: dict[str, Any]) -> dict[str, Any]:
        """Raises `InputError` for a setting that no released checkpoint has."""
        for name, value in FIXED.items():
            if keys.pop(name, value) != value:
                raise InputError(f"metala: {name} must be {value}, as in the released checkpoints")
        ours = {name: keys.pop(theirs) for name, theirs in RENAMED.items() if theirs in keys}
        return {**keys, **ours, **IMPLIED, "mixers": ["metala"]}

    def to_family(self, keys: dict[str, Any]) -> dict[str, Any]:
        """Raises `InputError` where the model is not MetaLA's."""
        heads, layers = self.num_attention_heads, self.num_hidden_layers
        wanted = {**IMPLIED, **DEFAULTS, "mixers": ["metala"] * layers, "channel_mixers": ["swiglu"] * layers}
        wanted |= {"head_dim": self.hidden_size // heads, "num_key_value_heads": heads}
        wrong = [name for name, value in wanted.items() if getattr(self, name) != value]
        if wrong:
            raise InputError(f"metala cannot express this model's {', '.join(wrong)}")
        theirs = {key: value for key, value in keys.items() if key not in OWN}
        return {**theirs, **FIXED, **{released: getattr(self, ours) for ours, released in RENAMED.items()}}


class MetaLAForCausalLM(SpikingBrainForCausalLM):
    """MetaLA with its own tensor names on disk."""

    config_class = MetaLAConfig


Config, ForCausalLM = MetaLAConfig, MetaLAForCausalLM


def recognises(path: Path) -> bool:
    """A directory that says so."""
    return has_model_type(path, MODEL_TYPE)


def read(path: Path) -> Released:
    """Open a released directory."""
    return read_directory(path)


def write(model: MetaLAForCausalLM, directory: Path) -> None:
    """config.json and safetensors."""
    model.save_pretrained(directory)
