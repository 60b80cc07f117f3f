"""Spiking, linear-attention language models; importing this registers them with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from . import registry
from .config import SpikingBrainConfig
from .errors import InputError
from .families import renamings
from .model import SpikingBrainForCausalLM, SpikingBrainModel
from .packing import prepare
from .quantization import Int8Config
from .spiking import record_spikes

__all__ = [
    "InputError",
    "Int8Config",
    "SpikingBrainConfig",
    "SpikingBrainForCausalLM",
    "SpikingBrainModel",
    "prepare",
    "record_spikes",
]


def _register() -> None:
    AutoConfig.register("spikingbrain", SpikingBrainConfig, exist_ok=True)
    AutoModel.register(SpikingBrainConfig, SpikingBrainModel, exist_ok=True)
    AutoModelForCausalLM.register(SpikingBrainConfig, SpikingBrainForCausalLM, exist_ok=True)
    for name in registry.names("families"):
        family = registry.load("families", name)
        AutoConfig.register(name, family.Config, exist_ok=True)
        AutoModelForCausalLM.register(family.Config, family.ForCausalLM, exist_ok=True)
        register_checkpoint_conversion_mapping(name, renamings(family.NAMES), overwrite=True)


_register()
