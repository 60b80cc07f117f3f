"""Convert a Hugging Face Transformer (Qwen2, Qwen2.5, Qwen3, Llama, Mistral) to a linear or hybrid model.

Weights are copied; what a mixer needs besides is initialised and listed in OUT/conversion.json.
"""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """BASE OUT --mixers ..."""
    parser.add_argument("base", metavar="BASE", help="model directory with config.json and safetensors")
    parser.add_argument("out", metavar="OUT", help="directory to write; must not exist or be empty")
    parser.add_argument(
        "--mixers", default="gla,sliding_window", help="pattern of token mixers, repeated over the layers"
    )
    parser.add_argument("--window", type=int, help="tokens a window layer sees (default: the base's window, or 4096)")
    parser.add_argument(
        "--sinks", type=int, default=0, help="learned sinks that every token of an attention layer sees"
    )
    parser.add_argument(
        "--tied-gate", action="store_true", help="gla: decay 1 - sigmoid(k) instead of a gate of its own"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the new parameters")


def run(args: argparse.Namespace) -> None:
    """Convert and say what was copied and what is new."""
    from ..convert import convert

    report = convert(
        args.base,
        args.out,
        args.mixers.split(","),
        window=args.window,
        seed=args.seed,
        num_sinks=args.sinks,
        gate={"tied": True} if args.tied_gate else None,
    )
    sys.stdout.write(
        f"{args.out}: {report['num_parameters']:,} parameters, {report['num_copied_tensors']} tensors copied, "
        f"{len(report['new_parameters'])} new ({report['num_new_parameters']:,} parameters)\n"
    )
