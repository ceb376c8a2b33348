"""`bittrue bench cache | agent | speculation | recovery`: what is gained by what is kept and guessed."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from bittrue.bench.agent import Session, bench_session
from bittrue.bench.cache import FirstTokens
from bittrue.bench.cache_bytes import CachedBytes, of_shape
from bittrue.bench.cache_cost import CacheCost
from bittrue.bench.engines import Model
from bittrue.bench.recovery import Recovery
from bittrue.bench.result import Benchmark, Label, Measurement
from bittrue.bench.speculation import Speculation
from bittrue.bench.speculation_tasks import TaskSpeculation
from bittrue.cli.bench import Json, Seed, Threads, plain_table, show
from bittrue.config.run import RunConfig
from bittrue.engine.assembly import numerics
from bittrue.errors import UsageError

Folder = Annotated[
    Path | None,
    Parameter(help="Where the folder of the disk cache is made, and removed; default: the system's."),
]
Rounds = Annotated[int, Parameter(help="Rounds in which what is compared has its turn.")]


def cache(
    model: Path,
    *,
    tokens: Annotated[int, Parameter(help="Tokens of the long prompt.")] = 32768,
    rounds: Rounds = 3,
    shapes: Annotated[str, Parameter(help="By comma: config.json files whose bytes to tell, too.")] = "",
    folder: Folder = None,
    threads: Threads = 0,
    seed: Seed = 0,
    json: Json = False,
) -> int:
    """Measure what the prefix cache gains and costs with MODEL: time to the first token of a long prompt cold
    and from each tier (in this process and over HTTP), bytes per cached token under each strategy, and what
    it adds to prefill and decode that gain nothing."""
    story = Console(stderr=True)
    with story.status("starting") as status, _temporary(folder) as place:
        loaded = Model.of(model)
        given: dict[str, Any] = {"model": loaded, "tell": status.update, "threads": threads, "seed": seed}
        first = FirstTokens(folder=place / "first", tokens=tokens, rounds=rounds, **given)
        sizes = CachedBytes(folder=place / "bytes", tokens=tokens, **given)
        cost = CacheCost(folder=place / "cost", **given)
        found = [*first.run(), *first.over_http(), *sizes.run(), *cost.run()]
        for path in filter(None, shapes.split(",")):
            found += of_shape(Path(path))
    _show(story, "cache", loaded, {"tokens": tokens, "threads": threads, "seed": seed}, found, json)
    return 0


def agent(
    model: Path,
    *,
    turns: Annotated[int, Parameter(help="Questions with their answers.")] = 20,
    system: Annotated[int, Parameter(help="Tokens before the first question.")] = 4096,
    threads: Threads = 0,
    seed: Seed = 0,
    json: Json = False,
) -> int:
    """Measure a session of an agent with MODEL in this process, with the prefix cache and without it: the
    share of its prompts' tokens that were not computed again, and the time. It calls tools, branches once,
    and now and then edits its history.

    Exit code 4 when an answer differs.
    """
    story = Console(stderr=True)
    session = Session(turns=turns, system=system, seed=seed)
    with story.status("starting") as status:
        loaded = Model.of(model)
        found = list(bench_session(loaded, session, threads=threads, tell=status.update))
    config: dict[str, Label] = {"turns": turns, "system": system, "threads": threads, "seed": seed}
    _show(story, "agent", loaded, config, found, json)
    return 0


def speculation(
    model: Path,
    *,
    prompt_tokens: int = 512,
    output_tokens: int = 256,
    tasks: Annotated[
        int, Parameter(help="In place of those texts: so many held-out problems of every task, batch 1.")
    ] = 0,
    rounds: Rounds = 5,
    threads: Threads = 0,
    seed: Seed = 0,
    json: Json = False,
) -> int:
    """Measure what drafts gain with MODEL in this process: decode speed against none, and acceptance by
    place, over texts that repeat and texts that do not, batch 1 and 8; with its draft module, if it has one.

    Exit code 4 when drafts change a text.
    """
    story = Console(stderr=True)
    with story.status("starting") as status:
        loaded = Model.of(model)
        given: dict[str, Any] = {"model": loaded, "tell": status.update, "threads": threads, "seed": seed}
        sizes: dict[str, Any] = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
        if tasks:
            bench: Speculation | TaskSpeculation = TaskSpeculation(count=tasks, rounds=rounds, **given)
        else:
            bench = Speculation(rounds=rounds, **sizes, **given)
        found = list(bench.run())
    config: dict[str, Label] = {"tasks": tasks, "rounds": rounds} if tasks else {**sizes}
    _show(story, "speculation", loaded, {**config, "threads": threads, "seed": seed}, found, json)
    return 0


def recovery(
    model: Path,
    *,
    streams: Annotated[str, Parameter(help="Numbers of open streams, by comma.")] = "1,32",
    prompt_tokens: int = 1024,
    output_tokens: int = 512,
    rounds: Rounds = 3,
    folder: Folder = None,
    threads: Threads = 0,
    seed: Seed = 0,
    json: Json = False,
) -> int:
    """Measure recovery of a server of MODEL whose engine process is killed: time to the next token of every
    open stream, with a disk cache and without."""
    story = Console(stderr=True)
    with story.status("starting") as status, _temporary(folder) as place:
        loaded = Model.of(model)
        bench = Recovery(
            model=model,
            vocab=loaded.vocab_size,
            folder=place,
            tell=status.update,
            streams=parse_streams(streams),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            rounds=rounds,
            threads=threads,
            seed=seed,
        )
        found = list(bench.run())
    config: dict[str, Label] = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
    _show(story, "recovery", loaded, {**config, "threads": threads, "seed": seed}, found, json)
    return 0


def parse_streams(text: str) -> tuple[int, ...]:
    """``"1,32"`` -> (1, 32). Raises UsageError."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UsageError(f"--streams is {text!r}; write numbers by comma, such as 1,32") from None


@contextmanager
def _temporary(parent: Path | None) -> Iterator[Path]:
    """A folder for the time of the measurement. Raises UsageError where none can be made."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="bittrue-bench-", dir=parent)
    except OSError as error:
        raise UsageError(f"cannot make a folder in {parent}: {error}; choose another --folder") from error
    with folder as place:
        yield Path(place)


def _show(
    story: Console,
    benchmark: Benchmark,
    model: Model,
    config: dict[str, Label],
    found: Sequence[Measurement],
    json: bool,
) -> None:
    level, act = numerics(
        RunConfig.model_validate({"model": str(model.directory)}), model.loaded.checkpoint.config
    )
    chosen: dict[str, Label] = {"model": model.directory.name, "level": level, "act": act, **config}
    chosen["threads"] = chosen["threads"] or os.cpu_count() or 1
    chosen["weight_version"] = model.loaded.weight_version
    show(story, benchmark, chosen, found, plain_table(found), json=json)
