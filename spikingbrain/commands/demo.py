"""Show the whole way on this machine: base, conversion, training with DeepSpeed, spikes, server, report.

What was made before and is still valid is reused; an interrupted demo goes on where it stopped.
"""

import argparse
import sys
from pathlib import Path

NEXT = """
Three commands to try next:
  spikingbrain serve {work}/spike/model
  spikingbrain eval {work}/spike/model --text {work}/corpus/heldout --glob '*.py'
  spikingbrain convert PATH-TO-A-QWEN-OR-LLAMA-DIRECTORY my-model --mixers gla,sliding_window
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--base --seed --work --out."""
    parser.add_argument(
        "--base", type=Path, help="a local Qwen2, Qwen2.5, Qwen3, Llama or Mistral directory to start from"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    parser.add_argument("--work", type=Path, default=Path("demo-work"), help="where models and data go")
    parser.add_argument("--out", type=Path, default=Path("demo-report"), help="where the report goes")
    parser.add_argument("--configs", type=Path, default=Path("configs/train"), help="the demo's training configs")


def run(args: argparse.Namespace) -> None:
    """Run the stages; an unmet check is said, not hidden."""
    from ..demo.pipeline import Demo
    from ..errors import InputError

    if not args.configs.is_dir():
        raise InputError(f"{args.configs} is not there; run the demo in the repository or give --configs")
    figures = Demo(args.work, args.out, args.configs, args.seed, args.base).run()
    for check in figures["checks"]:
        sys.stdout.write(f"  {'met    ' if check['met'] else 'NOT MET'}  {check['what']}: {check['figure']}\n")
    sys.stdout.write(NEXT.format(work=args.work))
