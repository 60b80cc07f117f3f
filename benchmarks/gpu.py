"""`make bench-gpu`: the suite `gpu` from a source tree, with only torch, Triton and transformers there."""

import sys

from spikingbrain import InputError
from spikingbrain.bench import gpu
from spikingbrain.commands.bench import run_suite

if __name__ == "__main__":
    try:
        run_suite(gpu, "gpu", sys.argv[1:])
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
