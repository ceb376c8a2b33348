"""What the program runs on and from, as a record may tell it: processor and checkout; no host, no user."""

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Checkout:
    """The git checkout the package lies in. ``commit``: 40 hex digits; ``is_dirty``: the package's files
    differ from it."""

    commit: str
    is_dirty: bool


def processor() -> str:
    """The processor's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> tuple[str, ...]:
    """What the processor says it can do, in alphabetical order; empty where the system does not tell."""
    return tuple(sorted(set(_cpuinfo("flags").split())))


def usable_cpus() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0))


def checkout(package: Path) -> Checkout | None:
    """The checkout that tracks the folder ``package``; None outside one, or without git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=package, capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A package installed below somebody else's checkout is not of that commit.
    if not git("ls-files", "--", "errors.py"):
        return None
    commit = git("rev-parse", "HEAD")
    if not commit:
        return None
    return Checkout(commit, is_dirty=git("status", "--porcelain", "--", ".") != "")


def _cpuinfo(key: str) -> str:
    """The value of ``key`` for the first processor, empty where there is none."""
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""
