"""The command ``kdkernels``, also ``python -m kdkernels``.

Its commands are in ``kdkernels.commands``, on Typer and rich. Where these are not installed, ``--version`` and ``env``
work all the same: they are what a report of a fault needs.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Optional

from kdkernels import __version__

NEEDS = "this command needs the packages typer and rich: pip install typer rich"
HELP = """Usage: kdkernels [OPTIONS] COMMAND [ARGS]...

Fused distillation losses for PyTorch.

  --version      Print the version.
  env [--json]   Say what is installed, and which backend runs what.

With the packages typer and rich (pip install typer rich):

  bench          Time loss and gradient on this machine.
  check          Hold loss and gradient on this machine against fp64.
  cache          Look into a teacher cache, or write one."""


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run a command; return the exit status.

    It is 0, 1 where something is wrong or missing, 2 for wrong usage, and 130 after an interrupt.
    """
    try:
        status = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads on, as behind "| head"; the interpreter flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _run(given: list[str]) -> int:
    if given == ["--version"]:
        print(f"kdkernels {__version__}")
        return 0
    if given in (["env"], ["env", "--json"]):
        return _env(given[1:] == ["--json"])
    if not all(importlib.util.find_spec(package) for package in ("typer", "rich")):
        if given in ([], ["--help"], ["-h"]):
            print(HELP)
            return 0 if given else 2
        print(f"kdkernels: {NEEDS}", file=sys.stderr)
        return 1
    from kdkernels.commands import app

    try:
        app(args=given, prog_name="kdkernels")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except ImportError as error:
        # Errors that say which packages to install are made by hand, and name no module.
        if error.name is not None:
            raise
        print(f"kdkernels: {error}", file=sys.stderr)
        return 1
    return 0


def _env(as_json: bool) -> int:
    try:
        from kdkernels import env
    except ImportError as error:
        print(f"kdkernels: {error}", file=sys.stderr)
        return 1
    print(env.to_json() if as_json else env.report())
    return 0
