"""Serving: an engine whose memory is fixed at start, a Python interface in vLLM's shape, HTTP in OpenAI's.

The HTTP server (`server.py`) needs the extra `serve`; what is exported here does not.
"""

from .async_llm import AsyncLLM
from .config import EngineConfig
from .engine import Engine
from .errors import EngineStopped, InvalidRequest, Overloaded, RequestFailed
from .llm import LLM
from .sampling import Logprob, SamplingParams
from .sequence import CompletionOutput, Extras, RequestOutput
from .structured import StructuredOutput

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "EngineStopped",
    "Extras",
    "InvalidRequest",
    "Logprob",
    "Overloaded",
    "RequestFailed",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutput",
]
