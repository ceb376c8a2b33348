"""The record of every benchmark: where, from what and how it ran, and what it measured; stored as JSON."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from bittrue.errors import UsageError
from bittrue.obs.machine import checkout, processor

Benchmark = Literal[
    "ops",
    "frontier",
    "serving",
    "server",
    "peers",
    "long-prompt",
    "cache",
    "agent",
    "speculation",
    "recovery",
    "tasks",
    "training",
    "rl-replay",
    "rl-trl",
    "rl-gain",
    "rl-exact",
    "rl-staleness",
    "rl-distill",
]
Unit = Literal["s", "tokens/s", "requests/s", "bytes", "bytes/s", "flop/s", "ratio", "count", "nats"]
Label = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Measurement:
    """One quantity, observed ``repeats`` times: the median and the 10th and 90th percentile, in ``unit``.

    ``labels`` say what was measured under which conditions, by name (``context``, ``engine``, ...): readers
    find measurements by name and labels. ``bytes`` and ``flops`` are the least work of one observation,
    where the unit is seconds.
    """

    name: str
    unit: Unit
    median: float
    low: float
    high: float
    repeats: int
    labels: dict[str, Label] = field(default_factory=dict)
    bytes: int = 0
    flops: int = 0

    @property
    def bytes_per_s(self) -> float:
        return self.bytes / self.median

    @property
    def flops_per_s(self) -> float:
        return self.flops / self.median

    def has(self, **labels: Label) -> bool:
        """Whether every one of ``labels`` is a label of this measurement, with the same value."""
        return all(name in self.labels and self.labels[name] == value for name, value in labels.items())


@dataclass(frozen=True, slots=True)
class Result:
    """One run of one benchmark. ``config`` is what was chosen for it, by name."""

    benchmark: Benchmark
    machine: str
    cores: int
    commit: str  # with "+" when the package had uncommitted changes; "unknown" outside a checkout
    date: str  # UTC, ISO 8601
    command: str
    config: dict[str, Label]
    measurements: tuple[Measurement, ...]

    def find(self, name: str, **labels: Label) -> Measurement | None:
        """The first measurement of that name with these labels, or None."""
        return next((m for m in self.measurements if m.name == name and m.has(**labels)), None)


def new_result(
    benchmark: Benchmark, command: str, config: Mapping[str, Label], measurements: Sequence[Measurement]
) -> Result:
    """A result of the present machine, checkout and moment."""
    return Result(
        benchmark=benchmark,
        machine=processor(),
        cores=os.cpu_count() or 1,
        commit=_commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        config=dict(config),
        measurements=tuple(measurements),
    )


def measured(
    name: str,
    unit: Unit,
    values: Sequence[float],
    labels: Mapping[str, Label],
    *,
    num_bytes: int = 0,
    flops: int = 0,
) -> Measurement:
    """The measurement that sums up ``values``: at least one, in any order."""
    ordered = sorted(values)
    low, median, high = (percentile(ordered, share) for share in (0.1, 0.5, 0.9))
    return Measurement(name, unit, median, low, high, len(ordered), dict(labels), num_bytes, flops)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value at ``share`` (0 to 1) of an ascending list."""
    return ordered[round(share * (len(ordered) - 1))]


def encode_result(result: Result) -> str:
    """The JSON document of a result, one field or measurement a line: runs can be compared by diff."""
    fields = msgspec.to_builtins(result)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in fields.pop("measurements"))
    head = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in fields.items())
    return f'{{\n{head} "measurements": [\n{rows}\n ]\n}}\n'


def decode_result(text: str | bytes, *, source: str) -> Result:
    """The inverse of ``encode_result``. Raises UsageError naming ``source`` and what is wrong in it."""
    try:
        return msgspec.json.decode(text, type=Result)
    except msgspec.DecodeError as error:
        raise UsageError(f"{source} is not the result of a benchmark: {error}") from error


def write_result(path: Path, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(encode_result(result), encoding="utf-8")


def read_results(folder: Path) -> dict[str, Result]:
    """Every ``*.json`` of ``folder`` by file name, in name order. Raises UsageError."""
    return {
        path.name: decode_result(path.read_bytes(), source=str(path))
        for path in sorted(folder.glob("*.json"))
    }


def _commit() -> str:
    found = checkout(Path(__file__).parents[1])
    return "unknown" if found is None else found.commit[:12] + ("+" if found.is_dirty else "")
