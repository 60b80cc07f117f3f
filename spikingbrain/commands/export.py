"""Export a model for others: under a family's own names, or as it is with the code that AutoModel needs to find us.

Without --family the result loads by AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True) wherever this
package is installed, also where nothing imports it.
"""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL OUT [--family]."""
    from .. import registry

    parser.add_argument("model", metavar="MODEL", help="model directory of this project")
    parser.add_argument("out", metavar="OUT", help="directory to write; must not exist or be empty")
    parser.add_argument("--family", choices=registry.names("families"), help="whose names and config to write")


def run(args: argparse.Namespace) -> None:
    """Export and say as what."""
    from ..interchange import export

    export(args.model, args.out, args.family)
    sys.stdout.write(f"{args.out}: exported{f' as {args.family}' if args.family else ''}\n")
