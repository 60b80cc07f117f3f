"""Reading model directories: every way they can be wrong becomes one `InputError` that names the file."""

import contextlib
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from .errors import InputError
from .files import read_json, write_json

# What tokenizers and generate() keep in a directory beside the weights.
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
TEMPLATES = "additional_chat_templates"
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
CHAT_END = "<|im_end|>"
MAX_SHARD_BYTES = 2 * 1024**3
MIN_SHARD_BYTES = 32 * 1024**2


def load_config(path: str | Path) -> PreTrainedConfig:
    """The config of a model directory."""
    keys = read_json(_directory(path) / "config.json")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except InputError:
        raise
    except (StrictDataclassError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}/config.json ({keys.get('model_type')}): {_one_line(error)}") from None


def load_model(path: str | Path, dtype: torch.dtype | str = "auto") -> Any:
    """The causal language model of a directory, in evaluation mode; all its tensors checked."""
    load_config(path)
    Shards(path)
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).eval()
    except (SafetensorError, OSError, RuntimeError) as error:
        raise InputError(f"{path} cannot be loaded: {_one_line(error)}") from None


def copy_tokenizer(path: str | Path, directory: Path) -> None:
    """Let the tokenizer, the chat templates and the generation settings of a model directory travel with it."""
    for name in TOKENIZER_FILES:
        if (Path(path) / name).exists():
            shutil.copyfile(Path(path) / name, directory / name)
    if (Path(path) / TEMPLATES).is_dir():
        shutil.copytree(Path(path) / TEMPLATES, directory / TEMPLATES)
    # Only a tokenizer with this token is loaded: others travel as they are.
    named = (directory / name for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"))
    if any(file.exists() and CHAT_END in file.read_text() for file in named):
        _end_chat_turns(directory)


def _end_chat_turns(directory: Path) -> None:
    """Let generate() stop where a chat turn ends, which the released configs do not say."""
    tokenizer = load_tokenizer(directory)
    end = tokenizer.get_vocab().get(CHAT_END)
    if tokenizer.chat_template is None or end is None:
        return
    file = directory / "generation_config.json"
    keys = read_json(file) if file.exists() else {"_from_model_config": True}
    listed = keys.get("eos_token_id", read_json(directory / "config.json").get("eos_token_id"))
    ends = [] if listed is None else [listed] if isinstance(listed, int) else listed
    if end not in ends:
        keys.pop("_from_model_config", None)
        write_json(file, {**keys, "eos_token_id": [*ends, end]})


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model directory."""
    # Brings in sentencepiece where it is installed.
    from transformers import AutoTokenizer

    directory = _directory(path)
    if not any((directory / name).exists() for name in VOCABULARY_FILES):
        raise InputError(f"{path} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"the tokenizer of {path} cannot be loaded: {_one_line(error)}") from None


def _directory(path: str | Path) -> Path:
    if not Path(path).is_dir():
        raise InputError(f"{path} is not a model directory")
    return Path(path)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class TensorSource(Protocol):
    """Tensors by name, one at a time: iterating gives the names, `get` the tensor of the name given last."""

    def __iter__(self) -> Iterator[str]: ...

    def get(self, name: str) -> Tensor: ...


class Shards:
    """The safetensors files of a directory (or PyTorch's `.bin` files where there are none), one tensor at a time.

    Raises `InputError` naming a file that is missing, truncated, or does not hold what the index says.
    """

    def __init__(self, path: str | Path):
        self.path = _directory(path)
        self._files = self._find()
        self.names: dict[str, Path] = {}
        for file in self._files:
            with self._open(file) as shard:
                self.names.update(dict.fromkeys(shard.keys(), file))

    def _find(self) -> list[Path]:
        wanted = "model.safetensors"
        if not any((self.path / f"{wanted}{end}").exists() for end in ("", ".index.json")) and any(
            self.path.glob("pytorch_model*.bin")
        ):
            wanted = "pytorch_model.bin"
        index = self.path / f"{wanted}.index.json"
        names = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else [wanted]
        files = [self.path / name for name in names]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise InputError(f"{self.path} lacks {', '.join(missing)}")
        return files

    def _open(self, file: Path) -> Any:
        if file.suffix == ".bin":
            return contextlib.nullcontext(PickledTensors(file))
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is damaged or truncated: {_one_line(error)}") from None

    @property
    def largest_bytes(self) -> int:
        """The size of the largest file."""
        return max(file.stat().st_size for file in self._files)

    def get(self, name: str) -> Tensor:
        """One tensor."""
        with self._open(self.names[name]) as shard:
            return shard.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)


class PickledTensors:
    """A `.pth` file that holds a plain dict of tensors, read without running anything a pickle may ask for.

    Raises `InputError` for a file that is missing, damaged, or holds anything else.
    """

    def __init__(self, path: str | Path):
        if not Path(path).is_file():
            raise InputError(f"{path} does not exist")
        try:
            # Only the zip format can be mapped; the old one has to be read whole.
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            raise InputError(f"{path} is damaged, or holds more than tensors: {_one_line(error)}") from None
        if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise InputError(f"{path} does not hold a plain dict of tensors")
        self._tensors = tensors

    def get(self, name: str) -> Tensor:
        """One tensor."""
        return self._tensors[name]

    get_tensor = get

    def keys(self) -> Iterator[str]:
        """The names."""
        return iter(self._tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)


def shard_bytes(largest: int) -> int:
    """How much a writer may hold so that with one tensor more it stays under 1.5 x `largest`, the source's file."""
    return max(MIN_SHARD_BYTES, min(MAX_SHARD_BYTES, largest // 2))


class ShardWriter:
    """Writes tensors one by one into the safetensors files of a directory, holding at most `max_bytes` of them."""

    def __init__(self, directory: Path, max_bytes: int = MAX_SHARD_BYTES):
        self.directory = directory
        self.max_bytes = max_bytes
        self._pending: dict[str, Tensor] = {}
        self._files: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor."""
        held = sum(pending.nbytes for pending in self._pending.values())
        if self._pending and held + tensor.nbytes > self.max_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()

    def _flush(self) -> None:
        file = self.directory / f"part-{len(self._files):05d}"
        save_file(self._pending, file, metadata={"format": "pt"})
        self._files.append((file, list(self._pending)))
        self._pending = {}

    def close(self) -> None:
        """Write the rest, and the index if there are several files."""
        self._flush()
        if len(self._files) == 1:
            self._files[0][0].rename(self.directory / "model.safetensors")
            return
        weight_map = {}
        for number, (file, names) in enumerate(self._files, 1):
            final = f"model-{number:05d}-of-{len(self._files):05d}.safetensors"
            file.rename(self.directory / final)
            weight_map.update(dict.fromkeys(names, final))
        write_json(self.directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
