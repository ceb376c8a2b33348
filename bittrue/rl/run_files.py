"""Reads the directory of an RL run: its settings, its numbers and its facts, step by step."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from bittrue.errors import CheckpointError
from bittrue.rl.environment import ENVIRONMENT_FILE, Sitting, read_sittings
from bittrue.train.checkpoint import write_file
from bittrue.train.metrics import METRICS_FILE, read_metrics

CONFIG_FILE = "run.json"
STEPS_FILE = "steps.jsonl"
SOURCE_FILE = "source.json"
FILES = (CONFIG_FILE, SOURCE_FILE, ENVIRONMENT_FILE, STEPS_FILE, METRICS_FILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """A line of steps.jsonl: what a step says that is no number.

    ``weights_*``: versions the engine had before it and has after it; ``masters_after``, ``prompts``,
    ``record``: digests, in hex. ``outcomes``: answers by what their verifier said. ``versions``: those that
    sampled the tokens trained on, with their policy number. ``engine_restarts``: so far, in this sitting.
    ``seconds`` of the whole step, held-out measurements left out.
    """

    step: int
    weights_before: str
    weights_after: str
    masters_after: str
    prompts: str
    seconds: float
    begun_at: str
    record: str = ""
    outcomes: dict[str, int] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    engine_restarts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFacts:
    """source.json: what was asked, and how the judges of answers were kept apart."""

    digest: str
    seed: int
    isolation: str
    held_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What a run directory says. ``metrics`` and ``steps`` are whole and of the same steps, 0 to the last;
    where that is the last of the run, one more line of metrics has what was measured behind it. ``torn`` says
    which lines are not whole."""

    directory: Path
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, float]]
    steps: Sequence[StepFacts]
    source: SourceFacts
    sittings: Sequence[Sitting]
    torn: Sequence[str]

    def setting(self, dotted: str) -> Any:
        """The resolved setting of that name. Raises CheckpointError."""
        return setting(self.directory, self.config, dotted)

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, where it was measured."""
        return curve(self.metrics, name)


def read_run(directory: Path) -> RunFiles:
    """Raises CheckpointError that names the file where one is missing or not what a run writes."""
    config, metrics = read_settings(directory), _lines(directory / METRICS_FILE)
    steps = [_step(directory / STEPS_FILE, line) for line in _lines(directory / STEPS_FILE)]
    torn = [*_torn(directory / METRICS_FILE, len(metrics)), *_torn(directory / STEPS_FILE, len(steps))]
    if abs(len(metrics) - len(steps)) > 1:
        torn.append(f"{METRICS_FILE} has {len(metrics)} steps, {STEPS_FILE} has {len(steps)}")
    both = min(len(metrics), len(steps))  # a kill may come between the two lines of a step
    for name, found in ((METRICS_FILE, [line["step"] for line in metrics]), (STEPS_FILE, steps)):
        numbers = [each.step if isinstance(each, StepFacts) else int(each) for each in found]
        if numbers != list(range(len(numbers))):
            torn.append(f"{name} does not have every step once, in order")
    is_finished = both >= int(setting(directory, config, "run.steps"))
    return RunFiles(
        directory,
        config,
        metrics[: both + int(is_finished)],
        steps[:both],
        _source(directory / SOURCE_FILE),
        read_sittings(directory / ENVIRONMENT_FILE),
        torn,
    )


def write_source(directory: Path, source: SourceFacts) -> None:
    """Writes source.json. Raises CheckpointError where that fails."""
    encoded = msgspec.json.format(msgspec.json.encode(source), indent=1)
    write_file(directory / SOURCE_FILE, encoded.decode() + "\n")


def read_settings(directory: Path) -> dict[str, Any]:
    """The resolved config of a run, by section. Raises CheckpointError."""
    path = directory / CONFIG_FILE
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _foreign(path, error) from error
    if not isinstance(found, dict):
        raise _foreign(path, "it is no table")
    return found


def read_curves(directory: Path) -> list[dict[str, float]]:
    """The metrics of a run, step by step. Raises CheckpointError."""
    return _lines(directory / METRICS_FILE)


def curve(metrics: Sequence[Mapping[str, float]], name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric, where it was measured and is a number."""
    found = ((int(line["step"]), float(line[name])) for line in metrics if name in line)
    return [(step, value) for step, value in found if math.isfinite(value)]


def setting(directory: Path, config: Mapping[str, Any], dotted: str) -> Any:
    """A value of the resolved config. Raises CheckpointError."""
    section, _, key = dotted.partition(".")
    try:
        return config[section][key]
    except (KeyError, TypeError) as error:
        raise _foreign(directory / CONFIG_FILE, f"it has no {dotted}") from error


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return list(read_metrics(path))
    except OSError as error:
        raise _foreign(path, error) from error


def _step(path: Path, line: Mapping[str, Any]) -> StepFacts:
    try:
        return msgspec.convert(line, StepFacts)
    except msgspec.ValidationError as error:
        raise _foreign(path, f"step {line['step']}: {error}") from error


def _source(path: Path) -> SourceFacts:
    try:
        return msgspec.json.decode(path.read_bytes(), type=SourceFacts)
    except (OSError, msgspec.DecodeError) as error:
        raise _foreign(path, error) from error


def _torn(path: Path, read: int) -> list[str]:
    """What follows a line that is not one: a kill leaves half a line at the very end, and nothing else."""
    ended = path.read_bytes().count(b"\n")
    return [] if ended == read else [f"{path.name}: line {read + 1} of {ended} cannot be read"]


def _foreign(path: Path, why: object) -> CheckpointError:
    fact = f"{path} is not what an RL run writes: {why}"
    return CheckpointError(f"{fact}; name the directory of a run of `bittrue rl`", file=str(path))
