"""`bittrue convert`: checkpoints between names and precisions, and random ones from a preset."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from bittrue.errors import UsageError
from bittrue.model.convert import open_source, to_hf, to_official
from bittrue.model.export import DEFAULT_SHARD_BYTES
from bittrue.model.inventory import DraftKind
from bittrue.model.presets import Precision, make_checkpoint


def convert(
    first: Path,
    second: Path | None = None,
    /,
    *,
    to: Literal["official", "hf"] = "official",
    precision: Precision | None = None,
    random: Annotated[int | None, Parameter(name="--random")] = None,
    preset: str = "tiny",
    draft: DraftKind = "none",
    vocab_size: int | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Convert a checkpoint: `bittrue convert SOURCE OUT`; or make one: `bittrue convert OUT --random SEED`.

    Parameters
    ----------
    first:
        The checkpoint to read, with official names or those of transformers. With --random: the one to write.
    second:
        The directory to write; it must not exist or be empty.
    to:
        Tensor names to write: official, or those of transformers' state_dict.
    precision:
        f32, bf16, fp8 (everywhere) or fp4 (experts; fp8 elsewhere). Default: as the source, or bf16 with
        --random. FP4 to FP8 is exact or refused.
    random:
        Make a random checkpoint from this seed instead of reading one.
    preset:
        With --random: tiny, t256, t512h, s1024 or flash4.
    draft:
        With --random: add a draft module, mtp or dspark.
    vocab_size:
        With --random: number of token ids; 129280 takes the real tokenizer.
    max_shard_bytes:
        Largest file to write, in bytes; above it the weights are split and indexed.
    """
    if max_shard_bytes < 1:
        raise UsageError(f"--max-shard-bytes is {max_shard_bytes}; it must be at least 1")
    if random is not None:
        if second is not None or to != "official":
            raise UsageError("with --random give one directory, the one to write, and official names")
        if random < 0:
            raise UsageError(f"--random is {random}; a seed must be at least 0")
        sizes: dict[str, Any] = {} if vocab_size is None else {"vocab_size": vocab_size}
        limits: dict[str, Any] = {"draft": draft, "max_shard_bytes": max_shard_bytes}
        with _writing(first):
            print(make_checkpoint(preset, random, precision or "bf16", first, **limits, **sizes))
        return
    if second is None:
        raise UsageError("give two directories, SOURCE and OUT, or --random SEED and OUT")
    if to == "hf" and precision is not None:
        raise UsageError("transformers' names hold unpacked weights only; leave --precision out with --to hf")
    with _writing(second):
        print(_convert_files(first, second, to, precision, max_shard_bytes))


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """A folder that cannot be written, or a full disk, is the caller's to mend: UsageError."""
    try:
        yield
    except OSError as error:
        fact = f"cannot write {out}: {error.strerror or error}"
        raise UsageError(f"{fact}; choose another directory") from error


def _convert_files(
    source: Path,
    out: Path,
    to: Literal["official", "hf"],
    precision: Precision | None,
    max_shard_bytes: int,
) -> Path:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        reading = bars.add_task("reading", total=None)
        writing = bars.add_task("writing", total=None, start=False)

        def read(done: int, total: int, name: str) -> None:
            bars.update(reading, completed=done, total=total)

        def wrote(done: int, total: int, name: str) -> None:
            bars.start_task(writing)
            bars.update(writing, completed=done, total=total)

        opened = open_source(source, progress=read)
        if to == "hf":
            return to_hf(opened, out, max_shard_bytes=max_shard_bytes, progress=wrote)
        return to_official(opened, out, precision=precision, max_shard_bytes=max_shard_bytes, progress=wrote)
