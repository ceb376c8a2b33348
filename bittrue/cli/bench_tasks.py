"""`bittrue bench tasks`: what share of held-out problems a model answers right."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from bittrue.bench.engines import Model, at_least
from bittrue.bench.report_train import share_cells
from bittrue.bench.result import Label, Measurement
from bittrue.bench.tasks import TaskBench
from bittrue.cli.bench import Json, Threads, show
from bittrue.config.run import RunConfig
from bittrue.engine.assembly import numerics
from bittrue.errors import UsageError
from bittrue.train.tasks.catalogue import TASK_NAMES, check_names
from bittrue.train.tasks.recall import MOST_TOKENS

_LEAST_PROMPT = 64  # tokens of a prompt of recall that holds some records


def tasks(
    model: Path,
    *,
    tasks: Annotated[str, Parameter(help="By comma; default: every task.")] = "",
    n: Annotated[int, Parameter(help="Problems of a task, and questions of recall at a length.")] = 1000,
    recall_tokens: Annotated[str, Parameter(help="Lengths of recall's prompts, by comma.")] = "4096,32768",
    long_n: Annotated[int, Parameter(help="Questions of recall at lengths over 32768.")] = 200,
    temperature: Annotated[float, Parameter(help="0 = greedy, and countdown also at 1.")] = 0.0,
    samples: Annotated[int, Parameter(help="Answers to a problem where they are sampled.")] = 1,
    split: Annotated[Literal["test", "validation"], Parameter(help="Which problems, none of training.")] = (
        "test"
    ),
    mtp: Annotated[bool, Parameter(help="Draft with the model's module; tells what is accepted.")] = False,
    threads: Threads = 0,
    seed: Annotated[int, Parameter(help="Seed of the problems.")] = 0,
    json: Json = False,
) -> int:
    """Ask MODEL, in this process, held-out problems of the tasks small models are trained on, and check its
    answers: the share that is right with its 95 % interval, of tool calls also the share that is well-formed.
    """
    names = tuple(dict.fromkeys(name.strip() for name in tasks.split(","))) if tasks else TASK_NAMES
    check_names(names)
    at_least(n=(n, 1), long_n=(long_n, 1), samples=(samples, 1), threads=(threads, 0))
    if not 0 <= temperature <= 100:
        raise UsageError(f"--temperature is {temperature}; choose 0 (greedy) to 100")
    lengths = parse_lengths(recall_tokens)
    story = Console(stderr=True)
    with story.status("loading") as status:
        loaded = Model.of(model)
        bench = TaskBench(
            model=loaded,
            tell=status.update,
            tasks=names,
            recall_tokens=lengths,
            count=n,
            long_count=long_n,
            temperature=temperature,
            samples=samples,
            split=split,
            seed=seed,
            speculation="mtp" if mtp else "off",
            threads=threads,
        )
        found = list(bench.run())
    run = RunConfig.model_validate({"model": str(model)})
    level, act = numerics(run, loaded.loaded.checkpoint.config)
    config: dict[str, Label] = {"model": model.name, "level": level, "act": act, "split": split, "seed": seed}
    config |= {"mtp": mtp, "threads": threads or os.cpu_count() or 1}
    config["weight_version"] = loaded.loaded.weight_version
    show(story, "tasks", config, found, task_table(found), json=json)
    return 0


def parse_lengths(text: str) -> tuple[int, ...]:
    """``"4096,32768"`` -> (4096, 32768). Raises UsageError."""
    try:
        lengths = tuple(int(word) for word in text.split(","))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < _LEAST_PROMPT or max(lengths) > MOST_TOKENS:
        wanted = f"numbers from {_LEAST_PROMPT} to {MOST_TOKENS} by comma, such as 4096,32768"
        raise UsageError(f"--recall-tokens is {text!r}; write {wanted}")
    return lengths


def task_table(found: Sequence[Measurement]) -> Table:
    """One line per share: of what, how many, how many of them, the share and its interval."""
    table = Table("task", "measure", "n", "right", "share", "95 % interval")
    for m in found:
        table.add_row(*share_cells(m))
    return table
