"""Requests put together from valid ones and nonsense: never a 5xx, never silence, never a closed connection."""

import json
import random
import time
import urllib.error
import urllib.request
from collections import Counter
from typing import Any

CHAT = [{"role": "user", "content": "hi"}]
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": CHAT},
    "/v1/responses": {"input": "a"},
    "/v1/sessions": {"id": "s", "prompt": "a"},
    "/v1/sessions/s/fork": {"id": "t"},
    "/v1/sessions/s/restore": {},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
}
FIELDS = [
    "model",
    "prompt",
    "messages",
    "input",
    "n",
    "stop",
    "seed",
    "logprobs",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "tools",
    "tool_choice",
    "stream",
    "response_format",
    "structured_outputs",
    "logit_bias",
    "presence_penalty",
    "repetition_penalty",
    "min_tokens",
    "stop_token_ids",
    "id",
    "session",
    "previous_response_id",
    "stream_options",
    "return_spikes",
    "tokens",
]
DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
VALUES: list[Any] = [None, True, -1, 0, 2, 10**30, 1.5, "", "a", "tiny", "\ud800", [], [1], ["a"], [[5]], {}, {"5": 1}]
VALUES += [DEEP, {"a": [{}]}, "x" * 10_000, CHAT, {"type": "json_object"}, {"regex": "[ab"}, [None], "../../x", -1e308]


def request_of(draw: random.Random) -> tuple[str, bytes]:
    """A path and a body: a valid one with some fields changed and, now and then, with some bytes changed."""
    path = draw.choice(list(VALID))
    body: Any = {**VALID[path], "max_tokens": 3}
    body |= {name: draw.choice(VALUES) for name in draw.sample(FIELDS, draw.choice([0, 1, 1, 2, 5]))}
    if draw.random() < 0.05:
        body = draw.choice(VALUES)
    raw = json.dumps(body).encode()
    if draw.random() < 0.2:
        cut = draw.randrange(len(raw))
        raw = raw[:cut] + bytes(draw.choices(range(256), k=3)) + raw[cut + draw.randint(0, 3) :]
    return path, raw


def fuzz(url: str, seconds: float) -> dict[str, Any]:
    """Ask for so long; raises AssertionError with the body for a 5xx and for an error that is not OpenAI's."""
    draw, began, statuses = random.Random(0), time.monotonic(), Counter[int]()
    while time.monotonic() - began < seconds:
        path, raw = request_of(draw)
        request = urllib.request.Request(url + path, raw, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                answer.read()
                statuses[answer.status] += 1
        except urllib.error.HTTPError as error:
            with error:
                message = json.load(error)["error"]["message"]
            if error.code >= 500 or not message:
                raise AssertionError(f"status {error.code} of {path} for {raw!r}") from error
            statuses[error.code] += 1
    return {"seconds": seconds, "statuses": {str(status): statuses[status] for status in sorted(statuses)}}
