"""Floating-point operations of a model, mixer by mixer from what each remembers: no quadratic term beyond softmax."""

import math
from typing import Any

from spikingbrain.experts import count_parameters
from spikingbrain.model import MixerBlock
from spikingbrain.state import StateSpec

# A product and a sum a weight forward, twice that backward.
FORWARD_AND_BACKWARD = 3


def flops_per_token(model: Any, length: int) -> float:
    """Forward and backward, a token, in documents of `length` tokens; recomputed activations are not counted."""
    blocks = [module for module in model.modules() if isinstance(module, MixerBlock)]
    specs = [spec for block in blocks for spec in block.state_specs(model.dtype)]
    mixing = sum(mixing_flops(spec, model.config, length) for spec in specs)
    if not blocks:
        mixing = model.config.num_hidden_layers * _attention(model.config, (length + 1) / 2)
    return FORWARD_AND_BACKWARD * (2 * active_parameters(model) + mixing)


def active_parameters(model: Any) -> int:
    """Parameters that multiply each token: not the embedding's rows, and of routed experts those it is sent to."""
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    return count_parameters(model).active - (0 if tied else embedding.numel())


def mixing_flops(spec: StateSpec, config: Any, length: int) -> float:
    """Forward, a token: writing a state and reading it, or scores and sums over the tokens that are seen."""
    if spec.kind == "growing":
        return _attention(config, (length + 1) / 2)
    if spec.kind == "ring":
        window = min(config.window, length)
        return _attention(config, window - window * (window - 1) / (2 * length))
    if spec.kind == "recurrent" and len(spec.shape) == 3:
        groups, keys, values = spec.shape
        return 2 * keys * values * (groups + config.num_attention_heads)
    return 2 * math.prod(spec.shape)


def _attention(config: Any, seen: float) -> float:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 4 * config.num_attention_heads * head * seen
