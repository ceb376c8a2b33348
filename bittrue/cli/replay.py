"""`bittrue replay RUN STEP`: runs recorded steps again and compares the weights."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bittrue.obs.log import Log
from bittrue.rl.replay_step import Replayed, StepReplay
from bittrue.train.progress import step_bar

EXIT_DIFFERS = 1


def replay(
    run: Path,
    steps: Annotated[Sequence[int], Parameter(help="Steps, counted from 0.")],
    /,
) -> int:
    """Compute steps of the run in directory RUN again from their records, without sampling, and compare the
    new weights with those the run went on with, byte for byte (law L10).

    Exit code 0: the same; 1: they differ; 4: a record was not sampled by these weights.

    Parameters
    ----------
    run:
        Directory that `bittrue rl` wrote.
    """
    log = Log(sys.stderr, "warning")
    replayed = StepReplay(run, log)
    found = [_replayed(replayed, step, log) for step in steps]
    for each in found:
        print(_line(each))
    return 0 if all(each.is_same for each in found) else EXIT_DIFFERS


def _replayed(replayed: StepReplay, step: int, log: Log) -> Replayed:
    bar = step_bar(log)
    task = bar.add_task("replay", total=step + 1, completed=0, shown="")

    def tell(number: int) -> None:
        bar.update(task, completed=number, shown=f"step {number}")

    with bar:
        return replayed.run(step, tell=tell)


def _line(found: Replayed) -> str:
    if found.is_same:
        return f"step {found.step}: same weights, {found.weights} (masters and optimiser {found.masters})"
    return (
        f"step {found.step}: DIFFERENT weights: computed {found.weights}, recorded {found.recorded_weights}; "
        f"masters and optimiser {found.masters}, recorded {found.recorded_masters}"
    )
