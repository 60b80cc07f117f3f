"""Serving: an engine whose memory is fixed at start, a Python interface in vLLM's shape, HTTP in OpenAI's.

The HTTP server (`server.py`) needs the extra `serve`; what is exported here does not.
"""

from .async_engine import AsyncEngine
from .engine import Engine, EngineConfig
from .errors import EngineStopped, InvalidRequest, RequestFailed
from .llm import LLM
from .sampling import Logprob, SamplingParams
from .sequence import CompletionOutput, RequestOutput

__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "EngineStopped",
    "InvalidRequest",
    "Logprob",
    "RequestFailed",
    "RequestOutput",
    "SamplingParams",
]
