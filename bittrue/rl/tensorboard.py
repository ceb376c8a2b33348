"""The metrics of a run for TensorBoard: event files that are made again from metrics.jsonl at any time."""

import importlib
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bittrue.errors import BackendUnavailable, CheckpointError
from bittrue.train.metrics import read_metrics

_NAME = "events.out.tfevents.{at:010d}.{place:03d}.bittrue"
_OWN = "events.out.tfevents.*.bittrue"
_FILE_VERSION = "brain.Event:2"  # what purges by a start of session


class TensorBoardWriter:
    """Writes the scalars of every step, under the names of metrics.jsonl.

    Opening it replaces what it wrote in that directory before by what ``metrics`` holds now: steps that a
    resumed run does again are gone, and those that were never written are there. The first event makes a
    TensorBoard that is watching forget the steps it has. The files of others stay.
    """

    def __init__(self, directory: Path, *, metrics: Path) -> None:
        """``metrics``: the metrics.jsonl of the run, cut already to where it goes on; it may be missing.

        Raises BackendUnavailable without the optional library, CheckpointError where nothing can be written.
        """
        self._library = _load()
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            before = sorted(directory.glob(_OWN))
            self._file = self._library.record_writer.RecordWriter(str(_next_name(directory, before)))
            self._begin()
            for line in read_metrics(metrics) if metrics.exists() else ():
                self._add(line.pop("step"), line)
            self._file.flush()
            _retire(before)
        except OSError as error:
            raise self._failed(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step. Raises CheckpointError on a full disk."""
        try:
            self._add(step, values)
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        self._file.close()

    def _begin(self) -> None:
        events = self._library.proto.event_pb2
        self._write(events.Event(file_version=_FILE_VERSION))
        start = events.SessionLog(status=events.SessionLog.START)
        self._write(events.Event(step=0, session_log=start))

    def _add(self, step: int, values: Mapping[str, float]) -> None:
        # A value that is no number has no place in a plot; metrics.jsonl keeps it.
        shown = {name: value for name, value in values.items() if math.isfinite(value)}
        summary = self._library.proto.summary_pb2.Summary(
            value=[{"tag": name, "simple_value": value} for name, value in shown.items()]
        )
        self._write(self._library.proto.event_pb2.Event(step=step, summary=summary))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._file.write(event.SerializeToString())

    def _failed(self, error: OSError) -> CheckpointError:
        fact = f"cannot write events for TensorBoard to {self.directory}: {error.strerror or error}"
        return CheckpointError(
            f"{fact}; choose another directory, or leave TensorBoard out", file=str(self.directory)
        )


def _next_name(directory: Path, before: list[Path]) -> Path:
    """Behind those there are: TensorBoard reads files in the order of their names, and never goes back."""
    now, place = int(time.time()), 0
    if before:
        at, last = (int(part) for part in before[-1].name.split(".")[3:5])
        if at >= now:
            now, place = at, last + 1
    return directory / _NAME.format(at=now, place=place)


def _retire(before: list[Path]) -> None:
    """Empties the newest and removes the others. A TensorBoard that is watching stands in the newest: it goes
    on to the next file from the end of one that is shorter, and never from one that is gone."""
    for path in before[:-1]:
        path.unlink(missing_ok=True)
    for path in before[-1:]:
        os.truncate(path, 0)


def _load() -> Any:
    """tensorboardX, of which only the file format is used: its own writer renames metrics."""
    try:
        library = importlib.import_module("tensorboardX")
        for name in ("record_writer", "proto.event_pb2", "proto.summary_pb2"):
            importlib.import_module(f"tensorboardX.{name}")
    except ImportError as error:
        fact = f"events for TensorBoard need tensorboardX, which cannot be imported: {error}"
        raise BackendUnavailable(f"{fact}; pip install bittrue[tensorboard]") from error
    return library
