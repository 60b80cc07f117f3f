"""One process of a run: what `launch` starts."""

import json
import os
import signal
import sys
from pathlib import Path


def main(settings: str) -> int:
    """Run a config given as JSON; exit codes as the command line's, and what it would say goes to the launcher."""
    # Slow imports are made here, where Ctrl-C just ends the process.
    from spikingbrain.cli import REPORTED_OS_ERRORS
    from spikingbrain.errors import InputError

    from .config import TrainConfig
    from .train import Interrupted, train

    try:
        train(TrainConfig.model_validate(json.loads(settings)))
    except InputError as error:
        return _report(error)
    except OSError as error:
        if error.errno not in REPORTED_OS_ERRORS:
            raise
        return _report(error)
    except Interrupted as stopped:
        return 130 if stopped.number == signal.SIGINT else 0
    return 0


def _report(error: Exception) -> int:
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": str(error)}))
    return 2


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main(sys.argv[1]))
