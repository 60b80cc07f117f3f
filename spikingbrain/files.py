"""Files and directories that are complete or absent: write aside, flush to disk, rename."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError


def sync(path: Path) -> None:
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_absent(path: Path) -> None:
    """Refuse a file or a directory with something in it; raises `InputError`."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        raise InputError(f"{path} already exists and is not an empty directory; choose another output or remove it")


@contextlib.contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """Give a directory to write into that becomes `path` when the block ends without an error.

    On any error, Ctrl-C and a full disk included, what was written is removed and `path` is as it was.
    """
    path = Path(path)
    require_absent(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        yield partial
        for child in sorted(partial.rglob("*")):
            sync(child)
        partial.chmod(0o755)
        if path.is_dir():
            path.rmdir()
        partial.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """Give a file to write that replaces `path` when the block ends without an error; else `path` is as it was."""
    path = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
    os.close(descriptor)
    aside = Path(name)
    try:
        yield aside
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Replace `path` by `value` as JSON in one step."""
    with replaced_file(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n")
        aside.chmod(0o644)


def read_json(path: str | Path) -> Any:
    """Read a JSON file; raises `InputError` naming the file if it is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
