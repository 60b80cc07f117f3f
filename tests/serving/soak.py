"""Load, cancellation, long sessions and fuzz against a server process; prints one JSON object of figures.

python -m tests.serving.soak [--streams 64] [--requests 200] [--cancelled 200] [--fuzz-seconds 600]
    [--session-tokens 100000] [--out FILE]
"""

import argparse
import asyncio
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import openai

from .conftest import make_tokenizer, save_model
from .test_serve_command import start, wait_until_ready

WARM_UP = 0.25
PAGE_BYTES = resource.getpagesize()


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
    return {
        "requests": streams * requests,
        "seconds": round(seconds, 1),
        "different_answers_to_one_prompt": sum(len(kinds) > 1 for kinds in answers.values()),
        "rss_bytes": samples[-1][1],
        "rss_slope_bytes_per_request": round(slope(samples) * seconds / (streams * requests), 1),
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


def fuzz(url: str, seconds: float) -> dict[str, Any]:
    """Bodies put together from the fields of requests and nonsense: never a 5xx, never silence."""
    draw, began, statuses = random.Random(0), time.monotonic(), {}
    paths = ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/sessions", "/tokenize", "/detokenize"]
    fields = "model prompt messages input n stop seed logprobs max_tokens temperature tools response_format stream id"
    values: list[Any] = [None, True, -1, 0, 2, 10**30, 1.5, "", "a", "\ud800", [], [1], ["a"], [[5]], {}, {"a": [{}]}]
    values += ["x" * 10_000, [{"role": "user", "content": "hi"}], {"type": "json_object"}, [None], "../../x"]
    while time.monotonic() - began < seconds:
        body: Any = {name: draw.choice(values) for name in draw.sample(fields.split(), draw.randint(0, 6))}
        body = {**body, "max_tokens": draw.choice([3, draw.choice(values)])}
        raw = json.dumps(body).encode()
        if draw.random() < 0.2:
            cut = draw.randrange(len(raw))
            raw = raw[:cut] + bytes(draw.choices(range(256), k=3)) + raw[cut + draw.randint(0, 3) :]
        request = urllib.request.Request(url + draw.choice(paths), raw, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                answer.read()
                status = answer.status
        except urllib.error.HTTPError as error:
            status = error.code
            error.close()
        if status >= 500:
            raise AssertionError(f"status {status} for {raw!r}")
        statuses[status] = statuses.get(status, 0) + 1
    return {"seconds": seconds, "statuses": dict(sorted(statuses.items()))}


def long_session(model: Path, directory: Path, num_tokens: int) -> dict[str, Any]:
    """A session saved, the server killed, another started: from the request to the first token, cold and restored."""
    prompt = [5 + index * 7919 % 300 for index in range(num_tokens)]

    def served() -> tuple[subprocess.Popen, openai.OpenAI]:
        arguments = ["--port", 0, "--max-model-len", 2 * num_tokens, "--max-num-seqs", 2, "--session-dir", directory]
        process = start(model, *arguments)
        return process, openai.OpenAI(base_url=f"{wait_until_ready(process)}/v1", api_key="none", timeout=600)

    def first_token(client: openai.OpenAI, **extra: Any) -> tuple[float, str]:
        began = time.monotonic()
        answer = client.completions.create(model="tiny", max_tokens=1, temperature=0, logprobs=5, **extra)
        return time.monotonic() - began, str(answer.choices[0].logprobs.top_logprobs)

    process, client = served()
    cold, logits = first_token(client, prompt=prompt)
    client.post("/sessions", body={"id": "long", "prompt": prompt}, cast_to=object)
    process.kill()
    process.communicate()
    process, client = served()
    restored, again = first_token(client, prompt=[5], extra_body={"session": "long"})
    client.post("/sessions/long/restore", body={}, cast_to=object)
    _, same = first_token(client, prompt=prompt)
    process.kill()
    process.communicate()
    return {
        "tokens": num_tokens,
        "cold_seconds": round(cold, 3),
        "restored_seconds": round(restored, 4),
        "restored_over_cold": round(restored / cold, 5),
        "first_logprobs_identical": logits == same,
        "another_token_differs": again != logits,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("streams", 64), ("requests", 200), ("cancelled", 200), ("session-tokens", 100_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--fuzz-seconds", type=float, default=600)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = save_model(Path(directory) / "tiny", make_tokenizer(), num_hidden_layers=2)
        process = start(model, "--port", 0, "--max-model-len", 20_000, "--max-num-seqs", 32)
        try:
            url = wait_until_ready(process)
            client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
            figures = {
                "command": " ".join(["python -m tests.serving.soak", *sys.argv[1:]]),
                "load": asyncio.run(load(client, process, args.streams, args.requests)),
            }
            client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
            figures["cancel"] = asyncio.run(cancel(client, args.cancelled))
            figures["fuzz"] = fuzz(url, args.fuzz_seconds)
        finally:
            process.kill()
            process.communicate()
        figures["session"] = long_session(model, Path(directory) / "sessions", args.session_tokens)
    text = json.dumps(figures, indent=2) + "\n"
    if args.out:
        args.out.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
