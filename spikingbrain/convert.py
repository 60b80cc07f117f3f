"""From a Hugging Face Transformer to our decoder: layer by layer, every tensor accounted for."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig

from . import registry
from .checkpoint import Shards, ShardWriter, copy_tokenizer, load_config, shard_bytes
from .config import SpikingBrainConfig
from .errors import InputError
from .files import new_directory, write_json
from .model import SpikingBrainForCausalLM

SOURCES = ("llama", "mistral", "qwen2", "qwen3")
COPIED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "dtype",
)
# Tensors of old checkpoints that hold nothing learned.
DROPPED = re.compile(r"rotary_emb\.inv_freq$")
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def convert(
    base: str | Path, out: str | Path, mixers: list[str], *, window: int | None = None, seed: int = 0, **options: Any
) -> dict[str, Any]:
    """Write the model of `base` with `mixers` (a pattern over the layers) to `out`, new parameters initialised.

    `options`: further fields of the config (`num_sinks`, `gate`).
    Returns the report that is also written to `out/conversion.json`. Raises `InputError` for an unsupported
    architecture, a damaged file, or any tensor that is missing, left over or of the wrong shape; `out` is complete or
    absent.
    """
    source = load_config(base)
    config = target_config(source, mixers, window, **options)
    shards = Shards(base)
    with new_directory(out) as directory:
        writer = CheckedWriter(directory, expected_tensors(config), shard_bytes(shards.largest_bytes))
        new = []
        for name, tensor, is_new in _tensors(shards, config, torch.Generator().manual_seed(seed)):
            writer.add(name, tensor)
            new += [name] if is_new else []
        writer.close()
        config.architectures = [SpikingBrainForCausalLM.__name__]
        config.save_pretrained(directory)
        copy_tokenizer(base, directory)
        report = {
            "base": str(base),
            "base_model_type": source.model_type,
            "mixers": config.mixers,
            "seed": seed,
            "num_copied_tensors": len(writer.written) - len(new),
            "new_parameters": new,
            "num_new_parameters": sum(writer.written[name] for name in new),
            "num_parameters": sum(writer.written.values()),
        }
        write_json(directory / "conversion.json", report)
    return report


def target_config(
    source: PreTrainedConfig, mixers: list[str], window: int | None, **options: Any
) -> SpikingBrainConfig:
    """Our config for a source's; raises `InputError` where ours cannot say what the source computes."""
    if source.model_type not in SOURCES:
        raise InputError(f"cannot convert model_type {source.model_type!r}; choose from {', '.join(SOURCES)}")
    attention_bias = bool(getattr(source, "attention_bias", source.model_type == "qwen2"))
    source_window = _source_window(source)
    if source_window and any("softmax" in name for name in mixers):
        raise InputError(f"the base attends over a window of {source_window} tokens: use sliding_window, not softmax")
    return SpikingBrainConfig(
        **{name: getattr(source, name) for name in COPIED_FIELDS},
        head_dim=getattr(source, "head_dim", None),
        qkv_bias=attention_bias,
        o_bias=attention_bias and source.model_type in ("llama", "qwen3"),
        mlp_bias=bool(getattr(source, "mlp_bias", False)),
        qk_norm=source.model_type == "qwen3",
        mixers=mixers,
        window=window or source_window or min(4096, source.max_position_embeddings),
        **options,
    )


def _source_window(source: PreTrainedConfig) -> int | None:
    """The window of a base that has one on any layer."""
    if source.model_type == "mistral":
        return source.sliding_window
    windowed = getattr(source, "use_sliding_window", False) and "sliding_attention" in (source.layer_types or [])
    return source.sliding_window if windowed else None


def expected_tensors(config: SpikingBrainConfig) -> dict[str, torch.Size]:
    """Names and shapes of all tensors a model of ours must have on disk."""
    with torch.device("meta"):
        model = SpikingBrainForCausalLM(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    return expected


def _tensors(
    shards: Shards, config: SpikingBrainConfig, generator: torch.Generator
) -> Iterator[tuple[str, Tensor, bool]]:
    """Our name, the tensor, and whether it is new; one layer's attention in memory at a time."""
    attention: dict[int, dict[str, str]] = {}
    for name in shards:
        if DROPPED.search(name) or (config.tie_word_embeddings and name == "lm_head.weight"):
            continue
        match = LAYER.fullmatch(name)
        if match and match[2].startswith("self_attn."):
            attention.setdefault(int(match[1]), {})[match[2].removeprefix("self_attn.")] = name
        else:
            yield name, shards.get(name), False
    for layer, names in tqdm(sorted(attention.items()), desc="convert", unit="layer"):
        if layer >= config.num_hidden_layers:
            raise InputError(f"the base has tensors of layer {layer} but only {config.num_hidden_layers} layers")
        tensors = {part: shards.get(name) for part, name in names.items()}
        for part, tensor, is_new in _layer_tensors(tensors, config, config.mixers[layer].split("+"), generator):
            yield f"model.layers.{layer}.mixer.{part}", tensor, is_new


def _layer_tensors(
    attention: dict[str, Tensor], config: SpikingBrainConfig, mixers: list[str], generator: torch.Generator
) -> Iterator[tuple[str, Tensor, bool]]:
    """What the mixers of one layer make of its attention; projections are shared, the rest is each mixer's own."""
    done = set()
    for name in mixers:
        mixer = registry.load("mixers", name).Mixer
        projections = mixer.projections(config)
        for part, tensor in mixer.init_from_attention(attention, config, generator).items():
            place = part if part.partition(".")[0] in projections else f"{name}.{part}"
            if place not in done:
                # Two mixers may start from the same tensor, a file may not share one.
                yield place, tensor.clone() if place != part else tensor, part not in attention
            done.add(place)
        if len(mixers) > 1:
            yield (
                f"branch_norm.{name}.weight",
                torch.ones(config.head_dim, dtype=attention["k_proj.weight"].dtype),
                True,
            )


class CheckedWriter(ShardWriter):
    """Writes the tensors that are expected, and no others."""

    def __init__(self, directory: Path, expected: dict[str, torch.Size], max_bytes: int):
        super().__init__(directory, max_bytes)
        self.expected = expected
        self.written: dict[str, int] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; raises `InputError` if the model has none of this name and shape."""
        if name not in self.expected:
            raise InputError(f"the base has a tensor that this model has no place for: {name}")
        if tensor.shape != self.expected[name]:
            raise InputError(f"{name} is {list(tensor.shape)}, expected {list(self.expected[name])}")
        self.written[name] = tensor.numel()
        super().add(name, tensor)

    def close(self) -> None:
        """Write the rest and the index; raises `InputError` naming tensors that never came."""
        missing = sorted(set(self.expected) - set(self.written))
        if missing:
            raise InputError(f"the base lacks tensors: {', '.join(missing)}")
        super().close()
