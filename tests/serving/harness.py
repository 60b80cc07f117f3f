"""A real server on loopback for the tests, asked by the `openai` client and by urllib."""

import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import uvicorn

from spikingbrain_serving import LLM, AsyncLLM
from spikingbrain_serving.http.app import create_app
from spikingbrain_serving.http.settings import HttpSettings


class Served:
    """A running server, its engine and its address."""

    def __init__(self, engine: AsyncLLM, port: int):
        self.engine = engine.engine
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20)

    def ask(
        self, path: str, body: object = None, *, raw: bytes | None = None, method: str | None = None, **headers: str
    ) -> tuple[int, str]:
        """Status and text of the answer; `raw` is sent as it is."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def events(self, path: str, body: dict) -> list[dict]:
        """The JSON of every server-sent event; checks the frames and the end."""
        status, text = self.ask(path, {**body, "stream": True})
        assert status == 200
        *frames, done, rest = text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
        return [json.loads(frame.removeprefix("data: ")) for frame in frames]

    def wait_until_idle(self) -> None:
        """Wait until every slot is free."""
        deadline = time.monotonic() + 5
        while self.engine.request_ids:
            assert time.monotonic() < deadline, f"still running: {self.engine.request_ids}"
            time.sleep(0.01)
        assert self.engine.pool.num_free == self.engine.pool.num_slots


@contextlib.contextmanager
def serving(model_dir: Path, settings: HttpSettings | None = None, **engine_settings: object) -> Iterator[Served]:
    """Serve a model as `tiny` while the block runs; in the end nothing is left running."""
    engine = AsyncLLM(LLM(model_dir, **engine_settings).engine)
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(engine, "tiny", settings), log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Served(engine, sock.getsockname()[1])
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def require_error(answer: tuple[int, str], status: int, *, param: str | None = None, message: str = "") -> None:
    code, text = answer
    error = json.loads(text)["error"]
    assert code == status, text
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert message in error["message"]
