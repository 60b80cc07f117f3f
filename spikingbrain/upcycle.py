"""From a dense model to one with experts: its feed-forward blocks copied to every expert, a new router before them.

arXiv 2509.05276, section 3.4; sparse upcycling, 2212.05055.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from tqdm import tqdm
from transformers.activations import ACT2FN

from .checkpoint import Shards, copy_tokenizer, load_config, shard_bytes
from .config import SpikingBrainConfig
from .convert import CheckedWriter, expected_tensors
from .errors import InputError
from .experts import count_parameters
from .files import new_directory, write_json
from .model import SpikingBrainForCausalLM

FEED_FORWARD = re.compile(r"model\.layers\.(\d+)\.mlp\.((gate|up|down)_proj)\.(weight|bias)")
PARTS = ("gate", "up", "down")
PROBES = 64


def upcycle(
    dense: str | Path,
    out: str | Path,
    moe: dict[str, Any],
    *,
    scale: str,
    layers: list[int] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the model of `dense` to `out` with experts as in `moe` in `layers` (from 0; None: all of them).

    scale: with S shared experts, k of N routed ones and all routes equally likely, N experts that are copies give
    c = S + k / N times the dense output. "exact" divides the down projections by c; "paper" divides gate, up and down
    by the cube root of c, which is exact only for a linear activation. Returns the report that is also written to
    `out/upcycling.json`: among others each layer's relative error under such a router, on inputs as its norm gives
    them. Tensors are read and written one by one. Raises `InputError`, having written nothing, for a model that is not
    this project's or not dense, layers it has not, or a damaged file.
    """
    source = load_config(dense)
    config = moe_config(source, moe, layers)
    factors = expert_factors(config.moe, scale)
    chosen = [layer for layer, name in enumerate(config.channel_mixers) if name == "moe"]
    shards = Shards(dense)
    with new_directory(out) as directory:
        writer = CheckedWriter(directory, expected_tensors(config), shard_bytes(shards.largest_bytes))
        new = []
        for name, tensor, is_new in _tensors(shards, config, chosen, factors, torch.Generator().manual_seed(seed)):
            writer.add(name, tensor)
            new += [name] if is_new else []
        writer.close()
        config.architectures = [SpikingBrainForCausalLM.__name__]
        config.save_pretrained(directory)
        copy_tokenizer(dense, directory)
        errors = {layer: feed_forward_error(shards, config, layer, factors) for layer in chosen}
        report = {
            "dense": str(dense),
            "moe": config.moe,
            "layers": chosen,
            "scale": scale,
            "factors": factors,
            "seed": seed,
            "new_parameters": new,
            **_sizes(config),
            "relative_error_by_layer": errors,
            "max_relative_error": max(errors.values()),
        }
        write_json(directory / "upcycling.json", report)
    return report


def _sizes(config: SpikingBrainConfig) -> dict[str, int]:
    with torch.device("meta"):
        parameters = count_parameters(SpikingBrainForCausalLM(config))
    return {"num_parameters": parameters.total, "num_active_parameters": parameters.active}


def moe_config(source: Any, moe: dict[str, Any], layers: list[int] | None) -> SpikingBrainConfig:
    """The dense model's config with experts in `layers`; raises `InputError` where that cannot be."""
    if source.model_type != SpikingBrainConfig.model_type:
        raise InputError(f"cannot upcycle a {source.model_type} model; convert it first")
    if source.moe is not None:
        raise InputError("the model has experts already; upcycle the dense one")
    if source.spiking is not None:
        raise InputError("upcycle the dense model and turn spikes on afterwards")
    chosen = set(range(source.num_hidden_layers) if layers is None else layers)
    wrong = sorted(layer for layer in chosen if not 0 <= layer < source.num_hidden_layers)
    if wrong or not chosen:
        raise InputError(f"layers must be among 0 to {source.num_hidden_layers - 1}, got {wrong or 'none'}")
    other = sorted(layer for layer in chosen if source.channel_mixers[layer] != "swiglu")
    if other:
        raise InputError(f"layers {other} have no dense swiglu block to copy")
    mixers = ["moe" if layer in chosen else name for layer, name in enumerate(source.channel_mixers)]
    return SpikingBrainConfig(**{**source.to_dict(), "channel_mixers": mixers, "moe": moe})


def expert_factors(moe: dict[str, Any], scale: str) -> dict[str, float]:
    """What gate, up and down of the copied block are multiplied by (arXiv 2509.05276, eq. 18)."""
    if moe["score"] != "softmax":
        raise InputError("upcycling needs the score softmax: c = S + k / N rests on probabilities that sum to 1")
    c = moe["num_shared"] + moe["top_k"] / moe["num_experts"]
    if scale == "exact":
        return {"gate": 1.0, "up": 1.0, "down": 1 / c}
    if scale == "paper":
        return dict.fromkeys(PARTS, c ** (-1 / 3))
    raise InputError(f"unknown scale {scale!r}; choose from exact, paper")


def _tensors(
    shards: Shards, config: SpikingBrainConfig, layers: list[int], factors: dict[str, float], generator: torch.Generator
) -> Iterator[tuple[str, Tensor, bool]]:
    """Our name, the tensor, and whether it is new; one tensor of the dense model in memory at a time."""
    blocks = [("experts", i) for i in range(config.moe["num_experts"])]
    blocks += [("shared", i) for i in range(config.moe["num_shared"])]
    dtype = torch.get_default_dtype()
    for name in tqdm(shards, desc="upcycle", unit="tensor"):
        match, tensor = FEED_FORWARD.fullmatch(name), shards.get(name)
        if not match or int(match[1]) not in layers:
            yield name, tensor, False
            continue
        dtype = tensor.dtype
        scaled = _scaled(tensor, factors[match[3]])
        for kind, number in blocks:
            # Files may not share memory between tensors.
            yield f"model.layers.{match[1]}.mlp.moe.{kind}.{number}.{match[2]}.{match[4]}", scaled.clone(), False
    for layer in layers:
        shape = (config.moe["num_experts"], config.hidden_size)
        weight = config.initializer_range * torch.randn(shape, generator=generator)
        yield f"model.layers.{layer}.mlp.moe.router.weight", weight.to(dtype), True
        yield f"model.layers.{layer}.mlp.moe.router.balance_bias", torch.zeros(shape[0]), True


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor).to(tensor.dtype)


def feed_forward_error(shards: Shards, config: SpikingBrainConfig, layer: int, factors: dict[str, float]) -> float:
    """RMS(c E(x) - dense(x)) / RMS(dense(x)) of one layer for the scaled copy E, c = S + k / N, and random x.

    x: standard normal noise through the layer's norm, in fp32; the rounding of the scaled tensors counts.
    """
    prefix = f"model.layers.{layer}."
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(PROBES, config.hidden_size, generator=generator)
    x = noise * shards.get(f"{prefix}post_attention_layernorm.weight").float()
    names = [name for name in shards if name.startswith(f"{prefix}mlp.")]
    tensors = {name.removeprefix(f"{prefix}mlp."): shards.get(name) for name in names}
    copies = {name: _scaled(tensor, factors[name.partition("_")[0]]) for name, tensor in tensors.items()}
    c = config.moe["num_shared"] + config.moe["top_k"] / config.moe["num_experts"]
    dense = _feed_forward(tensors, config.hidden_act, x)
    error = c * _feed_forward(copies, config.hidden_act, x) - dense
    return float(error.pow(2).mean().sqrt() / dense.pow(2).mean().sqrt())


def _feed_forward(tensors: dict[str, Tensor], activation: str, x: Tensor) -> Tensor:
    """down(act(gate x) * up x), in fp32."""

    def project(part: str, inputs: Tensor) -> Tensor:
        bias = tensors.get(f"{part}_proj.bias")
        return linear(inputs, tensors[f"{part}_proj.weight"].float(), None if bias is None else bias.float())

    return project("down", ACT2FN[activation](project("gate", x)) * project("up", x))
