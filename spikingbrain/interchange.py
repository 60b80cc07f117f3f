"""Between what others released and directories that AutoModel loads, both ways."""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from . import registry
from .checkpoint import ShardWriter, copy_tokenizer, load_config, load_model
from .config import SpikingBrainConfig
from .errors import InputError
from .families import recognise, their_name
from .files import new_directory, read_json, write_json

STUB = "modeling_spikingbrain.py"
# Classes of its own, so that transformers copies this file, not the package's, when the model is saved again.
STUB_TEXT = '''"""Lets AutoModel find the installed spikingbrain package (pip install spikingbrain) by itself."""

import {config_module}
import {model_module}


class {config}({config_module}.{config}):
    pass


class {model}({model_module}.{model}):
    config_class = {config}
'''


def import_release(src: str | Path, out: str | Path, *, down_proj: str | None = None) -> str:
    """Write what authors released, a directory or a bare .pth, as a directory for AutoModel; returns the family's name.

    `down_proj` ("code" or "paper"): for W8ASpike only, see `families.w8aspike`. Raises `InputError` for a path of no
    known family and for any tensor that is missing, left over or of another shape; `out` is complete or absent.
    """
    family = recognise(src)
    name = family.__name__.rpartition(".")[2]
    options = {} if down_proj is None else {"down_proj": down_proj}
    if options and name != "w8aspike":
        raise InputError(f"down_proj is a choice for w8aspike; {src} is {name}")
    config, tensors = family.read(Path(src), **options)
    with new_directory(out) as directory:
        writer = ShardWriter(directory)
        for tensor in tensors:
            writer.add(tensor, tensors.get(tensor))
        writer.close()
        config.architectures = [family.ForCausalLM.__name__]
        config.save_pretrained(directory)
        copy_tokenizer(src, directory)
        _require_fit(directory, src, family)
    return name


def _require_fit(directory: Path, src: str | Path, family: Any) -> None:
    """Load the directory without its numbers: the loader says what does not fit, here by the names in `src`."""
    try:
        load_config(directory)
        AutoModelForCausalLM.from_pretrained(directory, device_map={"": "meta"}, local_files_only=True)
    except InputError as error:
        said = str(error).replace(str(directory), str(src))
        raise InputError(re.sub(r"[\w.]+", lambda name: their_name(family.NAMES, name[0]), said)) from None


def export(path: str | Path, out: str | Path, family: str | None = None) -> None:
    """Write a model of ours for others.

    With a family: the files its authors release, names and config theirs. Without: the model as it is, with a few lines
    of code by which `AutoModel...from_pretrained(out, trust_remote_code=True)` finds the installed package. Raises
    `InputError` if the family cannot express the model.
    """
    model = load_model(path)
    if not isinstance(model.config, SpikingBrainConfig):
        raise InputError(f"{path} is a {model.config.model_type} model; convert it first")
    with new_directory(out) as directory:
        if family is None:
            model.save_pretrained(directory)
            _add_stub(model, directory)
        else:
            module = registry.load("families", family)
            module.write(_as_family(model, module), directory)
        copy_tokenizer(path, directory)


def _add_stub(model: Any, directory: Path) -> None:
    """The code that AutoModel asks for, and its name in the config."""
    config = type(model.config)
    text = STUB_TEXT.format(
        config=config.__name__,
        config_module=config.__module__,
        model=type(model).__name__,
        model_module=type(model).__module__,
    )
    (directory / STUB).write_text(text)
    module, keys = Path(STUB).stem, read_json(directory / "config.json")
    classes = {"AutoConfig": config.__name__, "AutoModelForCausalLM": type(model).__name__}
    keys["auto_map"] = {auto: f"{module}.{name}" for auto, name in classes.items()}
    write_json(directory / "config.json", keys)


def _as_family(model: Any, family: Any) -> Any:
    """The same model as the family's class; its `write` says whether the family can express it."""
    if isinstance(model, family.ForCausalLM):
        return model
    keys = {**model.config.to_dict(), "model_type": family.Config.model_type}
    with torch.device("meta"):
        other = family.ForCausalLM(family.Config.from_dict(keys))
    wanted, given = (set(m.state_dict()) for m in (other, model))
    if wanted != given:
        differing = ", ".join(sorted(wanted ^ given)[:8])
        raise InputError(f"{family.Config.model_type} cannot express this model: {differing}")
    other.load_state_dict(model.state_dict(), assign=True)
    other.tie_weights()
    return other
