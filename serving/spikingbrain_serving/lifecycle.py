"""The server as a process: its socket, the moment it is ready, how it stops."""

import asyncio
import errno
import logging
import socket

import uvicorn
from fastapi import FastAPI

from spikingbrain.errors import InputError

from .async_engine import AsyncEngine

logger = logging.getLogger(__name__)

# After the requests still running have been aborted: time for their last bytes to leave.
SECONDS_TO_SAY_GOODBYE = 2


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, before anything slow is done; raises `InputError` if it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, OverflowError) as error:
        raise InputError(f"cannot listen on {host}:{port}: {error}") from error
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except (OSError, OverflowError) as error:
        sock.close()
        in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        reason = "the port is in use" if in_use else error
        raise InputError(f"cannot listen on {host}:{port}: {reason}") from error
    return sock


class Server(uvicorn.Server):
    """Says when it is ready; once asked to stop, lets requests run for so long and then aborts them."""

    def __init__(self, app: FastAPI, engine: AsyncEngine, name: str, shutdown_timeout: float):
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                timeout_graceful_shutdown=int(shutdown_timeout) + 1 + SECONDS_TO_SAY_GOODBYE,
            )
        )
        self._engine = engine
        self._name = name
        self._shutdown_timeout = shutdown_timeout

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; one line on the log when the first request can be answered."""
        await super().startup(sockets)
        for sock in sockets or []:
            host, port = sock.getsockname()[:2]
            logger.info("serving %s on http://%s:%d", self._name, f"[{host}]" if ":" in host else host, port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; requests that take longer end with the finish reason `abort`."""
        deadline = asyncio.get_running_loop().call_later(self._shutdown_timeout, self._engine.abort_all)
        await super().shutdown(sockets)
        deadline.cancel()
