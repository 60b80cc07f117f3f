"""The engine in a thread of its own, and async iterators over what it produces."""

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any

from .engine import NO_EXTRAS, Engine
from .errors import EngineStopped, InvalidRequest, Overloaded, RequestFailed
from .sampling import SamplingParams
from .sequence import Extras, RequestOutput, Sequence

MAX_RETRY_AFTER = 60


class _Mailbox:
    """Carries what the engine's thread produces to the event loop that asked for it.

    What a slow reader has not fetched is merged into one item an output, so that it takes no more room than its text.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._outputs: dict[tuple[str, int], RequestOutput] = {}
        self._error: Exception | None = None
        self._something = asyncio.Event()

    def put(self, item: RequestOutput | Exception) -> None:
        """From any thread; a loop that has closed has nobody waiting."""
        with self._lock:
            if isinstance(item, Exception):
                self._error = item
            else:
                self._merge(item)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._something.set)

    def _merge(self, new: RequestOutput) -> None:
        key = (new.request_id, new.outputs[0].index)
        if key in self._outputs:
            self._outputs[key].extend(new)
        else:
            self._outputs[key] = new

    async def get(self) -> list[RequestOutput]:
        """What has come since the last call, at least one item; raises an exception that was put."""
        while True:
            await self._something.wait()
            self._something.clear()
            with self._lock:
                outputs, self._outputs = list(self._outputs.values()), {}
            if outputs:
                self._something.set()
                return outputs
            if self._error is not None:
                raise self._error


class AsyncLLM:
    """Runs an `Engine`; everything the engine does happens in one thread, told what to do through a queue."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._commands: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._mailboxes: dict[str, _Mailbox] = {}
        # Reentrant: a command taken while turning away may forget a request.
        self._lock = threading.RLock()
        self._num_unfinished = 0
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
        self.engine.close()

    @property
    def is_alive(self) -> bool:
        """Whether requests are served."""
        return self._accepting

    @property
    def num_waiting(self) -> int:
        """Requests beyond those that the slots can take."""
        return max(0, self._num_unfinished - self.engine.config.max_num_seqs)

    def require_room(self, num: int = 1) -> None:
        """Raise `Overloaded` if `num` more requests would be more than may wait, `EngineStopped` if none is served."""
        if not self._accepting:
            raise EngineStopped("the engine has stopped")
        waiting = self._num_unfinished + num - self.engine.config.max_num_seqs
        if waiting > self.engine.config.max_num_waiting:
            raise Overloaded(min(MAX_RETRY_AFTER, 1 + waiting // self.engine.config.max_num_seqs))

    async def generate(
        self, prompt_token_ids: list[int], params: SamplingParams, request_id: str, extras: Extras = NO_EXTRAS
    ) -> AsyncGenerator[RequestOutput, None]:
        """What is new of a request, as it comes; closing the generator before the end aborts the request.

        Raises `InvalidRequest` if it does not fit the model, `Overloaded`, `RequestFailed`, `EngineStopped`.
        """
        async with aclosing(self.generate_many([prompt_token_ids], params, request_id, extras)) as outputs:
            async for _, output in outputs:
                yield output

    async def generate_many(
        self, prompts: list[list[int]], params: SamplingParams, request_id: str, extras: Extras = NO_EXTRAS
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Like `generate` for several prompts, computed together: (index of the prompt, what is new of it)."""
        requests = await self._prepare(prompts, params, request_id, extras)
        ids = {f"{request_id}-{index}": index for index in range(len(prompts))}
        mailbox = _Mailbox()
        self._submit(requests, mailbox)
        num_unfinished = len(ids)
        try:
            while num_unfinished:
                for output in await mailbox.get():
                    num_unfinished -= output.finished
                    yield ids[output.request_id], output
        finally:
            if num_unfinished:
                self._commands.put(lambda: self._abort(list(ids)))

    async def _prepare(
        self, prompts: list[list[int]], params: SamplingParams, request_id: str, extras: Extras
    ) -> list[list[Sequence]]:
        """The sequences of every prompt; a grammar, which takes long to read, does not hold up the event loop."""
        self.require_room(len(prompts))

        def work() -> list[list[Sequence]]:
            return [
                self.engine.prepare(f"{request_id}-{index}", prompt, params, extras)
                for index, prompt in enumerate(prompts)
            ]

        return work() if params.structured is None else await asyncio.to_thread(work)

    def abort_all(self) -> None:
        """End every request now, with the finish reason `abort`."""
        self._commands.put(lambda: self._abort(self.engine.request_ids))

    def _submit(self, requests: list[list[Sequence]], mailbox: _Mailbox) -> None:
        with self._lock:
            self.require_room(len(requests))
            self._num_unfinished += len(requests)
            self._commands.put(lambda: self._add(requests, mailbox))

    async def call(self, work: Callable[[Engine], Any]) -> Any:
        """The result of `work(engine)`, done by the engine's thread between two steps."""
        future: Future[Any] = Future()

        def command() -> None:
            if future.set_running_or_notify_cancel():
                future.set_result(work(self.engine))

        with self._lock:
            if not self._accepting:
                raise EngineStopped("the engine has stopped")
            self._commands.put(command)
        return await asyncio.wrap_future(future)

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

    def _add(self, requests: list[list[Sequence]], mailbox: _Mailbox) -> None:
        for sequences in requests:
            request_id = sequences[0].request_id
            try:
                self.engine.enqueue(sequences)
            except InvalidRequest as error:
                self._forget(1)
                mailbox.put(error)
            else:
                self._mailboxes[request_id] = mailbox

    def _abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            for output in self.engine.abort(request_id):
                self._deliver(output)

    def _deliver(self, output: RequestOutput) -> None:
        mailbox = self._mailboxes[output.request_id]
        if output.finished:
            del self._mailboxes[output.request_id]
            self._forget(1)
        (completion,) = output.outputs
        failed = completion.finish_reason == "error"
        mailbox.put(RequestFailed(completion.error) if failed else output)

    def _forget(self, num: int) -> None:
        with self._lock:
            self._num_unfinished -= num
