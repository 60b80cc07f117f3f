"""Measure ops, decoding, prefill, memory or a GPU on this machine, with peers in the same run."""

import argparse
import datetime
import shlex
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

GROUP = "spikingbrain.benchmarks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SUITE [OPTIONS OF THE SUITE]"""
    suites = sorted(entry.name for entry in entry_points(group=GROUP))
    parser.add_argument("suite", choices=suites, help="what to measure")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="the suite's own options; try --help there")


def run(args: argparse.Namespace) -> None:
    """Run one suite, print its table and write its files."""
    (entry,) = entry_points(group=GROUP, name=args.suite)
    run_suite(entry.load(), args.suite, args.options)


def run_suite(suite: Any, name: str, options: list[str]) -> None:
    """The same for a suite's module."""
    import torch

    from .. import bench
    from ..bench import report

    parser = argparse.ArgumentParser(prog=f"spikingbrain bench {name}", description=suite.__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads")
    parser.add_argument("--out", metavar="DIR", help="default: benchmarks/results/MACHINE-DATE")
    suite.add_arguments(parser)
    own = parser.parse_args(options)
    torch.set_num_threads(own.threads)
    rows = suite.run(own)
    machine = getattr(suite, "machine", bench.machine)()
    folder = Path(own.out or f"benchmarks/results/{machine}-{datetime.date.today().isoformat()}")
    report.write(folder, name, shlex.join(["spikingbrain", "bench", name, *options]), rows)
    sys.stdout.write(report.table(rows) + f"\nwritten to {folder}\n")
