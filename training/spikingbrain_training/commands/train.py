"""Train or resume one run: a YAML file, and settings a.b=c that replace what it says.

Alone it starts parallel.processes workers on this machine; under torchrun, deepspeed or accelerate it is one of theirs.
"""

import argparse
import os
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [a.b=c ...] [--dry-run]."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, as in configs/train")
    parser.add_argument("settings", nargs="*", metavar="a.b=c", help="settings that replace those of the file")
    parser.add_argument("--dry-run", action="store_true", help="say what the run would take and stop")


def run(args: argparse.Namespace) -> None:
    """Check everything that can be checked first, then train."""
    from ..config import load_train_config
    from ..launch import launch
    from ..run import begin_run
    from ..train import Interrupted, train

    config = load_train_config(args.config, args.settings)
    processes = int(os.environ.get("WORLD_SIZE", config.parallel.processes))
    config.accumulation(processes)
    if args.dry_run:
        from ..plan import describe, plan

        sys.stdout.write(describe(plan(config, processes)) + "\n")
        return
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stdout.write(begin_run(config) + "\n")
        sys.stdout.flush()
    if (config.out / "model").exists():
        return
    if "RANK" in os.environ or config.parallel.processes == 1:
        try:
            train(config)
        except Interrupted as stopped:
            raise KeyboardInterrupt from stopped
    else:
        launch(config)
