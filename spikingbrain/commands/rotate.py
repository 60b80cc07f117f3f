"""Turn a model's residual stream along its principal axes: the same function, and more silence at the same cost."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DIR OUT --text ... --glob ... --num-texts N --context N"""
    parser.add_argument("model", metavar="DIR", help="model directory of this project, without spikes")
    parser.add_argument("out", metavar="OUT", help="directory to write; must not exist or be empty")
    parser.add_argument("--text", nargs="+", metavar="PATH", required=True, help="text files, or directories of them")
    parser.add_argument("--glob", default="*", help="which files of a directory")
    parser.add_argument("--num-texts", type=int, default=128, help="pieces of text to measure on")
    parser.add_argument("--context", type=int, default=256, help="tokens a piece")


def run(args: argparse.Namespace) -> None:
    """Write the rotated model."""
    from ..evaluation import text_files
    from ..rotation import LARGEST, rotate

    texts = text_files(args.text, args.glob)
    shares = rotate(args.model, args.out, texts, num_texts=args.num_texts, context=args.context)
    sys.stdout.write(f"{args.out}: energy of a token in {LARGEST:.0%} of its channels, before and after\n")
    for name, (before, after) in shares.items():
        sys.stdout.write(f"  {name}: {before:.1%} {after:.1%}\n")
