"""The command line `python -m jaxmoe COMMAND`: one module per command, imported when asked for.

A command's module has `add_arguments(parser)` and `run(args) -> int`, the exit code. Nothing here
imports JAX: a command decides itself in which process it does.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "launch": ("jaxmoe.cli.launch", "run a script in several processes, one for each GPU"),
    "doctor": ("jaxmoe.cli.doctor", "show what this machine has and which transports work"),
    "bench": ("jaxmoe.cli.bench", "measure dispatch and combine on this machine"),
    "estimate": ("jaxmoe.cli.estimate", "bytes, memory and floor times of a model on a machine"),
    "simulate": ("jaxmoe.cli.simulate", "compare placements of experts under a load over time"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, without the program's name; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    asked = next((word for word in words if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(
        prog="python -m jaxmoe", description="Command line of jaxmoe.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, allow_abbrev=False)
        if name == asked:
            module = importlib.import_module(module_name)
            command.description = module.__doc__
            command.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(words)
    return int(args.run(args))
