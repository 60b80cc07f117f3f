"""Asking the served model as its users would: a process, the `openai` client, a clean end."""

import contextlib
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoint import load_model, load_tokenizer
from ..errors import InputError
from ..packing import prepare, why_not
from .stages import script

PROMPTS = ("import os\n\n\ndef ", "class Queue:\n    def __init__(self", "    return self.", "# This module provides")
NEW_TOKENS = 32
LENGTHS = (100, 1000, 10_000)
NAME = "spiking"
START_SECONDS = 120


@contextlib.contextmanager
def served(model: Path, log: Path, max_model_len: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run `spikingbrain serve` on a free port of this machine; gives its address and, after the end, its exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", port, "--served-model-name", NAME, "--max-model-len", max_model_len, "--max-num-seqs", 4]
    outcome: dict[str, Any] = {}
    with log.open("w") as output:
        command = [script(), "serve", str(model), *map(str, options)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(process, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}/v1", outcome
            process.send_signal(signal.SIGTERM)
            outcome["exit_code"] = process.wait(30)
        finally:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise InputError(f"the server stopped: {log.read_text().strip().splitlines()[-1:]}; see {log}")
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=1):
            return
        time.sleep(0.2)
    raise InputError(f"the server was not ready after {START_SECONDS} s; see {log}")


def ask(model: Path, log: Path, max_model_len: int) -> dict[str, Any]:
    """Completions, chat, streaming, state sizes; greedy tokens compared with `generate()`."""
    from openai import OpenAI

    with served(model, log, max_model_len) as (address, outcome):
        client = OpenAI(base_url=address, api_key="none")
        texts, tokens = _complete(client)
        figures = {
            "completion": texts[0],
            "chat": _chat(client),
            "streamed": _stream(client),
            "state_bytes": {length: _state_bytes(client, length) for length in LENGTHS},
        }
    return {
        **figures,
        "exit_code": outcome["exit_code"],
        "streamed_equals_whole": figures["streamed"] == texts[0],
        "tokens_equal_generate": tokens == _generate(model),
        "num_tokens_compared": sum(map(len, tokens)),
    }


def _complete(client: Any) -> tuple[list[str], list[list[int]]]:
    texts, tokens = [], []
    for prompt in PROMPTS:
        options = {"temperature": 0, "max_tokens": NEW_TOKENS, "extra_body": {"return_token_ids": True}}
        choice = client.completions.create(model=NAME, prompt=prompt, **options).choices[0]
        texts.append(choice.text)
        tokens.append(choice.token_ids)
    return texts, tokens


def _generate(model: Path) -> list[list[int]]:
    network, tokenizer = load_model(model), load_tokenizer(model)
    if why_not(network) is None:
        # As the server does: then tokens are equal to the last one, ties of rounding too.
        network = prepare(network)
    tokens = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = network.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        tokens.append(ids[0, inputs.input_ids.shape[1] :].tolist())
    return tokens


def _chat(client: Any) -> str:
    messages = [{"role": "user", "content": "Write a Python function."}]
    reply = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=NEW_TOKENS)
    return reply.choices[0].message.content


def _stream(client: Any) -> str:
    options = {"temperature": 0, "max_tokens": NEW_TOKENS, "stream": True}
    chunks = client.completions.create(model=NAME, prompt=PROMPTS[0], **options)
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)


def _state_bytes(client: Any, length: int) -> int:
    prompt = [3 + i % 200 for i in range(length)]
    reply = client.completions.create(model=NAME, prompt=prompt, temperature=0, max_tokens=1)
    return reply.usage.state_bytes
