"""The command ``python -m kdkernels``, also ``kdkernels``: what is installed, and what is in a teacher cache."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from kdkernels import __version__


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run a command; return the exit status: 0, 1 for a cache that is damaged or none, 2 for wrong usage."""
    args = _parser().parse_args(arguments)
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kdkernels", description="Fused distillation losses for PyTorch.")
    parser.add_argument("--version", action="version", version=f"kdkernels {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    environment = commands.add_parser("env", help="say what is installed and which backend runs what")
    environment.set_defaults(run=_env)

    cache = commands.add_parser("cache", help="look into a teacher cache", description="Look into a teacher cache.")
    actions = cache.add_subparsers(required=True, metavar="ACTION")
    for name, run, summary, details in (
        (
            "info",
            _info,
            "print whose teacher it is, and how much of it there is",
            "Print the identity of a cache and the number and size of its shards. Reads the index only.",
        ),
        (
            "verify",
            _verify,
            "read every shard and check it",
            "Read every shard and check its size and SHA-256. Prints a line per shard; the exit status is 1 if one is "
            "missing, truncated or damaged.",
        ),
    ):
        action = actions.add_parser(name, help=summary, description=details)
        action.add_argument("folder", metavar="DIR", type=Path, help="the folder of the cache")
        action.set_defaults(run=run)
    return parser


def _env(args: argparse.Namespace) -> int:
    from kdkernels import env

    print(env.report())
    return 0


def _info(args: argparse.Namespace) -> int:
    from kdkernels.cache.errors import CacheError
    from kdkernels.cache.index import Index

    try:
        index = Index.read(args.folder)
    except CacheError as error:
        return _failed(error)
    tokens = sum(shard.tokens for shard in index.shards)
    size = sum(shard.bytes for shard in index.shards)
    facts = {
        "teacher": index.identity.teacher or "(no name)",
        "tokenizer": index.identity.tokenizer,
        "vocabulary": f"{index.identity.vocab_size:,}",
        **_of_kind(index),
        "temperature": f"{index.identity.temperature:g}",
        "extras": ", ".join(f"{name} ({dtype})" for name, dtype in index.extras.items()) or "none",
        "shards": f"{len(index.shards):,}",
        "sequences": f"{sum(shard.sequences for shard in index.shards):,}",
        "tokens": f"{tokens:,}",
        "bytes": f"{size:,}",
        "bytes/token": f"{size / tokens:.2f}" if tokens else "-",
    }
    print("\n".join(f"{name:<13}{fact}" for name, fact in facts.items()))
    return 0


def _of_kind(index: Any) -> dict[str, Any]:
    """What a cache of entries has, or one of expectations."""
    if not index.identity.hidden_size:
        return {"top-k": index.identity.k, "tail": "yes" if index.tail else "no"}
    return {
        "expectation": f"{index.identity.hidden_size:,} ({index.dtype})",
        "head": index.identity.head,
        "bias": "yes" if index.bias else "no",
    }


def _verify(args: argparse.Namespace) -> int:
    from kdkernels.cache.errors import CacheError
    from kdkernels.cache.index import Index, check_sha256

    try:
        index = Index.read(args.folder)
    except CacheError as error:
        return _failed(error)
    damaged = 0
    for shard in index.shards:
        try:
            check_sha256(args.folder, shard)
            print(f"{shard.file}  ok")
        except CacheError as error:
            damaged += 1
            print(f"{shard.file}  {type(error).__name__}: {error}")
    print(f"{len(index.shards)} shards, {damaged} damaged")
    return 1 if damaged else 0


def _failed(error: Exception) -> int:
    print(f"kdkernels: {type(error).__name__}: {error}", file=sys.stderr)
    return 1
