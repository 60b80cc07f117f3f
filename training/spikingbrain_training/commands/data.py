"""Build token shards from text: `data build SRC ... OUT --tokenizer DIR`."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Build SRC ... OUT."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("build", help="tokenise text, JSON lines, Parquet or datasets directories")
    build.add_argument("sources", nargs="+", metavar="SRC", help="files, or directories of them")
    build.add_argument("out", metavar="OUT", help="directory to write; must not exist or be empty")
    build.add_argument("--tokenizer", required=True, metavar="DIR", help="directory with the tokenizer")
    build.add_argument("--glob", default="*", help="which files of a directory")
    build.add_argument("--field", help="field of a record that holds its text or messages (default: messages or text)")
    build.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenise")


def run(args: argparse.Namespace) -> None:
    """Build and say how much there is."""
    from ..build import build
    from ..documents import data_files

    files = data_files(args.sources, args.glob)
    index = build(files, args.tokenizer, args.out, workers=args.workers, field=args.field)
    sys.stdout.write(f"{args.out}: {index['num_tokens']:,} tokens in {index['num_documents']:,} documents\n")
