"""Load, cancellation, slow readers, fuzz, faults and long sessions against server processes; figures as JSON.

python -m tests.serving.soak [load] [cancel] [slow] [fuzz] [faults] [session] [--streams 64] [--requests 200]
    [--cancelled 200] [--fuzz-seconds 600] [--session-tokens 100000] [--session-model DIR] [--out FILE]

All parts, or those that are named; --out keeps what other parts have put into the file.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import random
import resource
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import openai
from safetensors.torch import load_file

from spikingbrain.files import read_json, write_json

from .conftest import make_tokenizer, save_model
from .fuzz import fuzz
from .test_serve_command import start, wait_until_ready

WARM_UP = 0.25
# What memory may gain after the warm-up, of all of it: the allocator's noise.
MAX_GROWTH = 0.02
PAGE_BYTES = resource.getpagesize()


@contextlib.contextmanager
def served(model: Path, *arguments: object, **limits: Any) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server process and its address; killed in the end. Its log is read on, or it would stop at a full pipe."""
    process = start(model, "--port", 0, "--served-model-name", "tiny", *arguments, **limits)
    try:
        url = wait_until_ready(process)
        threading.Thread(target=pass_on, args=(process.stderr,), daemon=True).start()
        yield process, url
    finally:
        process.kill()
        process.wait()


def pass_on(log: IO[str]) -> None:
    """Read a log to its end and show what is more than information."""
    for line in log:
        if '"level": "INFO"' not in line:
            sys.stderr.write(line)


def rss(process: subprocess.Popen) -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * PAGE_BYTES


def slope(samples: list[tuple[float, int]]) -> float:
    """Bytes a second of the least-squares line through what comes after the warm-up."""
    steady = samples[int(len(samples) * WARM_UP) :]
    mean_t = sum(t for t, _ in steady) / len(steady)
    mean_b = sum(b for _, b in steady) / len(steady)
    spread = sum((t - mean_t) ** 2 for t, _ in steady)
    return sum((t - mean_t) * (b - mean_b) for t, b in steady) / spread


async def load(client: openai.AsyncOpenAI, process: subprocess.Popen, streams: int, requests: int) -> dict[str, Any]:
    """`streams` clients at a time, each one request after another: every answer whole, the same for the same prompt."""
    samples: list[tuple[float, int]] = []
    answers: dict[int, set[str]] = {}
    began = time.monotonic()

    async def one(number: int) -> None:
        draw = random.Random(number)
        prompt = [5 + draw.randrange(300) for _ in range(draw.randint(1, 60))]
        length = draw.randint(1, 30)
        stream = await client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=length,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        tokens: list[int] = []
        async for chunk in stream:
            if chunk.choices:
                tokens += chunk.choices[0].token_ids
            elif chunk.usage.completion_tokens != length:
                raise AssertionError(f"{chunk.usage.completion_tokens} tokens counted, {length} wanted")
        if len(tokens) != length:
            raise AssertionError(f"{len(tokens)} tokens received, {length} wanted")
        answers.setdefault(number, set()).add(str(tokens))
        samples.append((time.monotonic() - began, rss(process)))

    async def worker(first: int) -> None:
        for turn in range(requests):
            # Every prompt comes from two workers: their answers must be the same.
            await one((first // 2) * requests + turn)

    await asyncio.gather(*(worker(first) for first in range(streams)))
    seconds = time.monotonic() - began
    different, growth = sum(len(kinds) > 1 for kinds in answers.values()), slope(samples) * seconds * (1 - WARM_UP)
    if different or growth > MAX_GROWTH * samples[-1][1]:
        raise AssertionError(f"{different} prompts with different answers; grew by {growth:.0f} of {samples[-1][1]} B")
    return {
        "requests": streams * requests,
        "seconds": round(seconds, 1),
        "different_answers_to_one_prompt": different,
        "rss_bytes": samples[-1][1],
        "rss_growth_after_warm_up_bytes": round(growth),
    }


async def cancel(client: openai.AsyncOpenAI, num: int) -> dict[str, Any]:
    """Requests of 10,000 tokens whose clients give up after half a second, then one that must be answered."""
    impatient = client.with_options(timeout=0.5, max_retries=0)

    async def give_up() -> None:
        try:
            await impatient.completions.create(
                model="tiny", prompt="a", max_tokens=10_000, extra_body={"ignore_eos": True}
            )
        except openai.APITimeoutError:
            return
        raise AssertionError("an answer of 10,000 tokens in half a second")

    await asyncio.gather(*(give_up() for _ in range(num)))
    began = time.monotonic()
    await client.completions.create(model="tiny", prompt="a", max_tokens=10)
    return {"cancelled": num, "seconds_to_the_next_answer": round(time.monotonic() - began, 2)}


def slow(url: str, num: int) -> dict[str, Any]:
    """Clients that ask for long streams and read nothing; meanwhile others are answered."""
    body = json.dumps({"prompt": "a", "max_tokens": 9000, "ignore_eos": True, "stream": True, "logprobs": 5}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    host, port = url.removeprefix("http://").split(":")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60)
    waits = []
    with contextlib.ExitStack() as stack:
        for _ in range(num):
            reader = stack.enter_context(socket.socket())
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            reader.connect((host, int(port)))
            reader.sendall(head.encode() + b"\r\n\r\n" + body)
        for _ in range(20):
            began = time.monotonic()
            client.completions.create(model="tiny", prompt="b", max_tokens=10)
            waits.append(time.monotonic() - began)
    return {"slow_readers": num, "longest_wait_of_others_seconds": round(max(waits), 2)}


def faults(model: Path, directory: Path) -> dict[str, Any]:
    """kill -9 in the middle of saves, and a disk that is full: the old session is whole, and an error says why."""
    prompt = [5 + index * 7919 % 300 for index in range(200)]
    sizes = {"kills_in_saves": 0}
    for delay in (0.05, 0.1, 0.3):
        with served(model, "--session-dir", directory) as (process, url):
            ask(f"{url}/v1/sessions", {"id": "kept", "prompt": prompt})
            saver = threading.Thread(target=save_until_killed, args=(url, prompt[:-1]))
            saver.start()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            saver.join()
        with served(model, "--session-dir", directory) as (_, url):
            status, answer = ask(f"{url}/v1/sessions/kept/restore", {})
            if status != 200 or answer["num_tokens"] not in (len(prompt), len(prompt) - 1):
                raise AssertionError(f"after kill -9: {status} {answer}")
        sizes["kills_in_saves"] += 1
    largest = max(file.stat().st_size for file in directory.iterdir())
    with served(model, "--session-dir", directory, preexec_fn=lambda: limit_files(largest // 2)) as (_, url):
        status, answer = ask(f"{url}/v1/sessions", {"id": "kept", "prompt": prompt[:50]})
        if status != 413 or answer["error"]["code"] != "insufficient_storage":
            raise AssertionError(f"disk full: {status} {answer}")
        status, answer = ask(f"{url}/v1/sessions/kept/restore", {})
        if status != 200:
            raise AssertionError(f"after a full disk: {status} {answer}")
    return {**sizes, "disk_full_status": 413, "left_over_files": [f.name for f in directory.glob(".*")]}


def limit_files(num_bytes: int) -> None:
    """Let no file of this process grow past so many bytes, as a full disk would."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def save_until_killed(url: str, prompt: list[int]) -> None:
    """Save one session over and over, until nobody answers."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        while True:
            ask(f"{url}/v1/sessions", {"id": "kept", "prompt": prompt})


def ask(url: str, body: object) -> tuple[int, Any]:
    """Status and answer of a POST."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def long_session(model: Path, directory: Path, num_tokens: int) -> dict[str, Any]:
    """A session saved, the server killed, another started: from the request to the first token, cold and restored."""
    prompt = [5 + index * 7919 % 300 for index in range(num_tokens)]
    arguments = ["--max-model-len", 2 * num_tokens, "--max-num-seqs", 2, "--session-dir", directory]

    def first_token(url: str, **extra: Any) -> tuple[float, Any]:
        began = time.monotonic()
        status, answer = ask(f"{url}/v1/completions", {"max_tokens": 1, "temperature": 0, "logprobs": 5, **extra})
        if status != 200:
            raise AssertionError(f"{status} {answer}")
        return time.monotonic() - began, answer["choices"][0]["logprobs"]["top_logprobs"]

    with served(model, *arguments) as (_, url):
        cold, logprobs = first_token(url, prompt=prompt)
        _, following = first_token(url, prompt=[*prompt, 5])
        ask(f"{url}/v1/sessions", {"id": "long", "prompt": prompt})
    with served(model, *arguments) as (_, url):
        restored, after = first_token(url, prompt=[5], session="long")
        ask(f"{url}/v1/sessions/long/restore", {})
        _, again = first_token(url, prompt=prompt)
        ask(f"{url}/v1/sessions", {"id": "again", "prompt": prompt})
    files = [load_file(directory / f"{name}.safetensors") for name in ("long", "again")]
    identical = all(bool((tensor == files[1][name]).all()) for name, tensor in files[0].items())
    figures = {
        "tokens": num_tokens,
        "cold_seconds": round(cold, 3),
        "restored_seconds": round(restored, 4),
        "restored_over_cold": round(restored / cold, 5),
        "saved_bytes": (directory / "long.safetensors").stat().st_size,
        "saved_tensors_identical": identical,
        "next_logprobs_identical": logprobs == again and following == after,
    }
    if not (figures["saved_tensors_identical"] and figures["next_logprobs_identical"]):
        raise AssertionError(figures)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    for name, default in (("streams", 64), ("requests", 200), ("cancelled", 200), ("session-tokens", 100_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--fuzz-seconds", type=float, default=600)
    parser.add_argument("--session-model", type=Path, help="a model directory for the long session")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    unknown = sorted(set(args.parts) - set(PARTS))
    if unknown:
        parser.error(f"unknown part {unknown[0]}; choose from {', '.join(PARTS)}")
    command = shlex.join(["python", "-m", "tests.serving.soak", *sys.argv[1:]])
    for part in args.parts or PARTS:
        with tempfile.TemporaryDirectory() as directory:
            model = save_model(Path(directory) / "tiny", make_tokenizer(), num_hidden_layers=2)
            figures = {part: {"command": command, **PARTS[part](args, model, Path(directory))}}
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
        if args.out:
            before = read_json(args.out) if args.out.exists() else {}
            write_json(args.out, {**before, **figures})


Part = Callable[[argparse.Namespace, Path, Path], dict[str, Any]]
# Little room for reuse, so that it is full after the warm-up and memory has no reason to grow.
LIMITS = ("--max-model-len", 20_000, "--max-num-seqs", 32, "--prefix-cache-bytes", 2**19)


def with_client(model: Path, work: Callable[[openai.AsyncOpenAI, subprocess.Popen], Any]) -> dict[str, Any]:
    """What `work` finds with a client of a new server."""
    with served(model, *LIMITS) as (process, url):
        return asyncio.run(work(openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600), process))


def with_url(model: Path, work: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """What `work` finds at the address of a new server."""
    with served(model, *LIMITS) as (_, url):
        return work(url)


PARTS: dict[str, Part] = {
    "load": lambda args, model, _: with_client(model, lambda c, p: load(c, p, args.streams, args.requests)),
    "cancel": lambda args, model, _: with_client(model, lambda c, _: cancel(c, args.cancelled)),
    "slow": lambda _args, model, _: with_url(model, lambda url: slow(url, 30)),
    "fuzz": lambda args, model, _: with_url(model, lambda url: fuzz(url, args.fuzz_seconds)),
    "faults": lambda _, model, directory: faults(model, directory / "sessions"),
    "session": lambda args, model, directory: long_session(
        args.session_model or model, directory / "sessions", args.session_tokens
    ),
}

if __name__ == "__main__":
    main()
