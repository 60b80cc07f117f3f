"""What happens before a route sees a request: its id and log line, its key, room for it, the size of its body."""

import asyncio
import base64
import binascii
import hmac
import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..async_llm import AsyncLLM
from ..errors import EngineStopped, Overloaded
from .failures import error_response, overloaded

access_log = logging.getLogger("spikingbrain_serving.access")

OPEN_PATHS = frozenset({"/health"})
GENERATING_PATHS = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/sessions"})
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
BODY_SECONDS = 60
# Basic lets a browser ask for the key, so that the page works too.
CHALLENGE = {"WWW-Authenticate": 'Bearer, Basic realm="spikingbrain", charset="UTF-8"'}


class AccessLog:
    """Gives each request an id (the client's own if it is a plain one) and writes one JSON line, without prompts."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope["state"] = {**scope.get("state", {}), "request_id": request_id, "log": {}}
        began, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            line = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            seconds = round(time.monotonic() - began, 4)
            access_log.info("request", extra={"fields": {**line, "seconds": seconds, **scope["state"]["log"]}})


class KeyCheck:
    """Lets only requests with one of the keys through, compared in constant time; all do if there are no keys."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]):
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or not self._keys:
            return await self._app(scope, receive, send)
        given = _key_of(Headers(scope=scope).get("authorization", ""))
        # Every key is compared, so that the time does not tell which one came close.
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        if any(matches):
            scope["state"]["tenant"] = str(matches.index(True))
            return await self._app(scope, receive, send)
        answer = error_response(401, "a valid API key is needed", code="invalid_api_key", headers=CHALLENGE)
        return await answer(scope, receive, send)


def _key_of(authorization: str) -> bytes:
    """The key after `Bearer`, or the password of `Basic`."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return value.strip().encode() if scheme.lower() == "bearer" else b""


class Admission:
    """Turns a request away before its body is read when too many wait, and stops reading a body that is too large."""

    def __init__(self, app: ASGIApp, engine: AsyncLLM, max_body_bytes: int):
        self._app = app
        self._engine = engine
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            return await self._app(scope, receive, send)
        refusal = self._refusal(scope)
        if refusal is None:
            body = await self._read(receive)
            refusal = body if isinstance(body, Response) else None
        if refusal is not None:
            return await refusal(scope, receive, send)
        return await self._app(scope, _replay(body, receive), send)

    def _refusal(self, scope: Scope) -> Response | None:
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length[:20]) > self._max_body_bytes:
            return self._too_large()
        try:
            if scope["path"] in GENERATING_PATHS:
                self._engine.require_room()
        except Overloaded as error:
            return overloaded(error)
        except EngineStopped as error:
            return error_response(503, str(error))
        return None

    def _too_large(self) -> Response:
        # The rest of the body is not read: the connection cannot be used again.
        close = {"Connection": "close"}
        return error_response(413, f"the body is larger than {self._max_body_bytes} bytes", headers=close)

    async def _read(self, receive: Receive) -> bytes | Response:
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return Response(status_code=400)
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    more = message.get("more_body", False)
                    if size > self._max_body_bytes:
                        return self._too_large()
        except TimeoutError:
            return error_response(408, "the body did not arrive in time", headers={"Connection": "close"})
        return b"".join(parts)


def _replay(body: Any, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, then what really comes."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's time, level, message and, if any, further fields and traceback."""
        line = {"time": self.formatTime(record), "level": record.levelname, "message": record.getMessage()}
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
