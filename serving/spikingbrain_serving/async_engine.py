"""The engine in a thread of its own, and async iterators over what it produces."""

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from .engine import Engine
from .errors import EngineStopped, InvalidRequest, RequestFailed
from .sampling import SamplingParams
from .sequence import RequestOutput

Item = RequestOutput | Exception


class _Mailbox:
    """Carries what the engine's thread produces to the event loop that asked for it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Item] = asyncio.Queue()

    def put(self, item: Item) -> None:
        """From any thread; a loop that has closed has nobody waiting."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    async def get(self) -> RequestOutput:
        """The next item; raises it if it is an exception."""
        item = await self._items.get()
        if isinstance(item, Exception):
            raise item
        return item


class AsyncEngine:
    """Runs an `Engine`; everything the engine does happens in one thread, told what to do through a queue."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._commands: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._mailboxes: dict[str, _Mailbox] = {}
        self._lock = threading.Lock()
        self._stopping = False
        self._accepting = False
        # A daemon, so that a second Ctrl-C ends the process in the middle of a long step.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._accepting = True
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step; unfinished requests raise `EngineStopped`."""
        self._commands.put(self._request_stop)
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether requests are served."""
        return self._accepting

    async def generate(
        self, prompt_token_ids: list[int], params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        """What is new of a request, as it comes; closing the generator before the end aborts the request.

        Raises `InvalidRequest` if it does not fit the model, `RequestFailed`, `EngineStopped`.
        """
        async with aclosing(self.generate_many([prompt_token_ids], params, request_id)) as outputs:
            async for _, output in outputs:
                yield output

    async def generate_many(
        self, prompts: list[list[int]], params: SamplingParams, request_id: str
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Like `generate` for several prompts, computed together: (index of the prompt, what is new of it)."""
        for prompt in prompts:
            self.engine.check(prompt, params)
        ids = {f"{request_id}-{index}": index for index in range(len(prompts))}
        mailbox = _Mailbox()
        self._submit(lambda: self._add(dict(zip(ids, prompts, strict=True)), params, mailbox))
        num_unfinished = len(ids)
        try:
            while num_unfinished:
                output = await mailbox.get()
                num_unfinished -= output.finished
                yield ids[output.request_id], output
        finally:
            if num_unfinished:
                self._commands.put(lambda: self._abort(list(ids)))

    def abort_all(self) -> None:
        """End every request now, with the finish reason `abort`."""
        self._commands.put(lambda: self._abort(self.engine.request_ids))

    def _submit(self, command: Callable[[], Any]) -> None:
        with self._lock:
            if not self._accepting:
                raise EngineStopped("the engine has stopped")
            self._commands.put(command)

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._obey()
                for output in self.engine.step():
                    self._deliver(output)
        finally:
            # Reached by a fault of the engine too: nobody may wait for ever.
            self._turn_away()

    def _obey(self) -> None:
        """Take all commands, waiting for one if there is nothing else to do."""
        if not self.engine.has_work:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def _turn_away(self) -> None:
        with self._lock:
            self._accepting = False
            while not self._commands.empty():
                self._commands.get()()
        for mailbox in self._mailboxes.values():
            mailbox.put(EngineStopped("the engine has stopped"))

    def _request_stop(self) -> None:
        self._stopping = True

    def _add(self, prompts: dict[str, list[int]], params: SamplingParams, mailbox: _Mailbox) -> None:
        try:
            for request_id, prompt in prompts.items():
                self.engine.add_request(request_id, prompt, params)
                self._mailboxes[request_id] = mailbox
        except InvalidRequest as error:
            mailbox.put(error)

    def _abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            output = self.engine.abort(request_id)
            if output is not None:
                self._deliver(output)

    def _deliver(self, output: RequestOutput) -> None:
        mailbox = self._mailboxes[output.request_id]
        if output.finished:
            del self._mailboxes[output.request_id]
        (completion,) = output.outputs
        failed = completion.finish_reason == "error"
        mailbox.put(RequestFailed(completion.error) if failed else output)
