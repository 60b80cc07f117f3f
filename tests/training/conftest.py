"""A byte tokenizer, a shard of short and long documents, and tiny models: Qwen2 and ours."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from spikingbrain import SpikingBrainConfig, SpikingBrainForCausalLM
from spikingbrain_training.build import build
from spikingbrain_training.config import TrainConfig

LENGTHS = (3, 41, 7, 0, 50, 12, 1, 63, 90, 5, 31, 17, 40, 2, 60, 9, 0, 22, 14, 70, 4, 33, 26, 11)
LENGTH = 29
SIZES = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
    "eos_token_id": 256,
    "bos_token_id": None,
    "pad_token_id": None,
}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    """A directory with a tokenizer of bytes and an end mark."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {**{letter: number for number, letter in enumerate(alphabet)}, "<end>": 256}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<end>").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> list[Path]:
    """Documents of many lengths, an empty one among them."""
    folder = tmp_path_factory.mktemp("texts")
    letters = torch.randint(97, 123, (sum(LENGTHS),), generator=torch.Generator().manual_seed(5)).tolist()
    files = []
    for number, length in enumerate(LENGTHS):
        files.append(folder / f"{number:02d}.txt")
        files[-1].write_bytes(bytes(letters[sum(LENGTHS[:number]) :][:length]))
    return files


@pytest.fixture(scope="session")
def data(tmp_path_factory, texts, tokenizer) -> Path:
    """The shard of `texts`."""
    path = tmp_path_factory.mktemp("data") / "shard"
    build(texts, tokenizer, path)
    return path


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory, tokenizer) -> Path:
    """A softmax model with its tokenizer."""
    return _save(tmp_path_factory.mktemp("qwen2"), Qwen2ForCausalLM, Qwen2Config(**SIZES), tokenizer)


@pytest.fixture(scope="session")
def ours(tmp_path_factory, tokenizer) -> Path:
    """A linear model with a window layer."""
    config = SpikingBrainConfig(**SIZES, mixers=["gla", "sliding_window"], window=7, qkv_bias=True)
    return _save(tmp_path_factory.mktemp("ours"), SpikingBrainForCausalLM, config, tokenizer)


def _save(path: Path, architecture: Any, config: Any, tokenizer: Path) -> Path:
    torch.manual_seed(3)
    architecture(config).save_pretrained(path)
    PreTrainedTokenizerFast.from_pretrained(tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def configure(data, qwen2) -> Callable[..., TrainConfig]:
    """`configure(out, batch={"micro": 1})`: a small run, with keys of its groups replaced."""
    small = {
        "stage": "pretrain",
        "model": {"init_from": str(qwen2)},
        "data": {"path": str(data), "sequence_length": LENGTH},
        "batch": {"sequences": 4, "micro": 2},
        "optim": {"lr": 1e-3, "warmup_steps": 2, "weight_decay": 0.1, "gradient_clipping": 0.0},
        "steps": 3,
        "seed": 11,
        "parallel": {"processes": 2, "zero": 1},
        "checkpoint": {"every": 1, "keep": 10},
    }

    def configure(out: Path, **changes: Any) -> TrainConfig:
        merged = {"out": str(out), **small}
        for key, value in changes.items():
            merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
        return TrainConfig.model_validate(merged)

    return configure


@pytest.fixture
def make_config(configure, tmp_path) -> Callable[..., TrainConfig]:
    """`configure` with a directory of the test's own."""
    return partial(configure, tmp_path / "run")
