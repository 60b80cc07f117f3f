"""Checkpoints into vLLM's layers: a tensor has one target; those left over, missing or misshapen are all named."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikingbrain import registry
from spikingbrain.errors import InputError
from spikingbrain.families import our_name
from spikingbrain.quantization import METHOD

from .projections import Piece


class Target(NamedTuple):
    """The shape of a whole tensor on disk (None: any), and what puts this rank's part of it in its place."""

    shape: torch.Size | None
    load: Callable[[Tensor], None]
    required: bool = True


def load(
    config: Any, targets: dict[str, Target], is_elsewhere: Callable[[str], bool], weights: Iterable[tuple[str, Tensor]]
) -> None:
    """Load a checkpoint's tensors but another stage's; raises `InputError` naming all that do not fit."""
    names = (
        registry.load("families", config.model_type).NAMES if config.model_type in registry.names("families") else []
    )
    loaded: set[str] = set()
    problems: dict[str, list[str]] = {"unexpected": [], "missing": [], "mismatched": []}
    for theirs, tensor in weights:
        name = our_name(names, theirs)
        if name not in targets and is_elsewhere(name):
            continue
        if name not in targets:
            problems["unexpected"].append(theirs)
        elif targets[name].shape not in (None, tensor.shape):
            problems["mismatched"].append(f"{theirs} {list(tensor.shape)} for {list(targets[name].shape)}")
        else:
            targets[name].load(tensor)
        loaded.add(name)
    problems["missing"] = [name for name, target in targets.items() if target.required and name not in loaded]
    found = [f"{kind}: {', '.join(sorted(names))}" for kind, names in problems.items() if names]
    if found:
        raise InputError("the checkpoint does not fit its config; " + "; ".join(found))


def whole(parameter: Tensor) -> Target:
    """A tensor that every rank has."""
    return Target(parameter.shape, lambda tensor: _copy(parameter, tensor))


def sharded(parameter: Tensor, shape: torch.Size, dim: int, rank: int) -> Target:
    """A tensor of `shape` cut along `dim`."""
    size = parameter.shape[dim]
    return Target(shape, lambda tensor: _copy(parameter, tensor.narrow(dim, rank * size, size)))


def _copy(parameter: Tensor, tensor: Tensor) -> None:
    parameter.data.copy_(tensor)


def unused(shape: torch.Size) -> Target:
    """A tensor that may be on disk and is not needed."""
    return Target(shape, lambda _tensor: None, required=False)


def by_vllm(parameter: Any, shape: torch.Size, index: int | None = None) -> Target:
    """A tensor of one of vLLM's layers, which cuts it itself."""
    extra = () if index is None else (index,)
    return Target(shape, lambda tensor: parameter.weight_loader(parameter, tensor, *extra))


def projection_targets(
    name: str, piece: Piece, linear: nn.Linear, group_size: int | None
) -> Iterator[tuple[str, Target]]:
    """What is on disk of a projection; `linear`: our own, for its shapes. `group_size`: of int8 weights."""
    shape = torch.Size([linear.out_features, linear.in_features])
    yield f"{name}.weight", by_vllm(piece.linear.weight, shape, piece.shard)
    if linear.bias is not None:
        yield f"{name}.bias", by_vllm(piece.linear.bias, shape[:1], piece.shard)
    if group_size is None:
        return
    groups = torch.Size([shape[0], shape[1] // group_size])
    if hasattr(piece.linear, "weight_scale"):
        yield f"{name}.weight_scale", by_vllm(piece.linear.weight_scale, groups, piece.shard)
        outliers = Outliers(piece, shape[1])
        yield f"{name}.weight_outlier_index", Target(None, outliers.take_index, required=False)
        yield f"{name}.weight_outlier_code", Target(None, outliers.take_code, required=False)
    else:
        # Scales that a checkpoint has beside a projection which its authors compute without them.
        yield f"{name}.weight_scale", unused(groups)


class Outliers:
    """Codes beyond int8 of one projection: index and code come one by one, in either order."""

    def __init__(self, piece: Piece, in_features: int):
        self._piece, self._in_features = piece, in_features
        self._parts: dict[str, Tensor] = {}

    def take_index(self, index: Tensor) -> None:
        """Flat places in the whole weight `[N]`."""
        self._take("index", index)

    def take_code(self, code: Tensor) -> None:
        """What is there `[N]`."""
        self._take("code", code)

    def _take(self, part: str, tensor: Tensor) -> None:
        self._parts[part] = tensor
        if len(self._parts) < 2:
            return
        piece, (first_row, rows), (first_column, columns) = self._piece, self._piece.rows, self._piece.columns
        index = self._parts["index"].long()
        row, column = index // self._in_features - first_row, index % self._in_features - first_column
        here = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        place = (row + piece.offset)[here] * columns + column[here]
        piece.linear.outliers.append((place, self._parts["code"][here]))


def group_size(config: Any) -> int | None:
    """Inputs that share a scale, or None where weights are not int8."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None or quantization["quant_method"] != METHOD:
        return None
    return quantization["group_size"]
