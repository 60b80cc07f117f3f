"""Serve a model over HTTP, as OpenAI's clients expect it.

Memory is fixed at start: --max-num-seqs sequences, each with a slot of state that, for a model without softmax layers,
does not grow with the conversation.
"""

import argparse
import logging
import signal
import sys
from pathlib import Path
from typing import NoReturn

from spikingbrain.errors import InputError

EXTRA = ("fastapi", "pydantic", "uvicorn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """vLLM's names where they mean the same."""
    parser.add_argument("model", metavar="DIR", type=Path, help="model directory")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one")
    parser.add_argument("--served-model-name", metavar="NAME", help="name in the API (default: the directory's)")
    parser.add_argument("--max-num-seqs", type=int, default=16, help="sequences computed at a time")
    parser.add_argument("--max-model-len", type=int, help="tokens of prompt and output (default: the model's)")
    parser.add_argument("--max-num-batched-tokens", type=int, default=512, help="prompt tokens computed in one step")
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, float16")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda")
    parser.add_argument("--shutdown-timeout", type=float, default=30, help="seconds for running requests to finish")
    parser.add_argument("--seed", type=int, default=0, help="for requests that bring none")


def run(args: argparse.Namespace) -> None:
    """Serve until SIGTERM (exit code 0) or Ctrl-C (130)."""
    try:
        from ..lifecycle import Server, bind
        from ..server import create_app
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        raise InputError(f"serving needs {error.name}: pip install 'spikingbrain[serve]'") from error
    from ..async_engine import AsyncEngine
    from ..engine import EngineConfig
    from ..loading import load_engine

    if args.shutdown_timeout < 0:
        raise InputError(f"--shutdown-timeout must be 0 or more seconds, got {args.shutdown_timeout}")
    config = EngineConfig(
        max_num_seqs=args.max_num_seqs,
        max_model_len=args.max_model_len,
        max_num_batched_tokens=args.max_num_batched_tokens,
        dtype=args.dtype,
        device=args.device,
        seed=args.seed,
    )
    _log_to_stderr()
    signal.signal(signal.SIGTERM, _exit)
    with bind(args.host, args.port) as sock:
        engine = AsyncEngine(load_engine(args.model, config))
        name = args.served_model_name or args.model.resolve().name
        Server(create_app(engine, name), engine, name, args.shutdown_timeout).run(sockets=[sock])


def _exit(_signal: int, _frame: object) -> NoReturn:
    """While loading, at once; while serving, uvicorn takes the signal first and raises it again when all is done."""
    sys.exit(0)


def _log_to_stderr() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
