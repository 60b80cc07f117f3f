"""What others released, under its own `model_type`, config keys and tensor names: one file each.

A family file's name is its `model_type`, and it defines
- `Config` (a `FamilyConfig`) and `ForCausalLM`, registered with transformers' Auto classes;
- `NAMES`: pairs (part of its tensor name, of ours), applied when a checkpoint is loaded and reversed when it is saved;
  no pair may match what another one makes;
- `recognises(path) -> bool`: whether a directory or file is what its authors released; never raises;
- `read(path) -> Released`: its config and its tensors, under their own names;
- `write(model, directory)`: `model` (a `ForCausalLM`) as the files that its authors release.
"""

from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers.core_model_loading import WeightRenaming

from .. import registry
from ..checkpoint import Shards, TensorSource, load_config
from ..config import SpikingBrainConfig
from ..errors import InputError
from ..files import read_json


class FamilyConfig(SpikingBrainConfig):
    """A config that is read from and written with a family's own keys and used with ours."""

    @classmethod
    def from_family(cls, keys: dict[str, Any]) -> dict[str, Any]:
        """Our keys for the family's."""
        raise NotImplementedError

    def to_family(self, keys: dict[str, Any]) -> dict[str, Any]:
        """The family's keys for ours; raises `InputError` for a model the family cannot express."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From the keys in the family's config.json, or from our own."""
        ours = config_dict if "mixers" in config_dict else cls.from_family(dict(config_dict))
        return super().from_dict(ours, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to config.json: the family's keys."""
        return self.to_family(super().to_diff_dict())


class Released(NamedTuple):
    """A released checkpoint, opened: `tensors` iterates over the family's own names and gets one tensor at a time."""

    config: Any
    tensors: TensorSource


class Family(Protocol):
    """What every module of this folder provides; see above."""

    Config: type[FamilyConfig]
    ForCausalLM: type[Any]
    NAMES: list[tuple[str, str]]

    def recognises(self, path: Path) -> bool:
        """Whether `path` is a release of this family."""

    def read(self, path: Path) -> Released:
        """Open a release; raises `InputError` naming what is wrong with it."""

    def write(self, model: Any, directory: Path) -> None:
        """Write `model` into an existing directory as its authors would."""


def recognise(path: str | Path) -> ModuleType:
    """The family that a released directory or file belongs to; raises `InputError` naming the families."""
    for name in registry.names("families"):
        family = registry.load("families", name)
        if family.recognises(Path(path)):
            return family
    raise InputError(f"{path} is of no known family; choose from {', '.join(registry.names('families'))}")


def has_model_type(path: Path, model_type: str) -> bool:
    """Whether `path` is a directory whose config.json names `model_type`."""
    if not (path / "config.json").is_file():
        return False
    try:
        return read_json(path / "config.json").get("model_type") == model_type
    except (InputError, AttributeError):
        return False


def read_directory(path: Path) -> Released:
    """Open a directory with config.json and safetensors."""
    return Released(load_config(path), Shards(path))


def renamings(names: list[tuple[str, str]]) -> list[Any]:
    """A family's `NAMES` as transformers applies them: in order, each at most once a name."""
    return [WeightRenaming(theirs, ours) for theirs, ours in names]


def our_name(names: list[tuple[str, str]], name: str) -> str:
    """Our name for a tensor of the family with these `NAMES`."""
    for renaming in renamings(names):
        name, _ = renaming.rename_source_key(name)
    return name


def their_name(names: list[tuple[str, str]], name: str) -> str:
    """The name in the family with these `NAMES` for a tensor of ours."""
    for renaming in reversed(renamings(names)):
        name, _ = renaming.reverse_transform().rename_source_key(name)
    return name


def expected_tensors(family: Any, config: FamilyConfig) -> dict[str, torch.Size]:
    """Names (the family's) and shapes of all tensors on disk of a model with this config."""
    with torch.device("meta"):
        model = family.ForCausalLM(config)
    tensors: dict[str, Tensor] = model.state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return {their_name(family.NAMES, name): tensor.shape for name, tensor in tensors.items()}
