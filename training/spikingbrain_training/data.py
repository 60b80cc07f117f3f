"""Token shards and the samples cut from them: which tokens a step sees is a pure function of (seed, step, slot)."""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spikingbrain.errors import InputError
from spikingbrain.files import new_directory, read_json, write_json

TOKENS, DOCUMENTS, INDEX = "tokens.bin", "documents.bin", "index.json"
IGNORED = -100
FILES_AT_ONCE = 64


class Batch(NamedTuple):
    """`inputs [B, T]`, `labels [B, T]` (the next token, -100 at a document's end), `positions [B, T]` in documents."""

    inputs: Tensor
    labels: Tensor
    positions: Tensor

    @property
    def num_targets(self) -> int:
        """Tokens that count in the loss."""
        return int((self.labels != IGNORED).sum())

    @property
    def cu_seqlens(self) -> Tensor:
        """Where documents begin in the flattened rows, and their end: int32 `[N + 1]`."""
        starts = self.positions.clone()
        starts[:, 0] = 0
        begin = (starts.flatten() == 0).nonzero().squeeze(1)
        return torch.cat([begin, begin.new_tensor([self.inputs.numel()])]).int()

    @property
    def attention_mask(self) -> Tensor:
        """`[B, 1, T, T]` booleans: what each token may see within its document."""
        document = (self.positions == 0).cumsum(1)
        same = document[:, :, None] == document[:, None]
        return (same & torch.ones_like(same[0]).tril())[:, None]


def build(files: list[Path], tokenizer: Any, out: str | Path) -> dict[str, Any]:
    """Tokenise `files`, one document each, its end marked by the tokenizer's eos; returns the index it writes.

    Raises `InputError` if the tokenizer has no eos.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-text token to mark where a document ends")
    dtype = np.dtype("uint16" if len(tokenizer) <= 2**16 else "uint32")
    lengths: list[int] = []
    with new_directory(out) as directory:
        with (directory / TOKENS).open("wb") as tokens:
            for ids in _tokenise(files, tokenizer):
                tokens.write(np.array([*ids, tokenizer.eos_token_id], dtype).tobytes())
                lengths.append(len(ids) + 1)
        offsets = np.cumsum([0, *lengths]).astype("int64")
        (directory / DOCUMENTS).write_bytes(offsets.tobytes())
        index = {
            "num_tokens": int(offsets[-1]),
            "num_documents": len(lengths),
            "dtype": dtype.name,
            "vocabulary": len(tokenizer),
            "sha256": {name: _sha256(directory / name) for name in (TOKENS, DOCUMENTS)},
        }
        write_json(directory / INDEX, index)
    return index


def _tokenise(files: list[Path], tokenizer: Any) -> Iterator[list[int]]:
    tokenizer.model_max_length = int(1e9)
    with tqdm(total=len(files), desc="tokenise", unit="file") as progress:
        for start in range(0, len(files), FILES_AT_ONCE):
            texts = [file.read_text(errors="replace") for file in files[start : start + FILES_AT_ONCE]]
            yield from tokenizer(texts, add_special_tokens=False).input_ids
            progress.update(len(texts))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenDataset:
    """Sequences of `length` tokens and their targets, cut from a shard; each once an epoch, in an order of the seed's.

    Raises `InputError` naming a file that is missing or has another size, or with `checksums` another content, than
    its index says.
    """

    def __init__(self, path: str | Path, length: int, seed: int, *, checksums: bool = False):
        directory = Path(path)
        self.index = read_json(directory / INDEX)
        self.length, self.seed = length, seed
        _verify(directory, self.index, checksums)
        self._tokens = np.memmap(directory / TOKENS, self.index["dtype"], mode="r")
        self._offsets = np.fromfile(directory / DOCUMENTS, "int64")
        self.num_sequences = (len(self._tokens) - 1) // length
        if self.num_sequences == 0:
            raise InputError(f"{directory} has {len(self._tokens)} tokens, too few for sequence_length {length}")

    def place(self, number: int) -> int:
        """Which sequence of the shard the `number`-th sample of the run is."""
        epoch, within = divmod(number, self.num_sequences)
        return int(_order(self.seed, epoch, self.num_sequences)[within])

    def batch(self, numbers: list[int]) -> Batch:
        """The samples of these numbers."""
        rows = [self._row(self.place(number) * self.length) for number in numbers]
        return Batch(*(torch.from_numpy(np.stack(parts)) for parts in zip(*rows, strict=True)))

    def _row(self, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = np.asarray(self._tokens[start : start + self.length + 1], dtype="int64")
        place = np.arange(start, start + self.length + 1)
        document = np.searchsorted(self._offsets, place, side="right")
        labels = np.where(document[1:] == document[:-1], tokens[1:], IGNORED)
        begin = np.maximum(self._offsets[document[:-1] - 1], start)
        return tokens[:-1], labels, place[:-1] - begin


def _verify(directory: Path, index: dict[str, Any], checksums: bool) -> None:
    token_bytes = np.dtype(index["dtype"]).itemsize
    sizes = {TOKENS: index["num_tokens"] * token_bytes, DOCUMENTS: (index["num_documents"] + 1) * 8}
    for name, size in sizes.items():
        file = directory / name
        fits = file.exists() and file.stat().st_size == size
        if not fits or (checksums and _sha256(file) != index["sha256"][name]):
            raise InputError(f"{file} is missing or does not fit {INDEX}; build the data again")


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def micro_batches(dataset: TokenDataset, step: int, sequences: int, micro: int, rank: int, world: int) -> list[Batch]:
    """A rank's share of a step, in micro batches; the union over ranks does not depend on how many there are."""
    first = step * sequences
    numbers = range(first + rank * (sequences // world), first + (rank + 1) * (sequences // world))
    return [dataset.batch(list(numbers[start : start + micro])) for start in range(0, len(numbers), micro)]
