"""Turn spikes on in a model: the same weights, its projections driven by integer spike counts."""

import argparse
import sys
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DIR OUT --neuron ... --set ... --code ... --text ... --target-silence ..."""
    from .. import registry

    parser.add_argument("model", metavar="DIR", help="model directory of this project")
    parser.add_argument("out", metavar="OUT", help="directory to write; must not exist or be empty")
    parser.add_argument("--neuron", default="adaptive", choices=registry.names("neurons"), help="how activations fire")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="the neuron's parameters, k=3 say")
    parser.add_argument("--code", default="bitwise", choices=registry.names("codes"), help="how counts become spikes")
    parser.add_argument("--exclude", nargs="*", default=[], metavar="NAME", help="projections that stay dense")
    parser.add_argument("--head", action="store_true", help="the head reads spikes too")
    parser.add_argument("--text", nargs="+", metavar="PATH", help="calibrate on text files, or directories of them")
    parser.add_argument("--glob", default="*", help="which files of a directory")
    parser.add_argument("--num-texts", type=int, default=128, help="pieces of text to calibrate on")
    parser.add_argument("--context", type=int, default=256, help="tokens a piece")
    parser.add_argument(
        "--weights", choices=["int8", "ternary"], help="round the spiking projections' weights; kept if left out"
    )
    parser.add_argument(
        "--target-silence", type=float, metavar="SHARE", help="share of the spiking projections' weights not to read"
    )


def run(args: argparse.Namespace) -> None:
    """Write the spiking model."""
    from ..calibration import turn_on_spikes
    from ..evaluation import text_files

    params = dict(map(_setting, args.set))
    spiking = {"neuron": args.neuron, "code": args.code, "params": params, "exclude": args.exclude, "head": args.head}
    thresholds = turn_on_spikes(
        args.model,
        args.out,
        spiking,
        texts=text_files(args.text, args.glob) if args.text else None,
        num_texts=args.num_texts,
        context=args.context,
        silence=args.target_silence,
        weights=args.weights,
    )
    settings = "".join(f", {name} = {value}" for name, value in params.items())
    sys.stdout.write(f"{args.out}: spikes on ({args.neuron}{settings}, code {args.code})\n")
    for name, theta in thresholds.items():
        sys.stdout.write(f"  {name}: theta {theta:.3f}\n")


def _setting(text: str) -> tuple[str, Any]:
    """`name=value`, the value a number, true, false or a word; raises `InputError`."""
    import json

    from ..errors import InputError

    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"{text!r} is no setting; write NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
