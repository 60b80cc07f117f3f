"""vLLM plugin: our models on vLLM's engine, with its parallel layers, paged attention and state blocks.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). Importing this imports no vLLM.
"""


def register() -> None:
    """Register every family's architecture and the int8 spike weights with vLLM; may be called again."""
    from vllm import ModelRegistry
    from vllm.model_executor.layers.quantization import register_quantization_config

    from spikingbrain import SpikingBrainForCausalLM, registry
    from spikingbrain.quantization import METHOD

    from .quantization import SpikeInt8Config

    families = [registry.load("families", name).ForCausalLM for name in registry.names("families")]
    for model in [SpikingBrainForCausalLM, *families]:
        ModelRegistry.register_model(model.__name__, f"{__name__}.model:SpikingBrainForVLLM")
    register_quantization_config(METHOD)(SpikeInt8Config)
