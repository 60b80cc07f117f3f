"""Import what authors released (SpikingBrain-7B, W8ASpike, MetaLA, SpikeGPT) as a directory that AutoModel loads.

The family is recognised by the files. Every tensor must have its place; W8ASpike's weights become int8.
"""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SRC OUT [--down-proj]."""
    parser.add_argument("src", metavar="SRC", help="released directory, or a bare .pth file")
    parser.add_argument("out", metavar="OUT", help="directory to write; must not exist or be empty")
    parser.add_argument(
        "--down-proj",
        choices=("code", "paper"),
        help="W8ASpike: leave down_proj dense as the authors' code computes it (the default), or as their paper says",
    )


def run(args: argparse.Namespace) -> None:
    """Import and say what it was."""
    from ..interchange import import_release

    family = import_release(args.src, args.out, down_proj=args.down_proj)
    sys.stdout.write(f"{args.out}: imported a {family} model\n")
