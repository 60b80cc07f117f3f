"""Turn spikes on in a model: the same weights, its projections driven by integer spike counts."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DIR OUT --neuron ... --code ..."""
    from .. import registry

    parser.add_argument("model", metavar="DIR", help="model directory of this project")
    parser.add_argument("out", metavar="OUT", help="directory to write; must not exist or be empty")
    parser.add_argument("--neuron", default="adaptive", choices=registry.names("neurons"), help="how activations fire")
    parser.add_argument("--k", type=float, default=3.0, help="adaptive: the mean count of a channel")
    parser.add_argument("--code", default="bitwise", choices=registry.names("codes"), help="how counts become spikes")
    parser.add_argument("--exclude", nargs="*", default=[], metavar="NAME", help="projections that stay dense")


def run(args: argparse.Namespace) -> None:
    """Write the spiking model."""
    from ..convert import turn_on_spikes

    spiking = {"neuron": args.neuron, "code": args.code, "params": {"k": args.k}, "exclude": args.exclude}
    turn_on_spikes(args.model, args.out, spiking)
    sys.stdout.write(f"{args.out}: spikes on ({args.neuron}, k = {args.k:g}, code {args.code})\n")
