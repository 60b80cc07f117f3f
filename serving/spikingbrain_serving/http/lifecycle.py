"""The server as a process: its socket, the moment it is ready, how it stops."""

import asyncio
import errno
import logging
import socket
import ssl
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from spikingbrain.errors import InputError

from ..async_llm import AsyncLLM

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

    def __init__(
        self,
        app: FastAPI,
        engine: AsyncLLM,
        name: str,
        shutdown_timeout: float,
        certificate: tuple[Path, Path] | None = None,
    ):
        """`certificate`: files of the certificate and of its key, to speak TLS."""
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(shutdown_timeout) + 1 + SECONDS_TO_SAY_GOODBYE,
                **_tls(certificate),
            )
        )
        self._scheme = "https" if certificate else "http"
        self._engine = engine
        self._name = name
        self._shutdown_timeout = shutdown_timeout

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; one line on the log when the first request can be answered."""
        await super().startup(sockets)
        for sock in sockets or []:
            host, port = sock.getsockname()[:2]
            address = f"{self._scheme}://{f'[{host}]' if ':' in host else host}:{port}"
            logger.info("serving %s on %s", self._name, address)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; requests that take longer end with the finish reason `abort`."""
        deadline = asyncio.get_running_loop().call_later(self._shutdown_timeout, self._engine.abort_all)
        await super().shutdown(sockets)
        deadline.cancel()


def _tls(certificate: tuple[Path, Path] | None) -> dict[str, Any]:
    """uvicorn's settings for TLS; raises `InputError` if the files are no certificate and key."""
    if certificate is None:
        return {}
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(*certificate)
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"{certificate[0]} and {certificate[1]} are no certificate and key: {error}") from error
    return {"ssl_certfile": certificate[0], "ssl_keyfile": certificate[1]}
