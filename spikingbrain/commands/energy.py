"""Count operations, bytes and picojoules a token, and print every reading of "sparsity" beside the paper's.

The picojoules are an estimate under named constants (see --set); nothing is measured on a chip.
"""

import argparse
import sys
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DIR --text PATH ... --set NAME=PICOJOULES"""
    parser.add_argument("model", metavar="DIR", help="spiking model directory")
    parser.add_argument("--text", nargs="+", required=True, metavar="PATH", help="text files, or directories of them")
    parser.add_argument("--glob", default="*", help="which files of a directory")
    parser.add_argument("--context", type=int, default=256, help="tokens a piece")
    parser.add_argument("--num-texts", type=int, default=16, help="pieces of text to count on")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=PICOJOULES", help="change constants")
    parser.add_argument("--json", metavar="FILE", help="write all figures here")


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    from ..energy import Constants
    from ..evaluation import spiking_figures, text_files
    from ..files import write_json

    constants = Constants().changed(args.set)
    files = text_files(args.text, args.glob)
    figures = spiking_figures(args.model, files, constants, context=args.context, num_texts=args.num_texts)
    for lines in (_table(figures["energy"]), _readings(figures["readings"]), _kinds(figures["kinds"])):
        sys.stdout.write("\n".join(lines) + "\n\n")
    if args.json:
        write_json(args.json, figures)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"Energy a token, estimated ({rows[0]['parameters']:,} weights that spikes can reach)"]
    lines.append(f"{'network':<32}{'MACs':>12}{'adds':>12}{'weight bytes':>14}{'compute pJ':>13}{'with memory':>13}")
    for row in rows:
        numbers = f"{row['macs']:>12,.0f}{row['adds']:>12,.0f}{row['weight_bytes']:>14,.0f}"
        lines.append(f"{row['network']:<32}{numbers}{row['compute']:>13,.0f}{row['total']:>13,.0f}")
    return lines


def _readings(columns: dict[str, dict[str, float]]) -> list[str]:
    from ..statistics import PAPER

    lines = [
        f'Readings of sparsity; SpikingBrain-7B at k = 3 has {PAPER["sparsity"]:.2%} "sparsity", '
        f"{PAPER['silent_channels']:.1%} silent channels and {PAPER['mean_spikes']} spikes a channel.",
        "These three do not follow from one another: 1 - 1.13 / 3 is 62.3 %, 1 - 1.13 / 4 is 71.8 %.",
        f"{'':<34}" + "".join(f"{name:>16}" for name in columns),
    ]
    for reading in next(iter(columns.values())):
        lines.append(f"{reading:<34}" + "".join(f"{figures[reading]:>16.4f}" for figures in columns.values()))
    return lines


def _kinds(kinds: dict[str, dict[str, float]]) -> list[str]:
    lines = [f"{'tokens':<14}{'number':>8}{'silent':>9}{'spikes':>9}"]
    for name, row in kinds.items():
        lines.append(f"{name:<14}{row['tokens']:>8}{row['silent_channels']:>9.3f}{row['mean_spikes']:>9.3f}")
    return lines
