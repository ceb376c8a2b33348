"""The numbers of a run: one JSON line per step, as if the run had never been interrupted."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bittrue.errors import CheckpointError
from bittrue.train.schedule import Phase
from bittrue.train.trainer import StepStats

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """Appends lines; those of steps that are run again are cut off first."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError where the file cannot be written."""
        self.path = path
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            fact = f"cannot write {path}: {error.strerror or error}"
            raise CheckpointError(f"{fact}; choose another run directory", file=str(path)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def is_empty(self) -> bool:
        return self.path.stat().st_size == 0

    def cut(self, step: int) -> None:
        """Keeps the lines of steps before ``step``; what a kill left half written goes as well."""
        end = 0
        with self.path.open("rb") as lines:
            for line in lines:
                found = _step_of(line)
                if found is None or found >= step:
                    break
                end += len(line)
        self._file.truncate(end)

    def append(self, values: Mapping[str, Any]) -> None:
        """Writes the line of a step. Raises CheckpointError on a full disk."""
        line = json.dumps(values).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise _full(self.path, error) from error

    def sync(self) -> None:
        """Puts the lines on disk: before the checkpoint that follows them."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _full(self.path, error) from error


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file, up to one that is not whole."""
    with path.open("rb") as file:
        for line in file:
            if _step_of(line) is None:
                return
            yield json.loads(line)


def step_values(step: int, stats: StepStats, phase: Phase, norm: float, seconds: float) -> dict[str, Any]:
    """The line of a step. ``load``: of each learned router the share of its busiest and of its idlest expert,
    1 = as much as every other."""
    load = {}
    for name, counts in stats.loads.items():
        mean = max(float(counts.double().mean()), 1e-9)
        load[name] = [round(float(counts.max()) / mean, 4), round(float(counts.min()) / mean, 4)]
    return {
        "step": step,
        "main": stats.main,
        "mtp": stats.mtp,
        "index": stats.index,
        "balance": stats.balance,
        "grad_norm": norm,
        "lr": phase.lr,
        "tokens": stats.num_tokens,
        "targets": stats.num_targets,
        "seconds": round(seconds, 4),
        "tasks": {name: list(sums) for name, sums in sorted(stats.task_loss.items())},
        "load": load,
    }


def _step_of(line: bytes) -> int | None:
    if not line.endswith(b"\n"):
        return None
    try:
        values = json.loads(line)
    except ValueError:
        return None
    step = values.get("step") if isinstance(values, dict) else None
    return step if isinstance(step, int) else None


def _full(path: Path, error: OSError) -> CheckpointError:
    fact = f"cannot write {path}: {error.strerror or error}; the last checkpoint is kept"
    return CheckpointError(f"{fact}; make room and run the same command again", file=str(path))
