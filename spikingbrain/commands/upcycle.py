"""Turn a dense model into one with experts: feed-forward blocks copied to every expert, a new router before them.

A token is sent to k of N routed experts and to all shared ones. OUT/upcycling.json says what was made and how far the
output of each layer is from the dense one while the router favours no expert.
"""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DENSE OUT --experts N --top-k K --shared S --scale exact|paper"""
    parser.add_argument("dense", metavar="DENSE", help="model directory of this project")
    parser.add_argument("out", metavar="OUT", help="directory to write; must not exist or be empty")
    parser.add_argument("--experts", type=int, default=16, metavar="N", help="routed experts a layer")
    parser.add_argument("--top-k", type=int, default=1, metavar="K", help="routed experts a token is sent to")
    parser.add_argument("--shared", type=int, default=1, metavar="S", help="experts every token is sent to")
    parser.add_argument(
        "--scale",
        default="exact",
        choices=("exact", "paper"),
        help="divide by S + K/N the down projection, or by its cube root gate, up and down",
    )
    parser.add_argument(
        "--layers", type=_numbers, metavar="I,J,...", help="layers from 0 that get experts (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the routers")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def run(args: argparse.Namespace) -> None:
    """Write the model and say how large it is and how far from the dense one."""
    from ..upcycle import upcycle

    moe = {"num_experts": args.experts, "top_k": args.top_k, "num_shared": args.shared}
    report = upcycle(args.dense, args.out, moe, scale=args.scale, layers=args.layers, seed=args.seed)
    sys.stdout.write(
        f"{args.out}: {report['num_parameters']:,} parameters, {report['num_active_parameters']:,} active on a token; "
        f"experts in {len(report['layers'])} layers; with an even router their outputs differ from the dense ones by "
        f"at most {report['max_relative_error']:.2g} (relative RMS, scale {args.scale})\n"
    )
