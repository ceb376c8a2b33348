"""Runs recorded steps again: the same new weights, byte for byte (law L10)."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bittrue.errors import CheckpointError
from bittrue.model.publication import Publisher
from bittrue.obs.log import Log
from bittrue.rl.assembly import open_side
from bittrue.rl.config import RlConfig
from bittrue.rl.loop import check_snapshot, checkpoints_of
from bittrue.rl.records import Records
from bittrue.rl.run_files import CONFIG_FILE, STEPS_FILE
from bittrue.train.checkpoint import Snapshot
from bittrue.train.run_file import checked


@dataclass(frozen=True, slots=True)
class Replayed:
    """A step that was run again. Digests are in hexadecimal: of the masters with the optimiser's state, and
    of the published weights."""

    step: int
    masters: str
    recorded_masters: str
    weights: str
    recorded_weights: str

    @property
    def is_same(self) -> bool:
        return self.masters == self.recorded_masters and self.weights == self.recorded_weights


class StepReplay:
    """The side of a run that trains, without its engine: it reads records in place of sampling."""

    def __init__(self, directory: Path, log: Log) -> None:
        """Raises CheckpointError where ``directory`` is no run of reinforcement learning."""
        self._directory, self._log = directory, log
        self._config = _config_of(directory)
        self._records = Records(directory)
        self._lines = {line["step"]: line for line in _lines_of(directory / STEPS_FILE)}

    def run(self, step: int, *, tell: Callable[[int], None] = lambda step: None) -> Replayed:
        """Runs ``step`` again, and those before it from the newest checkpoint that is not later. ``tell``
        hears of every step that is begun. Raises CheckpointError where a checkpoint or record is missing or
        broken, ParityBroken where a record is not of the weights."""
        line = self._line(step)
        found = self._checkpoint(step)
        run = self._config.run.model_copy(update={"threads": found.facts["threads"]})  # as it was computed
        config = self._config.model_copy(update={"run": run})
        side = open_side(config, self._directory, self._log)
        check_snapshot(found, side.facts(config))
        learner = side.learner
        learner.load_state(found.tensors)
        for number in range(found.step, step + 1):
            tell(number)
            self._check_record(number)
            learner.gradient(self._records.read(number))
            learner.step(number)
        version = Publisher().update(dict(learner.tensors())).version
        return Replayed(step, learner.digest(), line["masters_after"], version, line["weights_after"])

    def _checkpoint(self, step: int) -> Snapshot:
        """The newest that is not later."""
        checkpoints = checkpoints_of(self._config, self._directory)
        before = [number for number in checkpoints.steps() if number <= step]
        if not before:
            fact = f"{self._directory} has no checkpoint of step {step} or before"
            raise CheckpointError(f"{fact}; a run keeps its first", file=str(self._directory))
        return checkpoints.load(before[-1])

    def _check_record(self, step: int) -> None:
        recorded = self._line(step)["record"]
        if self._records.digest(step) != recorded:
            path = self._records.path(step)
            fact = f"{path} is not the record the step was computed from: {STEPS_FILE} names {recorded}"
            raise CheckpointError(f"{fact}; restore the file", file=str(path))

    def _line(self, step: int) -> dict[str, Any]:
        if step not in self._lines:
            last = max(self._lines, default=None)
            fact = f"{self._directory} has no step {step}"
            told = "it has none yet" if last is None else f"choose one of 0 to {last}"
            raise CheckpointError(f"{fact}; {told}", file=str(self._directory))
        return self._lines[step]


def _config_of(directory: Path) -> RlConfig:
    file = directory / CONFIG_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fact = f"{directory} is no run of reinforcement learning: {file} cannot be read ({error})"
        raise CheckpointError(f"{fact}; give a directory that `bittrue rl` wrote", file=str(file)) from error
    return checked(RlConfig, values, source=str(file))


def _lines_of(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)
