"""Build token shards from text: `data build SRC ... OUT --tokenizer DIR`."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Build SRC ... OUT."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("build", help="tokenise text files, one document each")
    build.add_argument("sources", nargs="+", metavar="SRC", help="text files, or directories of them")
    build.add_argument("out", metavar="OUT", help="directory to write; must not exist or be empty")
    build.add_argument("--tokenizer", required=True, metavar="DIR", help="directory with the tokenizer")
    build.add_argument("--glob", default="*", help="which files of a directory")


def run(args: argparse.Namespace) -> None:
    """Build and say how much there is."""
    from spikingbrain.checkpoint import load_tokenizer
    from spikingbrain.evaluation import text_files

    from ..data import build

    index = build(text_files(args.sources, args.glob), load_tokenizer(args.tokenizer), args.out)
    sys.stdout.write(f"{args.out}: {index['num_tokens']:,} tokens in {index['num_documents']:,} documents\n")
