"""A state on disk: safetensors that say of which model and of which tokens, and are refused if anything differs."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spikingbrain.errors import InputError
from spikingbrain.files import replaced_file
from spikingbrain.packing import PackedLinear
from spikingbrain.state import StateSpec
from spikingbrain_kernels.packed import ORDER

from .snapshot import Snapshot

FORMAT = "spikingbrain-state-1"
TOKENS, HIDDEN = "tokens", "hidden"
# What a config says about where it came from, not about what is computed.
NOT_THE_MODEL = {"_name_or_path", "architectures", "transformers_version", "use_cache"}


class ModelIdentity:
    """Tells whether a state is this model's: a hash of config and weights, computed when first needed.

    Weights packed otherwise are another model: a state goes on bit for bit or not at all.
    """

    def __init__(self, model: Any):
        self._model = model
        self.specs: list[list[StateSpec]] = model.state_specs()
        self.device = model.device

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the config and, of every weight, name, type, shape, XOR of all values and the first ones."""
        digest = hashlib.sha256()
        config = {key: value for key, value in self._model.config.to_dict().items() if key not in NOT_THE_MODEL}
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        with torch.inference_mode():
            for name, weight in sorted(_weights(self._model).items()):
                values = torch.hash_tensor(weight).item() if weight.numel() else 0
                first = weight.flatten()[:64].double().tolist()
                digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} {values} {first}".encode())
        return digest.hexdigest()


def _weights(model: Any) -> dict[str, Tensor]:
    """Every tensor that the model computes with, packed ones too."""
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            packed = {"weight": module.packed.weight, "scale": module.packed.scale}
            weights |= {f"{name}.{part}.{ORDER}": tensor for part, tensor in packed.items() if tensor is not None}
    return weights


@dataclass(frozen=True)
class StoredState:
    """What a state file holds. `tokens` may be more than `snapshot` has seen; `notes` are the writer's own (JSON)."""

    tokens: list[int]
    snapshot: Snapshot
    notes: dict[str, Any] = field(default_factory=dict)


def write_state(path: Path, state: StoredState, identity: ModelIdentity) -> None:
    """Replace `path` by the state in one step; on any failure the old file is whole."""
    tensors = {
        f"{layer}.{name}": tensor.cpu()
        for layer, tensors in enumerate(state.snapshot.states)
        for name, tensor in tensors.items()
    }
    tensors[TOKENS] = torch.tensor(state.tokens, dtype=torch.int32)
    tensors[HIDDEN] = state.snapshot.hidden.cpu()
    metadata = {
        "format": FORMAT,
        "model_hash": identity.hash,
        "token_hash": token_hash(state.tokens),
        "num_tokens": str(state.snapshot.num_tokens),
        "notes": json.dumps(state.notes),
    }
    metadata["checksum"] = _checksum(tensors, metadata)
    with replaced_file(path) as aside:
        _save(tensors, aside, metadata)


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """`save_file`, of which a full disk is an OSError with its number, as of any other file."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), path.name) from error


def read_state(path: Path, identity: ModelIdentity) -> StoredState:
    """Read a file of `write_state`; raises `InputError` if it is damaged or of another model."""
    metadata = read_metadata(path)
    if metadata.get("model_hash") != identity.hash:
        raise InputError(f"{path.name} is the state of another model")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path.name} is damaged: {error}") from None
    if _checksum(tensors, metadata) != metadata.get("checksum"):
        raise InputError(f"{path.name} is damaged: its checksum does not fit")
    states = _states(path, tensors, identity)
    snapshot = Snapshot(states, tensors[HIDDEN].to(identity.device), int(metadata["num_tokens"]))
    return StoredState(tensors[TOKENS].tolist(), snapshot, json.loads(metadata["notes"]))


def read_metadata(path: Path) -> dict[str, str]:
    """What a state file says of itself, unchecked; raises `InputError` if it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise InputError(f"{path.name} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path.name} is damaged: {error}") from None
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path.name} is no state file of this version ({FORMAT})")
    return metadata


def token_hash(tokens: Iterable[int]) -> str:
    """SHA-256 of the tokens as 32-bit integers."""
    return hashlib.sha256(torch.tensor(list(tokens), dtype=torch.int32).numpy().tobytes()).hexdigest()


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256()
    said = {key: value for key, value in metadata.items() if key != "checksum"}
    digest.update(json.dumps(said, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _states(path: Path, tensors: dict[str, Tensor], identity: ModelIdentity) -> list[dict[str, Tensor]]:
    """The tensors by layer and name, as the model's own specs have them."""
    states = []
    for layer, specs in enumerate(identity.specs):
        names = [f"{layer}.{spec.name}" for spec in specs]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise InputError(f"{path.name} lacks {', '.join(missing)}")
        states.append({spec.name: tensors[name].to(identity.device) for spec, name in zip(specs, names, strict=True)})
    return states
