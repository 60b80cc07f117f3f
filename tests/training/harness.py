"""Several ranks in one test: forked from one clean process that has already imported everything that is slow.

A fork of pytest's own process would inherit its thread pools; a fresh interpreter a rank would import for ten seconds.
"""

import os
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = ["torch", "transformers", "transformers.models.qwen2.modeling_qwen2", "deepspeed", "spikingbrain"]
SECONDS = 400
KILLED = -9


def run_ranks(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """`work(*args)` on `size` gloo ranks of one thread each; their results in order, None of one that was killed.

    Raises `AssertionError` with the tracebacks if a rank fails or hangs.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # As under torchrun the launcher keeps the store: its port is taken when the ranks learn of it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with TemporaryDirectory() as folder:
        place = (Path(folder), store.port)
        ranks = [context.Process(target=_rank, args=(rank, size, *place, work, args)) for rank in range(size)]
        for process in ranks:
            process.start()
        try:
            for process in ranks:
                process.join(SECONDS)
        finally:
            for process in ranks:
                process.kill()
        failures = [file.read_text() for file in sorted(Path(folder).glob("failed-*"))]
        codes = [process.exitcode for process in ranks]
        assert not failures, "\n".join(failures)
        assert set(codes) <= {0, KILLED}, codes
        files = [Path(folder) / f"done-{rank}" for rank in range(size)]
        return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def _rank(rank: int, size: int, folder: Path, port: int, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    # As many local ranks as cores: one thread each, and sums in the same order whatever the world's size.
    local_size = max(size, os.cpu_count() or 1)
    settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": local_size}
    os.environ.update({name: str(value) for name, value in settings.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"})
    torch.manual_seed(0)
    try:
        torch.save(work(*args), folder / f"done-{rank}")
    except BaseException:
        (folder / f"failed-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
    # Without torch's atexit handlers, which wait for ranks that a test has killed.
    os._exit(0)
