"""SpikeGPT, 46M and 216M (arXiv 2302.13939): RWKV-4 with spiking neurons, as its training code computes it."""

import re
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import PickledTensors
from ..errors import InputError
from ..model import SpikingBrainForCausalLM
from . import FamilyConfig, Released, has_model_type, read_directory, their_name

MODEL_TYPE = "spikegpt"

# Ours -> the training code's; the released files hold tensors only, so config.json exists once a file is imported.
RENAMED = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "max_position_embeddings": "ctx_len"}
IMPLIED = {
    "norm": "layer_norm",
    "rms_norm_eps": 1e-5,
    "embedding_norm": True,
    "lif": {"tau": 2.0, "v_th": 1.0, "v_reset": 0.0, "decay_input": True},
    "tie_word_embeddings": False,
    "num_attention_heads": 1,
}
# What else a SpikeGPT model has one value for, and what it does not use.
DEFAULTS = {"qkv_bias": False, "o_bias": False, "mlp_bias": False, "spiking": None, "moe": None, "num_sinks": 0}
UNUSED = {"conv_size", "gate", "head_dim", "hidden_act", "num_key_value_heads", "qk_norm", "rope_parameters", "window"}
OWN = {"mixers", "channel_mixers", "intermediate_size", *IMPLIED, *DEFAULTS, *UNUSED, *RENAMED}
CONTEXT_LENGTH = 1024

NAMES = [
    (r"^emb\.", "model.embed_tokens."),
    (r"^blocks\.0\.ln0\.", "model.embedding_norm."),
    (r"^blocks\.", "model.layers."),
    (r"\.ln1\.", ".input_layernorm."),
    (r"\.ln2\.", ".post_attention_layernorm."),
    (r"\.att\.time_mix_", ".mixer.rwkv.shift.time_mix_"),
    (r"\.att\.time_decay", ".mixer.rwkv.wkv.time_decay"),
    (r"\.att\.time_first", ".mixer.rwkv.wkv.time_first"),
    (r"\.att\.key\.", ".mixer.k_proj."),
    (r"\.att\.value\.", ".mixer.v_proj."),
    (r"\.att\.receptance\.", ".mixer.r_proj."),
    (r"\.att\.output\.", ".mixer.o_proj."),
    (r"\.ffn\.time_mix_", ".mlp.rwkv.shift.time_mix_"),
    (r"\.ffn\.key\.", ".mlp.k_proj."),
    (r"\.ffn\.receptance\.", ".mlp.r_proj."),
    (r"\.ffn\.value\.", ".mlp.v_proj."),
    (r"^ln_out\.", "model.norm."),
    (r"^head\.", "lm_head."),
]


class SpikeGPTConfig(FamilyConfig):
    """The sizes of the training code's `GPTConfig`, and `spike_embedding`: whether embeddings are spikes."""

    model_type = MODEL_TYPE

    @classmethod
    def from_family(cls, keys: dict[str, Any]) -> dict[str, Any]:
        """Embeddings are spikes unless the keys say otherwise."""
        ours = {name: keys.pop(theirs) for name, theirs in RENAMED.items() if theirs in keys}
        if "hidden_size" not in ours:
            raise InputError("spikegpt: n_embd is missing")
        own = {"mixers": ["rwkv"], "channel_mixers": ["rwkv"], "intermediate_size": 4 * ours["hidden_size"]}
        return {"spike_embedding": True, **keys, **ours, **IMPLIED, **own}

    def to_family(self, keys: dict[str, Any]) -> dict[str, Any]:
        """Raises `InputError` where the model is not SpikeGPT's."""
        layers = ["rwkv"] * self.num_hidden_layers
        wanted = {**IMPLIED, **DEFAULTS, "mixers": layers, "channel_mixers": layers}
        wanted["intermediate_size"] = 4 * self.hidden_size
        wrong = [name for name, value in wanted.items() if getattr(self, name) != value]
        if wrong:
            raise InputError(f"spikegpt cannot express this model's {', '.join(wrong)}")
        theirs = {key: value for key, value in keys.items() if key not in OWN}
        theirs |= {released: getattr(self, ours) for ours, released in RENAMED.items()}
        return {**theirs, "spike_embedding": self.spike_embedding}


class SpikeGPTForCausalLM(SpikingBrainForCausalLM):
    """SpikeGPT with its own tensor names on disk."""

    config_class = SpikeGPTConfig


Config, ForCausalLM = SpikeGPTConfig, SpikeGPTForCausalLM


def recognises(path: Path) -> bool:
    """A `.pth` file with its tensor names, alone in a directory or by itself; or an imported directory."""
    file = _file(path)
    if file is None:
        return has_model_type(path, MODEL_TYPE)
    try:
        return "blocks.0.att.time_decay" in set(PickledTensors(file))
    except InputError:
        return False


def read(path: Path) -> Released:
    """Open a `.pth` file, its sizes inferred from its tensors, or an imported directory."""
    file = _file(path)
    if file is None:
        return read_directory(path)
    tensors = PickledTensors(file)
    layers = {int(match[1]) for match in (re.match(r"blocks\.(\d+)\.", name) for name in tensors) if match}
    if "emb.weight" not in set(tensors) or tensors.get("emb.weight").dim() != 2:
        raise InputError(f"{file} has no matrix emb.weight, so it is no SpikeGPT")
    vocabulary, width = tensors.get("emb.weight").shape
    keys = {"vocab_size": vocabulary, "n_embd": width, "n_layer": max(layers, default=-1) + 1}
    dtype = str(tensors.get("emb.weight").dtype).removeprefix("torch.")
    return Released(SpikeGPTConfig.from_dict({**keys, "ctx_len": CONTEXT_LENGTH, "dtype": dtype}), tensors)


def write(model: SpikeGPTForCausalLM, directory: Path) -> None:
    """`model.pth`: a plain dict of tensors."""
    model.config.to_diff_dict()
    own = {their_name(NAMES, name): tensor.cpu() for name, tensor in model.state_dict().items()}
    torch.save(own, directory / "model.pth")


def _file(path: Path) -> Path | None:
    """The `.pth` file that `path` is, or that alone lies in it."""
    if path.is_file():
        return path if path.suffix == ".pth" else None
    files = sorted(path.glob("*.pth"))
    return files[0] if len(files) == 1 and not (path / "config.json").exists() else None
