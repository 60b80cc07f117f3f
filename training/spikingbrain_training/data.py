"""Token shards and the samples cut from them: which tokens a step sees is a pure function of (seed, step, slot)."""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spikingbrain.errors import InputError
from spikingbrain.files import read_json

from .config import Data, Source

TOKENS, DOCUMENTS, TARGETS, INDEX = "tokens.bin", "documents.bin", "targets.bin", "index.json"
IGNORED = -100
# Samples over which a mixture's weights hold exactly.
BLOCK = 1024


class Batch(NamedTuple):
    """`inputs [B, T]`, `labels [B, T]` (the next token, -100 at a document's end), `positions [B, T]` in documents."""

    inputs: Tensor
    labels: Tensor
    positions: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on `device`."""
        return Batch(*(part.to(device) for part in self))

    @property
    def num_targets(self) -> int:
        """Tokens that count in the loss."""
        return int((self.labels != IGNORED).sum())

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.inputs)

    @property
    def rows(self) -> Tensor:
        """Which row each token is of `[B T]`."""
        return torch.arange(self.num_rows, device=self.inputs.device).repeat_interleave(self.inputs.shape[1])

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


def file_sha256(path: Path) -> str:
    """The file's checksum, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenDataset:
    """Sequences of `length` tokens and their targets, cut from a shard; each once an epoch, in an order of the seed's.

    `packing` "stream" cuts wherever a sequence is full; "whole" puts as many whole documents into one as fit, and cuts
    only those that are longer. Raises `InputError` naming a file that is missing or has another size, or with
    `checksums` another content, than its index says.
    """

    def __init__(self, path: str | Path, length: int, seed: int, *, packing: str = "stream", checksums: bool = False):
        self.path = directory = Path(path)
        self.index = read_json(directory / INDEX)
        self.length, self.seed = length, seed
        _verify(directory, self.index, checksums)
        self._tokens = np.memmap(directory / TOKENS, self.index["dtype"], mode="r")
        self._targets = np.memmap(directory / TARGETS, "uint8", mode="r") if TARGETS in self.index["sha256"] else None
        self._offsets = np.fromfile(directory / DOCUMENTS, "int64")
        self._cuts = _whole_documents(self._offsets, length) if packing == "whole" else None
        self.num_sequences = (len(self._tokens) - 1) // length if self._cuts is None else len(self._cuts) - 1
        if self.num_sequences == 0:
            raise InputError(f"{directory} has {len(self._tokens)} tokens, too few for sequence_length {length}")

    def place(self, number: int) -> int:
        """Which sequence of the shard the `number`-th sample of the run is."""
        epoch, within = divmod(number, self.num_sequences)
        return int(_order(self.seed, epoch, self.num_sequences)[within])

    def batch(self, numbers: list[int]) -> Batch:
        """The samples of these numbers."""
        return stack([self.row(number) for number in numbers])

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, labels and positions of one sample."""
        place = self.place(number)
        if self._cuts is None:
            return self._cut(place * self.length, self.length)
        start, stop = int(self._cuts[place]), int(self._cuts[place + 1])
        tokens, labels, positions = self._cut(start, stop - start)
        missing = self.length - len(tokens)
        # What fills a row is a document of its own that does not count.
        filling = (np.zeros(missing, "int64"), np.full(missing, IGNORED), np.arange(missing))
        row = [np.concatenate(pair) for pair in zip((tokens, labels, positions), filling, strict=True)]
        return row[0], row[1], row[2]

    def _cut(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = np.asarray(self._tokens[start : start + length + 1], dtype="int64")
        tokens = np.pad(tokens, (0, length + 1 - len(tokens)))
        place = np.arange(start, start + length + 1)
        document = np.searchsorted(self._offsets, place, side="right")
        counts = document[1:] == document[:-1]
        if self._targets is not None:
            following = self._targets[start + 1 : start + length + 1]
            counts &= np.pad(following, (0, length - len(following))).astype(bool)
        labels = np.where(counts, tokens[1:], IGNORED)
        begin = np.maximum(self._offsets[document[:-1] - 1], start)
        return tokens[:-1], labels, place[:-1] - begin


def _whole_documents(offsets: np.ndarray, length: int) -> np.ndarray:
    """Where samples begin, and their end: whole documents while they fit, pieces of `length` where one does not."""
    cuts = [0]
    while cuts[-1] < offsets[-1]:
        fits = offsets[np.searchsorted(offsets, cuts[-1] + length, side="right") - 1]
        cuts.append(int(fits) if fits > cuts[-1] else cuts[-1] + length)
    return np.array(cuts, "int64")


def _verify(directory: Path, index: dict[str, Any], checksums: bool) -> None:
    token_bytes = np.dtype(index["dtype"]).itemsize
    sizes = {
        TOKENS: index["num_tokens"] * token_bytes,
        DOCUMENTS: (index["num_documents"] + 1) * 8,
        TARGETS: index["num_tokens"],
    }
    for name, checksum in index["sha256"].items():
        file = directory / name
        fits = file.exists() and file.stat().st_size == sizes[name]
        if not fits or (checksums and file_sha256(file) != checksum):
            raise InputError(f"{file} is missing or does not fit {INDEX}; build the data again")


def stack(rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Batch:
    """Rows as a batch."""
    return Batch(*(torch.from_numpy(np.stack(parts)) for parts in zip(*rows, strict=True)))


class Mixture:
    """Samples of several datasets by weight: the same share of every block of samples, in an order of the seed's.

    Which dataset a sample is from, and which of its samples it is, follow from the seed and the sample's number alone.
    """

    def __init__(self, datasets: list[TokenDataset], weights: list[float], seed: int):
        self.datasets, self.seed = datasets, seed
        self.shares = _shares(weights, BLOCK)
        if 0 in self.shares:
            raise InputError(f"a source with weight {min(weights)} of {sum(weights)} would never be read")

    @property
    def num_sequences(self) -> int:
        """Samples until one of the datasets is through its first epoch."""
        blocks = [dataset.num_sequences / share for dataset, share in zip(self.datasets, self.shares, strict=True)]
        return int(min(blocks) * BLOCK)

    def source(self, number: int) -> tuple[int, int]:
        """Which dataset the `number`-th sample is from, and the number it has there."""
        block, within = divmod(number, BLOCK)
        order = _block(self.seed, block, self.shares)
        chosen = int(order[within])
        return chosen, block * self.shares[chosen] + int((order[:within] == chosen).sum())

    def batch(self, numbers: list[int]) -> Batch:
        """The samples of these numbers."""
        places = map(self.source, numbers)
        return stack([self.datasets[source].row(number) for source, number in places])


def _shares(weights: list[float], total: int) -> tuple[int, ...]:
    """Whole numbers in proportion to `weights` that add up to `total`, by largest remainder."""
    exact = np.array(weights) / sum(weights) * total
    shares = np.floor(exact).astype(int)
    for place in np.argsort(shares - exact, kind="stable")[: total - shares.sum()]:
        shares[place] += 1
    return tuple(int(share) for share in shares)


@lru_cache(maxsize=2)
def _block(seed: int, block: int, shares: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng([seed, block]).permutation(np.repeat(np.arange(len(shares)), shares))


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


Samples = TokenDataset | Mixture


def open_data(data: Data, seed: int, *, checksums: bool = False) -> Samples:
    """The samples that a config asks for."""
    sources = data.sources or [Source(path=data.path)]
    datasets = [
        TokenDataset(source.path, data.sequence_length, seed, packing=data.packing, checksums=checksums)
        for source in sources
    ]
    return datasets[0] if len(datasets) == 1 else Mixture(datasets, [source.weight for source in sources], seed)


def micro_batches(dataset: Samples, step: int, sequences: int, micro: int, rank: int, world: int) -> list[Batch]:
    """A rank's share of a step, in micro batches; the union over ranks does not depend on how many there are."""
    first = step * sequences
    numbers = range(first + rank * (sequences // world), first + (rank + 1) * (sequences // world))
    return [dataset.batch(list(numbers[start : start + micro])) for start in range(0, len(numbers), micro)]
