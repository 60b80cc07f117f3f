"""Steps that came out as NaN or infinity: left out, counted, and the run goes on from the checkpoint before."""

import faulthandler
import json
import sys
from pathlib import Path

from spikingbrain.errors import InputError
from spikingbrain.files import read_json, write_json

SKIPPED = "skipped.json"


class NonFinite(Exception):
    """The loss or gradient of `step` (from 0) is not finite; `reason` says where that began."""

    def __init__(self, step: int, reason: str):
        super().__init__(f"step {step + 1}: not finite, {reason}")
        self.step, self.reason = step, reason


def skipped(run: Path) -> dict[int, str]:
    """Steps (from 0) that the run leaves out, and why."""
    file = run / SKIPPED
    return {int(step): reason for step, reason in read_json(file).items()} if file.exists() else {}


def skip(run: Path, fault: NonFinite, most: int) -> None:
    """Remember to leave out the step; raises `InputError` where more than `most` would be left out."""
    known = {**skipped(run), fault.step: fault.reason}
    if len(known) > most:
        raise InputError(f"{fault}; {most} steps were left out before, which faults.skips allows")
    write_json(run / SKIPPED, {str(step): reason for step, reason in known.items()})
    sys.stderr.write(json.dumps({"skipped": str(fault)}) + "\n")


def expect_progress(seconds: float) -> None:
    """End this process, with the stacks of all its threads, unless called again within `seconds`; 0: no longer."""
    faulthandler.cancel_dump_traceback_later()
    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=True)
