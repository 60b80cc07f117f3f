"""The documented command, asked through the `openai` client."""

import os
import socket
import subprocess
import sys
import time
import urllib.request

import openai
import pytest

from ..conftest import make_tokenizer, save_model
from ..test_deploy import exported, metrics_on_the_board
from .conftest import SMALL_ENGINE, reference

pytest.importorskip("vllm", reason="needs vLLM in an environment of its own: make test-vllm")

# Far more than docs/vllm.md says, for a machine that does a lot besides.
START_SECONDS = 600
LENGTHS = (7, 100, 67, 1, 102)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    return save_model(path, make_tokenizer(), hidden_size=128, head_dim=32, mixers=["gla+sliding_window", "softmax"])


@pytest.fixture(scope="module")
def client(path):
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--dtype", "float32"]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "256"]
    command += ["--enforce-eager", "--enable-prefix-caching", "--max-num-seqs", "4"]
    # Processes as in production.
    environment = {**os.environ, **SMALL_ENGINE, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with subprocess.Popen(command, env=environment) as server:
        try:
            wait(server, f"http://127.0.0.1:{port}/health")
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        finally:
            stop(server)


def stop(server):
    """End it; while it starts, it does not listen to being told so."""
    server.terminate()
    try:
        server.wait(60)
    except subprocess.TimeoutExpired:
        server.kill()


def wait(server, url):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server stopped"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                assert answer.status == 200
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"not ready within {START_SECONDS} s")


def make_prompts():
    return [[3 + (7 * length + index * index) % 250 for index in range(length)] for length in LENGTHS]


def test_tokens_over_http_are_those_of_generate(client, path):
    expected = reference(path, make_prompts())
    for _ in range(3):
        made = client.completions.create(
            model="tiny",
            prompt=make_prompts(),
            max_tokens=12,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        assert [choice.token_ids for choice in made.choices] == expected
        assert made.usage.completion_tokens == 12 * len(LENGTHS)


def test_a_stream_says_the_same_and_one_that_is_closed_disturbs_nobody(client):
    options = {"model": "tiny", "prompt": make_prompts()[1], "temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(max_tokens=24, **options).choices[0].text
    assert (
        "".join(chunk.choices[0].text for chunk in client.completions.create(max_tokens=24, stream=True, **options))
        == whole
    )
    closed = client.completions.create(max_tokens=140, stream=True, **options)
    next(iter(closed))
    closed.close()
    assert client.completions.create(max_tokens=24, **options).choices[0].text == whole


def test_what_does_not_fit_is_answered_with_the_reason(client):
    with pytest.raises(openai.BadRequestError, match="256"):
        client.completions.create(model="tiny", prompt=[5] * 300, max_tokens=5)
    with pytest.raises(openai.NotFoundError, match="other"):
        client.completions.create(model="other", prompt=[5], max_tokens=5)


def test_the_grafana_board_shows_vllms_metrics_too(client):
    url = str(client.base_url).replace("/v1/", "/metrics")
    with urllib.request.urlopen(url) as answer:
        assert metrics_on_the_board() <= exported(answer.read().decode())
