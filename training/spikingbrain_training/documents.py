"""Documents of text, JSON lines, Parquet and Hugging Face `datasets` directories, in units that processes can share."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from spikingbrain.errors import InputError
from spikingbrain.evaluation import text_files

TEXT_FILES_AT_ONCE = 64
BYTES_AT_ONCE = 2**26
Document = str | list[dict[str, str]]


class Unit(NamedTuple):
    """A piece of work: `files` of a `kind`, or a part of one file; `start` and `stop` are bytes or row groups."""

    kind: str
    files: tuple[str, ...]
    start: int = 0
    stop: int = 0


def data_files(paths: list[str | Path], pattern: str) -> list[Path]:
    """Files, and those of directories; of a `datasets` directory (`save_to_disk`) the Arrow files alone."""
    found: list[Path] = []
    for path in map(Path, paths):
        saved = path.is_dir() and any(path.rglob("dataset_info.json"))
        found += text_files([path], "*.arrow" if saved else pattern)
    return found


def units(files: list[Path]) -> list[Unit]:
    """Cut files into units, in order; neighbouring text files, one document each, share one."""
    found: list[Unit] = []
    texts: list[str] = []
    for file in [*files, None]:
        kind = None if file is None else KINDS.get(file.suffix, "text")
        if kind == "text":
            texts.append(str(file))
        if texts and (kind != "text" or len(texts) == TEXT_FILES_AT_ONCE):
            found.append(Unit("text", tuple(texts)))
            texts = []
        if file is not None and kind != "text":
            found += [Unit(kind, (str(file),), start, stop) for start, stop in _ranges(kind, file)]
    return found


def _ranges(kind: str, file: Path) -> list[tuple[int, int]]:
    if kind == "arrow":
        return [(0, 0)]
    if kind == "parquet":
        groups = _parquet(file).num_row_groups
        return [(group, group + 1) for group in range(groups)]
    size = file.stat().st_size
    return [(start, min(size, start + BYTES_AT_ONCE)) for start in range(0, size, BYTES_AT_ONCE)]


def read(unit: Unit, field: str | None) -> Iterator[Document]:
    """Its documents: text, or the messages of a conversation; `field` None takes `messages` where there are, or `text`.

    Raises `InputError` naming the file where a record is damaged or lacks the field.
    """
    if unit.kind == "text":
        yield from (Path(file).read_text(errors="replace") for file in unit.files)
        return
    (file,) = unit.files
    for record in READERS[unit.kind](unit):
        wanted = field or ("messages" if "messages" in record else "text")
        if not isinstance(record.get(wanted), str | list):
            raise InputError(f"{file}: a record has no {wanted!r}; it has {', '.join(map(str, record))}")
        yield record[wanted]


def _json_lines(unit: Unit) -> Iterator[dict[str, Any]]:
    """Records of the lines that begin in the unit's bytes."""
    with Path(unit.files[0]).open("rb") as file:
        if unit.start:
            file.seek(unit.start - 1)
            file.readline()
        while file.tell() < unit.stop and (line := file.readline()):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"{unit.files[0]}: a line before byte {file.tell()} is not JSON: {error}") from None
            if not isinstance(record, dict):
                raise InputError(f"{unit.files[0]}: a line before byte {file.tell()} is no object")
            yield record


def _parquet(file: Path) -> Any:
    pyarrow = _pyarrow()
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{file} is no Parquet file: {error}") from None


def _parquet_rows(unit: Unit) -> Iterator[dict[str, Any]]:
    yield from _parquet(Path(unit.files[0])).read_row_group(unit.start).to_pylist()


def _arrow_rows(unit: Unit) -> Iterator[dict[str, Any]]:
    pyarrow = _pyarrow()
    with pyarrow.memory_map(unit.files[0]) as source:
        try:
            for batch in pyarrow.ipc.open_stream(source):
                yield from batch.to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise InputError(f"{unit.files[0]} is no file of a datasets directory: {error}") from None


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise InputError("Parquet and datasets directories need pyarrow: pip install 'spikingbrain[data]'") from None
    return pyarrow


KINDS = {".jsonl": "json_lines", ".ndjson": "json_lines", ".parquet": "parquet", ".arrow": "arrow"}
READERS = {"json_lines": _json_lines, "parquet": _parquet_rows, "arrow": _arrow_rows}
