"""One measured number with what is needed to read it again: machine, commit, command, repeats and spread."""

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and how a set of numbers was measured."""

    machine: str
    cores: int
    commit: str  # with "+" when the tree had uncommitted changes; "unknown" outside a checkout
    command: str
    date: str  # UTC, ISO 8601


@dataclass(frozen=True, slots=True)
class Result:
    """The median of ``repeats`` timings in seconds, their 10th and 90th percentile, and the least work
    done."""

    name: str
    variant: str
    median_s: float
    low_s: float
    high_s: float
    repeats: int
    bytes: int
    flops: int

    @property
    def gigabytes_per_s(self) -> float:
        return self.bytes / self.median_s / 1e9

    @property
    def gigaflops_per_s(self) -> float:
        return self.flops / self.median_s / 1e9


def setting(command: str) -> Setting:
    """The present machine, checkout and moment."""
    return Setting(
        machine=_processor(),
        cores=os.cpu_count() or 1,
        commit=_commit(),
        command=command,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def percentile(ordered: list[float], share: float) -> float:
    """The value at ``share`` (0 to 1) of an ascending list."""
    return ordered[round(share * (len(ordered) - 1))]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    return head + ("+" if git("status", "--porcelain") else "")
