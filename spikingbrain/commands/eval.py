"""Measure the held-out loss of a model directory (any causal language model), and its spikes if it has any."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DIR --text PATH ..."""
    parser.add_argument("model", metavar="DIR", help="model directory")
    parser.add_argument("--text", nargs="+", required=True, metavar="PATH", help="text files, or directories of them")
    parser.add_argument("--glob", default="*", help="which files of a directory")
    parser.add_argument("--context", type=int, default=256, help="tokens a piece of a document")
    parser.add_argument("--max-tokens", type=int, default=65536, help="tokens to measure on")
    parser.add_argument("--json", metavar="FILE", help="write all figures here")


def run(args: argparse.Namespace) -> None:
    """Measure, print one line, write the figures if asked."""
    from ..evaluation import evaluate, text_files
    from ..files import write_json

    files = text_files(args.text, args.glob)
    figures = evaluate(args.model, files, context=args.context, max_tokens=args.max_tokens)
    line = f"{args.model}: {figures['loss']:.4f} nats a token over {figures['num_tokens']:,} tokens"
    if figures["spikes"]:
        overall = figures["spikes"]["overall"]
        line += f"; {overall['silent_channels']:.1%} silent channels, {overall['mean_spikes']:.2f} spikes a channel"
    sys.stdout.write(line + "\n")
    if args.json:
        write_json(args.json, figures)
