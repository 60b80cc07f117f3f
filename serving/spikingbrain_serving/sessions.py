"""Sessions on disk: a directory of state files by name; what was saved outlives the process."""

import contextlib
import errno
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain.errors import InputError

from .errors import InvalidRequest
from .state_file import ModelIdentity, StoredState, read_metadata, read_state, write_state

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
SUFFIX = ".safetensors"
NOT_FOUND, FULL, CONFLICT = "session_not_found", "insufficient_storage", "session_conflict"
OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
ABANDONED_SECONDS = 3600
# Sessions with this beginning were not named by anybody: the oldest make room for new ones.
RESPONSE_PREFIX = "resp_"


@dataclass(frozen=True)
class SessionInfo:
    """A saved session: when (seconds since 1970), how many tokens, bytes on disk, of which it is a fork."""

    id: str
    created: int
    num_tokens: int
    bytes: int
    parent: str | None


class SessionStore:
    """Saves, lists, forks and deletes sessions of one model, at most `max_bytes` of them. From any thread."""

    def __init__(self, directory: Path, identity: ModelIdentity, max_bytes: int):
        self._directory = directory
        self._identity = identity
        self._max_bytes = max_bytes
        directory.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned()

    def _remove_abandoned(self) -> None:
        """Remove what a process that was killed left half written; a new one may still be written by another."""
        for file in self._directory.glob(f".*{SUFFIX}.partial-*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > ABANDONED_SECONDS:
                    file.unlink()

    def _path(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise InvalidRequest("a session's id is 1 to 100 letters, digits, dots, dashes or underscores", param="id")
        return self._directory / (name + SUFFIX)

    def save(self, name: str, state: StoredState, parent: str | None = None) -> SessionInfo:
        """Write a session, replacing one of that name; raises `InvalidRequest` if there is no room."""
        path = self._path(name)
        notes = {**state.notes, "created": int(time.time()), "parent": parent}
        self._make_room(state.snapshot.nbytes, keep=path)
        try:
            write_state(path, StoredState(state.tokens, state.snapshot, notes), self._identity)
        except OSError as error:
            if error.errno not in OUT_OF_SPACE:
                raise
            raise InvalidRequest("the disk is full: the session was not saved", code=FULL) from error
        return self.info(name)

    def _make_room(self, num_bytes: int, keep: Path) -> None:
        files = [file for file in self._files() if file != keep]
        used = sum(file.stat().st_size for file in files)
        unnamed = sorted((f for f in files if f.name.startswith(RESPONSE_PREFIX)), key=lambda f: f.stat().st_mtime)
        while used + num_bytes > self._max_bytes and unnamed:
            oldest = unnamed.pop(0)
            used -= oldest.stat().st_size
            oldest.unlink(missing_ok=True)
        if used + num_bytes > self._max_bytes:
            raise InvalidRequest(f"saved sessions would take more than {self._max_bytes} bytes", code=FULL)

    def load(self, name: str) -> StoredState:
        """Read a session; raises `InvalidRequest` if there is none, or it is damaged or of another model."""
        path = self._existing(name)
        try:
            return read_state(path, self._identity)
        except InputError as error:
            raise InvalidRequest(str(error), param="id", code=CONFLICT) from None

    def info(self, name: str) -> SessionInfo:
        """What a session's file says of itself; raises as `load`, but reads no tensor."""
        path = self._existing(name)
        try:
            metadata = read_metadata(path)
        except InputError as error:
            raise InvalidRequest(str(error), param="id", code=CONFLICT) from None
        notes: dict[str, Any] = _notes(metadata)
        num_tokens = int(metadata.get("num_tokens", 0))
        return SessionInfo(name, notes.get("created", 0), num_tokens, path.stat().st_size, notes.get("parent"))

    def all(self) -> list[SessionInfo]:
        """Every readable session, the newest first."""
        infos = []
        for path in self._files():
            try:
                infos.append(self.info(path.name.removesuffix(SUFFIX)))
            except InvalidRequest:
                # Damaged, or deleted in this moment: whoever asks for it by name is told.
                continue
        return sorted(infos, key=lambda info: info.created, reverse=True)

    def fork(self, name: str, new_name: str) -> SessionInfo:
        """A session of its own that begins where `name` is now."""
        return self.save(new_name, self.load(name), parent=name)

    def delete(self, name: str) -> None:
        """Remove a session; raises `InvalidRequest` if there is none."""
        self._existing(name).unlink(missing_ok=True)

    def _existing(self, name: str) -> Path:
        path = self._path(name)
        if not path.exists():
            raise InvalidRequest(f"there is no session {name!r}", param="id", code=NOT_FOUND)
        return path

    def _files(self) -> list[Path]:
        return [file for file in self._directory.glob(f"*{SUFFIX}") if not file.name.startswith(".")]


def _notes(metadata: dict[str, str]) -> dict[str, Any]:
    return json.loads(metadata.get("notes", "{}"))
