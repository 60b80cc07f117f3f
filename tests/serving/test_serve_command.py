"""`spikingbrain serve` as a process: when it is ready, how it ends, what it refuses."""

import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from http.client import HTTPResponse
from typing import Any

import pytest

from spikingbrain.cli import main
from spikingbrain.errors import InputError
from spikingbrain_serving.commands.serve import read_keys

MAIN = "from spikingbrain.cli import main; raise SystemExit(main())"


def start(*arguments: object, **process: Any) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, "serve", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **process,
    )


def wait_until_ready(process: subprocess.Popen) -> str:
    """The address in the line that says it is ready."""
    for line in process.stderr:
        found = re.search(r"serving tiny on (https?://127\.0\.0\.1:\d+)", line)
        if found:
            return found.group(1)
    raise AssertionError(f"the server ended with {process.wait()} before it was ready")


def begin(url: str, num_tokens: int) -> HTTPResponse:
    """A stream of which the first event has come."""
    options = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    body = json.dumps({"prompt": "a", "max_tokens": num_tokens, **options}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    stream = urllib.request.urlopen(request, timeout=60)
    assert stream.readline().startswith(b"data: {")
    return stream


def finish(stream: HTTPResponse) -> tuple[str, int]:
    """Read to the end: the reason why it ended and the number of tokens."""
    with stream:
        *_, last, usage, done = stream.read().decode().split("\n\n")[:-1]
    assert done == "data: [DONE]"
    reason = json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"]
    return reason, json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"]


def wait_until_refused(url: str) -> None:
    port = int(url.rpartition(":")[2])
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.02)
    raise AssertionError("the server still takes connections")


@pytest.fixture
def serve():
    processes: list[subprocess.Popen] = []

    def run(*arguments: object) -> tuple[subprocess.Popen, str]:
        processes.append(start(*arguments, "--port", 0))
        return processes[-1], wait_until_ready(processes[-1])

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def test_sigterm_lets_running_requests_finish_refuses_others_and_exits_with_0(serve, model_dir):
    process, url = serve(model_dir, "--max-model-len", 5000, "--served-model-name", "tiny")
    stream = begin(url, 600)
    process.send_signal(signal.SIGTERM)
    wait_until_refused(url)
    assert finish(stream) == ("length", 600)
    assert process.wait(10) == 0


def test_ctrl_c_aborts_what_outlasts_the_timeout_and_exits_with_130(serve, model_dir):
    process, url = serve(model_dir, "--max-model-len", 200_000, "--shutdown-timeout", 0.2)
    stream = begin(url, 100_000)
    process.send_signal(signal.SIGINT)
    reason, num_tokens = finish(stream)
    assert reason == "abort"
    assert 0 < num_tokens < 100_000
    assert process.wait(10) == 130
    assert process.stderr.read().rstrip().splitlines()[-1] == "interrupted"


def test_a_port_in_use_is_one_line_and_exit_code_2_before_the_model_is_read(tmp_path, capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(tmp_path), "--port", str(port)]) == 2
    assert capfd.readouterr().err == f"error: cannot listen on 127.0.0.1:{port}: the port is in use\n"


def test_a_directory_without_a_model_is_one_line_and_exit_code_2(tmp_path, capfd):
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert capfd.readouterr().err == f"error: {tmp_path}/config.json does not exist\n"


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("one\n\n  two  \n")
    monkeypatch.setenv("SPIKINGBRAIN_API_KEY", "three")
    assert read_keys(file) == ("three", "one", "two")
    monkeypatch.delenv("SPIKINGBRAIN_API_KEY")
    assert read_keys(None) == ()
    file.write_text("\n")
    for path, message in ((file, "holds no API key"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(InputError, match=message):
            read_keys(path)


def test_a_key_and_a_certificate_are_asked_for_and_spoken(serve, model_dir, tmp_path):
    keys, certificate, key = (tmp_path / name for name in ("keys", "cert.pem", "key.pem"))
    keys.write_text("mine\n")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    tls = ["--ssl-certfile", certificate, "--ssl-keyfile", key]
    process, url = serve(model_dir, "--served-model-name", "tiny", "--api-key-file", keys, *tls)
    assert url.startswith("https://")
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": "Bearer mine"})
    with urllib.request.urlopen(request, context=context, timeout=20) as answer:
        assert json.load(answer)["data"][0]["id"] == "tiny"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{url}/v1/models", context=context, timeout=20)
    assert process.poll() is None
