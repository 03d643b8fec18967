"""The commands of ``kdkernels``. rich draws their output on a terminal; anywhere else it is plain lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table

from kdkernels import __version__

app = typer.Typer(
    help="Fused distillation losses for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
cache = typer.Typer(help="Look into a teacher cache, or write one.", no_args_is_help=True)
app.add_typer(cache, name="cache")


class DType(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"

    @property
    def torch(self) -> Any:
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.value]


def _device(name: Optional[str]) -> Optional[str]:
    """A device that tensors can be made on here."""
    if name is not None:
        import torch

        try:
            torch.empty(0, device=name)
        # Of a build without the device, and of a name that is none.
        except (AssertionError, RuntimeError) as error:
            said = str(error).partition("\n")[0].partition(" device type at start")[0]
            raise typer.BadParameter(f"{name!r} is no device that this torch can use: {said}") from error
    return name


Device = Annotated[
    Optional[str],
    typer.Option(callback=_device, help="cpu, cuda, cuda:1; by default the GPU where there is one."),
]
Shapes = Annotated[
    list[str], typer.Option("--shape", metavar="NxV", help="Tokens and vocabulary; may be given several times.")
]
DTypes = Annotated[list[DType], typer.Option("--dtype", help="Of the logits; may be given several times.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON in place of a table.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the cache.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"kdkernels {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def env(as_json: AsJson = False) -> None:
    """Say what is installed, and which backend runs what."""
    from kdkernels import cli

    raise typer.Exit(cli._env(as_json))


@app.command()
def bench(
    shape: Shapes = ["512x32000"],  # noqa: B006
    dtype: DTypes = [DType.fp32, DType.bf16],  # noqa: B006
    divergence: Annotated[str, typer.Option(help="A name, such as forward_kl or jsd.")] = "forward_kl",
    device: Device = None,
    rounds: Annotated[int, typer.Option(min=3, help="Of which the median is taken.")] = 21,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="torch.compile too, which compiles.")] = True,
    as_json: AsJson = False,
) -> None:
    """Time loss and gradient on this machine: eager PyTorch, torch.compile, kdkernels.

    Each result is first held against fp64. The exit status is 1 where one of them is wrong, and nothing is timed then.
    """
    from kdkernels import bench as timing

    found = []
    for rows, vocab_size in map(_shape, shape):
        for item in dtype:
            with _refused(timing.WrongResult, ValueError, RuntimeError, MemoryError):
                # A line and no spinner: that would be drawn by a thread beside what is timed.
                if sys.stderr.isatty():
                    print(f"timing {rows:,} x {vocab_size:,} {item.value} ...", file=sys.stderr)
                result = timing.run(
                    rows,
                    vocab_size,
                    item.torch,
                    divergence=divergence,
                    device=device,
                    rounds=rounds,
                    compiled=compiled,
                )
            found.append(result)
            if not as_json:
                _draw(result)
    if as_json:
        print(json.dumps([result.to_dict() for result in found], indent=1))


@app.command()
def check(
    shape: Shapes = ["64x32000"],  # noqa: B006
    dtype: DTypes = [DType.fp32, DType.bf16],  # noqa: B006
    divergence: Annotated[
        Optional[list[str]], typer.Option(help="Names; all by default. May be given several times.")
    ] = None,
    temperature: float = 2.0,
    device: Device = None,
    backend: Annotated[str, typer.Option(help="auto, cpu, cuda, triton or torch.")] = "auto",
) -> None:
    """Hold loss and gradient of kd_loss on this machine against fp64, with eager PyTorch's error as the bar.

    The exit status is 1 where one is worse.
    """
    from kdkernels import divergences, testing
    from kdkernels.bench import default_device

    names = divergence or list(divergences.names())
    failed, count = [], 0
    for rows, vocab_size in map(_shape, shape):
        for item in dtype:
            with _refused(RuntimeError, MemoryError):
                inputs = testing.make_inputs("normal", rows, vocab_size, item.torch)
                student, teacher = (x.to(device or default_device()) for x in inputs)
            for name in names:
                case = f"{rows:,} x {vocab_size:,} {item.value} {name}"
                count += 1
                with _refused(ValueError, RuntimeError):
                    try:
                        testing.check_kd_loss(
                            student, teacher, divergence=name, temperature=temperature, backend=backend
                        )
                    except AssertionError as error:
                        failed.append(case)
                        print(f"{case}  WRONG: {error}")
                    else:
                        print(f"{case}  ok")
    print(f"{count} checks, {len(failed)} wrong")
    raise typer.Exit(bool(failed))


@cache.command()
def info(folder: Folder) -> None:
    """Print the identity of a cache and the number and size of its shards. Reads the index only."""
    with _refused(*_errors_of_caches()):
        for part in _parts(folder):
            print("\n".join(f"{name:<13}{fact}" for name, fact in _facts(part).items()))


@cache.command()
def verify(folder: Folder) -> None:
    """Read every shard and check its size, its SHA-256 and its place.

    Prints a line per shard; the exit status is 1 if one is missing, truncated, damaged or there twice.
    """
    shards = damaged = 0
    with _refused(*_errors_of_caches()):
        from kdkernels.cache.verify import verify as faults

        for part in _parts(folder):
            for name, fault in faults(part):
                shards += 1
                damaged += fault is not None
                print(f"{name}  {fault or 'ok'}")
    print(f"{shards} shards, {damaged} damaged")
    raise typer.Exit(bool(damaged))


@cache.command()
def capture(
    folder: Folder,
    model: Annotated[str, typer.Option(help="A causal language model for transformers: a folder or a name.")],
    data: Annotated[
        str,
        typer.Option(
            help="A .jsonl file whose lines have text or input_ids, a .txt file of a document a line, or the name of a "
            "data set for the package datasets."
        ),
    ],
    k: Annotated[int, typer.Option(min=1, help="Tokens kept at each position.")] = 64,
    temperature: Annotated[float, typer.Option(help="Of the teacher.")] = 1.0,
    length: Annotated[int, typer.Option(min=1, help="Longer sequences are cut here.")] = 2048,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    dtype: Annotated[DType, typer.Option(help="Of the model.")] = DType.bf16,
    device: Device = None,
    split: Annotated[str, typer.Option(help="Of a data set.")] = "train",
    vocab_size: Annotated[
        Optional[int], typer.Option(help="Columns that are tokens; by default the tokenizer's.")
    ] = None,
) -> None:
    """Run a teacher over texts and keep its top K log-probabilities of every token.

    A second call goes on where the first stopped.

    Under torchrun each process writes some of the shards of DIR, and the last one the index.
    """
    with _refused(*_errors_of_caches(), ValueError):
        from kdkernels.cache.capture import from_hub

        try:
            from_hub(
                folder,
                model,
                data,
                k=k,
                temperature=temperature,
                length=length,
                batch_size=batch_size,
                dtype=dtype.torch,
                device=device,
                split=split,
                vocab_size=vocab_size,
                tell=lambda line: print(line, flush=True),
            )
        except KeyboardInterrupt:
            print("kdkernels: stopped; the same call goes on", file=sys.stderr)
            raise typer.Exit(130) from None


def _errors_of_caches() -> tuple[type[Exception], ...]:
    """The errors of commands on caches, whose packages are here, or this is the end."""
    try:
        from kdkernels.cache import CacheError
        from kdkernels.cache.shared import CaptureError
    except ImportError as error:
        _fail(str(error))
    return CacheError, CaptureError, OSError


def _parts(folder: Path) -> list[Path]:
    """The folder itself, or those that the processes of a capture wrote below it."""
    return sorted(folder.glob("part-*-of-*")) or [folder]


def _facts(folder: Path) -> dict[str, Any]:
    from kdkernels.cache.index import Index

    index = Index.read(folder)
    tokens = sum(shard.tokens for shard in index.shards)
    size = sum(shard.bytes for shard in index.shards)
    return {
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


def _of_kind(index: Any) -> dict[str, Any]:
    """The facts of a cache of entries, or of one of expectations."""
    if not index.identity.hidden_size:
        return {"top-k": index.identity.k, "tail": "yes" if index.tail else "no"}
    return {
        "expectation": f"{index.identity.hidden_size:,} ({index.dtype})",
        "head": index.identity.head,
        "bias": "yes" if index.bias else "no",
    }


def _shape(text: str) -> tuple[int, int]:
    rows, _, vocab_size = text.lower().partition("x")
    if not (rows.isdigit() and vocab_size.isdigit() and int(rows) and int(vocab_size)):
        raise typer.BadParameter(f"a shape is NxV, such as 512x32000, got {text!r}", param_hint="--shape")
    return int(rows), int(vocab_size)


def _draw(result: Any) -> None:
    """Three bars, of blocks on a terminal and of # elsewhere."""
    console = Console()
    slowest = max(result.seconds.values())
    print(result.title)
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, seconds in result.seconds.items():
        width = max(1, round(32 * seconds / slowest))
        bar = "#" * width
        if console.is_terminal:
            bar = f"[{'green' if name == 'kdkernels' else 'cyan'}]{'█' * width}[/]"
        ratio = "" if name == "eager PyTorch" else f"{result.ratio(name):.1f}x"
        table.add_row(name, f"{seconds * 1e3:.2f} ms", ratio, bar)
    console.print(table)
    for reason in result.absent:
        console.print(reason)


@contextmanager
def _refused(*kinds: type[Exception]) -> Iterator[None]:
    """Ends the command with status 1 and a line where one of these errors is raised."""
    try:
        yield
    except BrokenPipeError:
        # Nobody reads on, as behind "| head": the command line ends without a word.
        raise
    except kinds as error:
        _fail(f"{type(error).__name__}: {error}")


def _fail(text: str) -> None:
    print(f"kdkernels: {text}", file=sys.stderr)
    raise typer.Exit(1)
