"""Several processes on this machine for one run, through torch's elastic launcher."""

import logging
import signal
import sys
import uuid
from collections.abc import Callable
from typing import Any

from spikingbrain.errors import InputError

from .config import TrainConfig


def launch(config: TrainConfig) -> None:
    """Start `parallel.processes` workers and wait; start them again, `faults.restarts` times, after one died.

    Raises `KeyboardInterrupt` after Ctrl-C and `InputError` with what a worker said of its input or how it ended.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.parallel.processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
    )
    command = ["-m", "spikingbrain_training.worker", config.model_dump_json()]
    for left in reversed(range(config.faults.restarts + 1)):
        if _ended(lambda: elastic_launch(settings, sys.executable)(*command), left):
            return


def _ended(run: Callable[[], Any], restarts_left: int) -> bool:
    """Whether the run is over; False: a process died and may be started again."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in (130, -signal.SIGINT):
            raise KeyboardInterrupt from None
        if failure.exitcode == 2:
            raise InputError(failure.message) from None
        if restarts_left:
            return False
        raise InputError(f"training stopped: process {rank} ended with exit code {failure.exitcode}") from None
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
    return True
