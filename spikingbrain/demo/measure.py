"""What the demo measures itself: the unigram bar, and decode speed and memory against length beside the base."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import load_model, load_tokenizer
from ..evaluation import pieces
from ..spiking import record_spikes

LENGTHS = (128, 512, 2048, 8192)
DECODE_STEPS = 24
PREFILL_CHUNK = 1024
RASTER_TOKENS, RASTER_CHANNELS = 64, 96


def unigram_loss(model: Path, train: list[Path], heldout: list[Path], context: int, max_tokens: int) -> float:
    """Nats a token of the best model that knows only how often each token is (add-one smoothed counts of `train`)."""
    tokenizer = load_tokenizer(model)
    tokenizer.model_max_length = int(1e9)
    counts = torch.ones(len(tokenizer), dtype=torch.float64)
    for number, count in Counter(_ids(tokenizer, train)).items():
        counts[number] += count
    log_probability = (counts / counts.sum()).log()
    targets = torch.cat([row[1:] for row in pieces(tokenizer, heldout, context, max_tokens)])
    return float(-log_probability[targets].mean())


def _ids(tokenizer: Any, files: list[Path]) -> list[int]:
    texts = [file.read_text(errors="replace") for file in files]
    return [number for ids in tokenizer(texts, add_special_tokens=False).input_ids for number in ids]


@torch.no_grad()
def decode_by_length(model: Path, seed: int) -> list[dict[str, float]]:
    """For each length: bytes remembered and the median time of one more token, for any causal language model."""
    network = load_model(model)
    ids = torch.randint(0, network.config.vocab_size, (1, max(LENGTHS) + DECODE_STEPS * len(LENGTHS)))
    cache, done, rows = None, 0, []
    torch.manual_seed(seed)
    for length in LENGTHS:
        while done < length:
            chunk = ids[:, done : min(done + PREFILL_CHUNK, length)]
            cache = network(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            done += chunk.shape[1]
        size = cache_bytes(cache)
        times = []
        for _ in range(DECODE_STEPS):
            start = time.perf_counter()
            cache = network(ids[:, done : done + 1], past_key_values=cache, use_cache=True).past_key_values
            times.append(time.perf_counter() - start)
            done += 1
        rows.append({"length": length, "bytes": size, "seconds_per_token": sorted(times)[len(times) // 2]})
    return rows


def cache_bytes(cache: Any) -> int:
    """Bytes of a cache of ours, or of transformers' keys and values."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.no_grad()
def raster(model: Path, text: str) -> dict[str, Any]:
    """Counts of the first channels of one encoder in the middle of the model, token by token."""
    network, tokenizer = load_model(model), load_tokenizer(model)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[:, :RASTER_TOKENS]
    with record_spikes(network) as record:
        network(ids)
    name = f"model.layers.{network.config.num_hidden_layers // 2}.mlp.encoders.hidden"
    return {"encoder": name, "counts": record.counts[name][0][0, :, :RASTER_CHANNELS].tolist()}
