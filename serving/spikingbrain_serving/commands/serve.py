"""Serve a model over HTTP, as OpenAI's clients expect it.

Memory is fixed at start: --max-num-seqs sequences, each with a slot of state that, for a model without softmax layers,
does not grow with the conversation. API keys are read from --api-key-file, one a line, or from the environment variable
SPIKINGBRAIN_API_KEY.
"""

import argparse
import json
import logging
import os
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from spikingbrain.errors import InputError

if TYPE_CHECKING:
    from ..config import EngineConfig

EXTRA = ("fastapi", "pydantic", "prometheus_client", "uvicorn")
KEY_VARIABLE = "SPIKINGBRAIN_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """vLLM's names where they mean the same."""
    parser.add_argument("model", metavar="DIR", type=Path, help="model directory")
    parser.add_argument("--served-model-name", metavar="NAME", help="name in the API (default: the directory's)")
    _add_engine_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one")
    parser.add_argument("--api-key-file", metavar="FILE", type=Path, help="API keys, one a line")
    parser.add_argument("--allowed-origins", type=_origins, default=(), metavar="JSON", help="origins for CORS: a list")
    parser.add_argument("--ssl-certfile", metavar="FILE", type=Path, help="certificate, to speak TLS")
    parser.add_argument("--ssl-keyfile", metavar="FILE", type=Path, help="the certificate's key")
    parser.add_argument("--max-body-bytes", type=int, default=8 * 2**20, help="largest body of a request")
    parser.add_argument("--request-timeout", type=float, metavar="SECONDS", help="longest time for an answer")
    parser.add_argument("--session-dir", metavar="DIR", type=Path, help="saved sessions (default: until the end)")
    parser.add_argument("--session-bytes", type=int, default=64 * 2**30, help="most bytes of saved sessions")
    parser.add_argument("--shutdown-timeout", type=float, default=30, help="seconds for running requests to finish")


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-num-seqs", type=int, default=16, help="sequences computed at a time")
    parser.add_argument("--max-model-len", type=int, help="tokens of prompt and output (default: the model's)")
    parser.add_argument("--max-num-batched-tokens", type=int, default=512, help="prompt tokens computed in one step")
    parser.add_argument("--max-num-waiting", type=int, default=1024, help="requests that may wait; more get a 429")
    parser.add_argument("--prefix-cache-bytes", type=int, default=512 * 2**20, help="states kept for reuse; 0: none")
    parser.add_argument("--spill-dir", metavar="DIR", type=Path, help="where states go that memory has no room for")
    parser.add_argument("--spill-bytes", type=int, default=8 * 2**30, help="most bytes there")
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, float16")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda")
    parser.add_argument(
        "--pack", default="auto", help="weights: auto (their type), fp32, bf16, int8 (on a GPU too), none"
    )
    parser.add_argument("--seed", type=int, default=0, help="for requests that bring none")


def run(args: argparse.Namespace) -> None:
    """Serve until SIGTERM (exit code 0) or Ctrl-C (130)."""
    try:
        from ..http.app import create_app
        from ..http.lifecycle import Server, bind
        from ..http.middleware import JsonFormatter
        from ..http.settings import HttpSettings
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        raise InputError(f"serving needs {error.name}: pip install 'spikingbrain[serve]'") from error
    from ..async_llm import AsyncLLM
    from ..loading import load_engine

    if args.shutdown_timeout < 0:
        raise InputError(f"--shutdown-timeout must be 0 or more seconds, got {args.shutdown_timeout}")
    settings = HttpSettings(
        api_keys=read_keys(args.api_key_file),
        allowed_origins=args.allowed_origins,
        max_body_bytes=args.max_body_bytes,
        request_timeout=args.request_timeout,
        session_dir=args.session_dir,
        session_bytes=args.session_bytes,
    )
    certificate, config = _certificate(args), engine_config(args)
    _log_to_stderr(JsonFormatter())
    signal.signal(signal.SIGTERM, _exit)
    with bind(args.host, args.port) as sock:
        engine = AsyncLLM(load_engine(args.model, config))
        name = args.served_model_name or args.model.resolve().name
        app = create_app(engine, name, settings)
        Server(app, engine, name, args.shutdown_timeout, certificate).run(sockets=[sock])


def engine_config(args: argparse.Namespace) -> "EngineConfig":
    """The engine's part of the arguments."""
    from ..config import EngineConfig

    return EngineConfig(**{f.name: getattr(args, f.name) for f in fields(EngineConfig) if hasattr(args, f.name)})


def read_keys(file: Path | None) -> tuple[str, ...]:
    """The API keys of a file and of the environment; raises `InputError` if the file has none."""
    keys = [key for key in [os.environ.get(KEY_VARIABLE, "").strip()] if key]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file} cannot be read: {error}") from error
        if not any(lines):
            raise InputError(f"{file} holds no API key")
        keys += [line for line in lines if line]
    return tuple(keys)


def _certificate(args: argparse.Namespace) -> tuple[Path, Path] | None:
    if (args.ssl_certfile is None) != (args.ssl_keyfile is None):
        raise InputError("--ssl-certfile and --ssl-keyfile go together")
    return (args.ssl_certfile, args.ssl_keyfile) if args.ssl_certfile else None


def _origins(text: str) -> tuple[str, ...]:
    try:
        origins = json.loads(text)
    except ValueError:
        origins = None
    if not isinstance(origins, list) or not all(isinstance(origin, str) for origin in origins):
        raise argparse.ArgumentTypeError('a JSON list of origins, as ["https://example.org"]')
    return tuple(origins)


def _exit(_signal: int, _frame: object) -> NoReturn:
    """While loading, at once; while serving, uvicorn takes the signal first and raises it again when all is done."""
    sys.exit(0)


def _log_to_stderr(formatter: logging.Formatter) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
