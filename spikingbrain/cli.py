"""The console script: finds its subcommands through entry points, so the library imports nothing above it.

A command is a module with a docstring (its help), `add_arguments(parser)` and `run(args)`; heavy imports go into `run`.
"""

import argparse
import errno
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points, version
from types import ModuleType

from .errors import InputError

GROUP = "spikingbrain.commands"
REPORTED_OS_ERRORS = {errno.ENOSPC, errno.EADDRINUSE, errno.EACCES, errno.EDQUOT, errno.EROFS}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default, except None: there the text itself says what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def load_commands() -> dict[str, ModuleType]:
    """Every installed subcommand by name."""
    return {entry.name: entry.load() for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}


def build_parser(commands: dict[str, ModuleType]) -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(prog="spikingbrain", description="Spiking, linear-attention language models.")
    parser.add_argument("--version", action="version", version=version("spikingbrain"))
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in commands.items():
        text = (module.__doc__ or "").strip()
        subparser = subparsers.add_parser(name, help=text.partition("\n")[0], description=text, formatter_class=_Help)
        module.add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Exit codes: 0, 2 for bad input, 130 for Ctrl-C."""
    commands = load_commands()
    args = build_parser(commands).parse_args(argv)
    try:
        commands[args.command].run(args)
    except InputError as error:
        return _fail(error)
    except OSError as error:
        if error.errno not in REPORTED_OS_ERRORS:
            raise
        return _fail(error)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return 0


def _fail(error: Exception) -> int:
    sys.stderr.write(f"error: {error}\n")
    return 2
