"""Token shards from documents: tokenised in parallel, resumed where an interrupted build stopped, checksums and all."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from spikingbrain.checkpoint import TOKENIZER_FILES, load_tokenizer
from spikingbrain.errors import InputError
from spikingbrain.files import new_directory, read_json, require_absent, write_json

from .data import DOCUMENTS, INDEX, TARGETS, TOKENS, file_sha256
from .documents import Document, Unit, read, units

PLAN = "plan.json"
DOCUMENTS_AT_ONCE = 64


class Part(NamedTuple):
    """Where a tokenised unit lies, and how its documents are read."""

    unit: Unit
    file: Path
    tokenizer: Path
    field: str | None
    dtype: str


def build(
    files: list[Path], tokenizer: str | Path, out: str | Path, *, workers: int = 1, field: str | None = None
) -> dict[str, Any]:
    """Tokenise the documents of `files`, each ended by the tokenizer's eos; returns the index that it writes to `out`.

    Conversations are rendered by the chat template, and only what the assistant says counts in the loss. What an
    interrupted build had done is kept beside `out` and used if the inputs are the same. Raises `InputError` if the
    tokenizer has no eos, or a document cannot be read.
    """
    loaded = load_tokenizer(tokenizer)
    if loaded.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-text token to mark where a document ends")
    out = Path(out)
    require_absent(out)
    dtype = "uint16" if len(loaded) <= 2**16 else "uint32"
    work = units(files)
    parts_folder = _parts_folder(out, _plan(files, Path(tokenizer), field))
    parts = [
        Part(unit, parts_folder / f"part-{number:06d}", Path(tokenizer), field, dtype)
        for number, unit in enumerate(work)
    ]
    _tokenise_all([part for part in parts if not part.file.with_suffix(".json").exists()], len(parts), workers)
    index = _join([part.file for part in parts], out, {"dtype": dtype, "vocabulary": len(loaded)})
    shutil.rmtree(parts_folder)
    return index


def _plan(files: list[Path], tokenizer: Path, field: str | None) -> dict[str, Any]:
    """What a build is made of; parts made of something else are of no use."""
    inputs = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    known = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).exists()]
    return {"inputs": inputs, "tokenizer": [file_sha256(file) for file in known], "field": field}


def _parts_folder(out: Path, plan: dict[str, Any]) -> Path:
    folder = out.parent / f".{out.name}.parts"
    if folder.exists() and (not (folder / PLAN).exists() or read_json(folder / PLAN) != plan):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PLAN, plan)
    return folder


def _tokenise_all(todo: list[Part], total: int, workers: int) -> None:
    with tqdm(total=total, initial=total - len(todo), desc="tokenise", unit="part") as progress:
        if workers == 1 or len(todo) <= 1:
            for part in todo:
                _tokenise(part)
                progress.update()
            return
        # Forked from a process that has imported this and holds no threads.
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            for _ in pool.map(_tokenise, todo):
                progress.update()


@cache
def _tokenizer(path: Path) -> Any:
    tokenizer = load_tokenizer(path)
    tokenizer.model_max_length = int(1e9)
    return tokenizer


def _tokenise(part: Part) -> None:
    """Write a part's tokens, targets and lengths, and last the report that says it is whole."""
    tokenizer = _tokenizer(part.tokenizer)
    lengths, chat = [], False
    with part.file.with_suffix(".tokens").open("wb") as tokens, part.file.with_suffix(".targets").open("wb") as targets:
        for ids, counted in _encode(read(part.unit, part.field), tokenizer):
            tokens.write(np.array([*ids, tokenizer.eos_token_id], part.dtype).tobytes())
            chat = chat or counted is not None
            targets.write(bytes([1] * (len(ids) + 1) if counted is None else [*counted, counted[-1] if counted else 0]))
            lengths.append(len(ids) + 1)
    part.file.with_suffix(".lengths").write_bytes(np.array(lengths, "int64").tobytes())
    write_json(part.file.with_suffix(".json"), {"documents": len(lengths), "tokens": sum(lengths), "chat": chat})


def _encode(documents: Iterator[Document], tokenizer: Any) -> Iterator[tuple[list[int], list[int] | None]]:
    """Token ids and, for a conversation, which of them count; texts are tokenised several at a time."""
    texts: list[str] = []
    for document in documents:
        if isinstance(document, str):
            texts.append(document)
        if texts and (len(texts) == DOCUMENTS_AT_ONCE or not isinstance(document, str)):
            yield from ((ids, None) for ids in tokenizer(texts, add_special_tokens=False).input_ids)
            texts = []
        if not isinstance(document, str):
            yield encode_chat(document, tokenizer)
    if texts:
        yield from ((ids, None) for ids in tokenizer(texts, add_special_tokens=False).input_ids)


def encode_chat(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[int]]:
    """A conversation's token ids, and 1 for each that the assistant says (its end mark too), else 0.

    Raises `InputError` where the tokenizer has no chat template or the template rewrites what came before.
    """
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template to render messages with")
    text = _render(tokenizer, messages)
    said: list[tuple[int, int]] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:number], add_generation_prompt=True)
        after = _render(tokenizer, messages[: number + 1])
        if not (text.startswith(after) and after.startswith(before)):
            raise InputError("the chat template changes earlier messages; loss on completions needs one that does not")
        said.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    counted = [int(any(start < end and a <= start < b for a, b in said)) for start, end in encoded.offset_mapping]
    return encoded.input_ids, counted


def _render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def _join(parts: list[Path], out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Put the parts, in order, into one shard."""
    reports = [read_json(part.with_suffix(".json")) for part in parts]
    names = {TOKENS: ".tokens"} | ({TARGETS: ".targets"} if any(report["chat"] for report in reports) else {})
    with new_directory(out) as directory:
        for name, suffix in names.items():
            with (directory / name).open("wb") as target:
                for part in parts:
                    with part.with_suffix(suffix).open("rb") as source:
                        shutil.copyfileobj(source, target)
        lengths = np.concatenate([np.fromfile(part.with_suffix(".lengths"), "int64") for part in parts])
        (directory / DOCUMENTS).write_bytes(np.cumsum([0, *lengths]).astype("int64").tobytes())
        index = {
            "num_tokens": int(lengths.sum()),
            "num_documents": len(lengths),
            **facts,
            "sha256": {name: file_sha256(directory / name) for name in (*names, DOCUMENTS)},
        }
        write_json(directory / INDEX, index)
    return index
