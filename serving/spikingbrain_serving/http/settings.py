"""What is fixed when the HTTP server starts, beside the engine."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """`api_keys`: any of them opens every route, none needs none. `allowed_origins`: web pages that may ask (CORS).

    max_body_bytes, max_prompts: most of each in a request. request_timeout: seconds for an answer, None for no end.
    session_dir: where sessions are saved, None for a directory that is removed in the end; session_bytes: most of them.
    """

    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 2**20
    max_prompts: int = 256
    request_timeout: float | None = None
    session_dir: Path | None = None
    session_bytes: int = 64 * 2**30
