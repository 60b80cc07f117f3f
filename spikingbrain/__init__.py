"""Spiking, linear-attention language models; importing this registers them with transformers' Auto classes."""

from importlib import import_module
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import WeightRenaming, register_checkpoint_conversion_mapping

from . import registry
from .config import SpikingBrainConfig
from .errors import InputError
from .model import SpikingBrainForCausalLM, SpikingBrainModel
from .packing import prepare
from .spiking import record_spikes

__all__ = [
    "InputError",
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
        family = import_module(f"spikingbrain.families.{name}")
        AutoConfig.register(name, family.Config, exist_ok=True)
        AutoModelForCausalLM.register(family.Config, family.ForCausalLM, exist_ok=True)
        renamings: list[Any] = [WeightRenaming(theirs, ours) for theirs, ours in family.NAMES]
        register_checkpoint_conversion_mapping(name, renamings, overwrite=True)


_register()
