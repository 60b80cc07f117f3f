"""Held-out loss of any causal language model directory, in nats a token, with statistics where there are spikes."""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from .checkpoint import load_model, load_tokenizer
from .energy import Constants, energy_table
from .errors import InputError
from .spiking import record_spikes
from .statistics import read_at_k_3, recorded_statistics, statistics_by_kind, token_kinds


def text_files(paths: list[str | Path], pattern: str) -> list[Path]:
    """Files, and files below directories that match `pattern`, sorted; raises `InputError` where there are none."""
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{path} does not exist")
        found += sorted(path.rglob(pattern)) if path.is_dir() else [path]
    files = [path for path in found if path.is_file()]
    if not files:
        raise InputError(f"no files match {pattern!r} in {', '.join(map(str, paths))}")
    return files


def pieces(tokenizer: Any, files: list[Path], context: int, max_tokens: int) -> Iterator[Tensor]:
    """Rows `[context + 1]` of token ids, each within one document; what is left of a document is dropped.

    The first row of each document, then the second of each, and so on: where there is more text than `max_tokens`, no
    long document stands for all.
    """
    rounds = zip_longest(*(_rows(tokenizer, file, context) for file in files))
    rows = (row for round in rounds for row in round if row is not None)
    return islice(rows, -(-max_tokens // context))


def _rows(tokenizer: Any, file: Path, context: int) -> Iterator[Tensor]:
    ids = tokenizer(file.read_text(errors="replace"), add_special_tokens=False, return_tensors="pt").input_ids[0]
    for start in range(0, len(ids) - context, context):
        yield ids[start : start + context + 1]


@torch.no_grad()
def evaluate(
    path: str | Path, files: list[Path], *, context: int = 256, max_tokens: int = 65536, batch_size: int = 16
) -> dict[str, Any]:
    """Mean negative log-likelihood of `files` under the model in `path`, in pieces of `context` tokens.

    Returns `loss` (nats a token), `num_tokens`, and `spikes` for a spiking model.
    """
    model, tokenizer = load_model(path), load_tokenizer(path)
    tokenizer.model_max_length = int(1e9)
    rows = list(pieces(tokenizer, files, context, max_tokens))
    if not rows:
        raise InputError(f"no document has {context + 1} tokens; choose a smaller context")
    spiking = getattr(model.config, "spiking", None)
    total, count, statistics = 0.0, 0, None
    with record_spikes(model) if spiking else nullcontext() as record:
        for start in tqdm(range(0, len(rows), batch_size), desc=f"eval {Path(path).name}", unit="batch"):
            ids = torch.stack(rows[start : start + batch_size]).to(model.device)
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            total += float(cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"))
            count += ids[:, 1:].numel()
            if record is not None and statistics is None:
                statistics = recorded_statistics(model, record)
            if record is not None:
                for calls in record.counts.values():
                    calls.clear()
    return {"model": str(path), "loss": total / count, "num_tokens": count, "spikes": statistics}


@torch.no_grad()
def spiking_figures(
    path: str | Path, files: list[Path], constants: Constants, *, context: int = 256, num_texts: int = 16
) -> dict[str, Any]:
    """Energy table, statistics by encoder and by kind of token, and the readings of "sparsity" at k = 3.

    The readings are those of Gaussian noise, Laplace noise and the model's own activations through `adaptive` at k = 3.
    Raises `InputError` for a model without spikes.
    """
    model, tokenizer = load_model(path), load_tokenizer(path)
    if not getattr(model.config, "spiking", None):
        raise InputError(f"{path} has no spikes; turn them on with spikingbrain spike")
    tokenizer.model_max_length = int(1e9)
    rows = list(pieces(tokenizer, files, context, num_texts * context))
    if not rows:
        raise InputError(f"no document has {context + 1} tokens; choose a smaller context")
    ids = torch.stack(rows)[:, :-1]
    with record_spikes(model) as record, read_at_k_3(model) as columns:
        model(input_ids=ids, use_cache=False)
    statistics = recorded_statistics(model, record)
    kinds = statistics_by_kind(record, *token_kinds(tokenizer, ids))
    energy = energy_table(model, statistics, constants)
    return {"energy": energy, "readings": columns, "kinds": kinds, "statistics": statistics}
