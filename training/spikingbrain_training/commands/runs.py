"""Look at runs: `runs list DIR ...`, `runs compare RUN ...`, `runs export RUN[@STEP] OUT`."""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """list, compare, export."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listed = actions.add_parser("list", help="the runs that directories hold")
    listed.add_argument("folders", nargs="*", type=Path, default=[Path()], metavar="DIR")
    compared = actions.add_parser("compare", help="runs side by side and the settings in which they differ")
    compared.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    compared.add_argument("--plot", type=Path, metavar="FILE", help="picture of the losses to write (.svg, .png, .pdf)")
    exported = actions.add_parser("export", help="a model directory from a checkpoint")
    exported.add_argument("run", metavar="RUN[@STEP]", help="without a step: the newest whole checkpoint")
    exported.add_argument("out", type=Path, metavar="OUT", help="directory to write; must not exist or be empty")


def run(args: argparse.Namespace) -> None:
    """Do it and say what was found."""
    if args.action == "export":
        from ..directory import named_step
        from ..export import export

        run, step = named_step(args.run)
        export(run, step, args.out)
        sys.stdout.write(f"{args.out}: the model of {run} after step {step}\n")
        return
    from ..comparison import differences, find_runs, plot, table

    runs = find_runs(args.folders if args.action == "list" else args.runs)
    sys.stdout.write(table(runs) + "\n")
    if args.action == "compare":
        sys.stdout.write(differences(runs) + "\n")
        if args.plot:
            plot(runs, args.plot)
