"""Open sets that are folders: a module's file name is its name in the config, and adding one is adding a file."""

import pkgutil
from functools import cache
from importlib import import_module
from types import ModuleType

from .errors import InputError

FOLDERS = ("mixers", "channel_mixers", "neurons", "codes", "families")


@cache
def names(folder: str) -> tuple[str, ...]:
    """The members of a folder, sorted."""
    package = import_module(f"spikingbrain.{folder}")
    return tuple(sorted(module.name for module in pkgutil.iter_modules(package.__path__)))


def load(folder: str, name: str) -> ModuleType:
    """The module `name` of a folder; raises `InputError` naming the choices."""
    if name not in names(folder):
        raise InputError(f"unknown name {name!r} in {folder}; choose from {', '.join(names(folder))}")
    return import_module(f"spikingbrain.{folder}.{name}")
