"""environment.json of a run: what code on what machine ran each sitting of it."""

import hashlib
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import numpy
import torch

from bittrue.errors import CheckpointError
from bittrue.obs.machine import checkout, cpu_flags, processor, usable_cpus
from bittrue.ops.contracts import OpTable
from bittrue.ops.dispatch import build_of
from bittrue.ops.threads import threads_of
from bittrue.train.checkpoint import write_file

ENVIRONMENT_FILE = "environment.json"
_PACKAGE = Path(__file__).parents[1]
_SOURCES = (".py", ".cpp", ".h")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What a run's bytes may depend on besides its settings, and what its times do; no host, user or path.

    ``commit``: of the checkout, empty outside one; ``is_dirty``: the package differs from it. ``sources``:
    SHA-256 of the package's sources. ``backend``: the ops with their instruction set; ``kernels`` names
    their build.
    """

    bittrue: str
    commit: str
    is_dirty: bool
    sources: str
    backend: str
    kernels: str
    threads: int
    python: str
    torch: str
    numpy: str
    platform: str
    processor: str
    cpus: int
    cpu_flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sitting:
    """One process of a run: the step it began with, when (UTC, ISO 8601), and in which environment."""

    step: int
    begun_at: str
    environment: Environment


@dataclass(frozen=True, slots=True)
class Sittings:
    """The whole file."""

    sittings: tuple[Sitting, ...]


def environment_of(ops: OpTable) -> Environment:
    """The present environment, for ops as they are set up now."""
    found = checkout(_PACKAGE)
    return Environment(
        bittrue=_version(),
        commit="" if found is None else found.commit,
        is_dirty=found is not None and found.is_dirty,
        sources=sources_digest(_PACKAGE),
        backend=ops.name,
        kernels=build_of(ops),
        threads=threads_of(ops),
        python=platform.python_version(),
        torch=str(torch.__version__),
        numpy=numpy.__version__,
        platform=" ".join((platform.system(), platform.release(), platform.machine())),
        processor=processor(),
        cpus=usable_cpus(),
        cpu_flags=cpu_flags(),
    )


def sources_digest(package: Path) -> str:
    """SHA-256 over every source file below ``package``: its path there, its size and its bytes, by path."""
    digest = hashlib.sha256()
    files = (path for path in package.rglob("*") if path.suffix in _SOURCES and path.is_file())
    for name, path in sorted((path.relative_to(package).as_posix(), path) for path in files):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def begin_sitting(directory: Path, ops: OpTable, *, step: int) -> Environment:
    """Adds this process to the environment.json of the run in ``directory``, which it takes on from
    ``step``. Raises CheckpointError where the file there is none or cannot be written."""
    path = directory / ENVIRONMENT_FILE
    before = read_sittings(path) if path.exists() else ()
    now = environment_of(ops)
    sitting = Sitting(step, datetime.now(UTC).isoformat(timespec="seconds"), now)
    encoded = msgspec.json.encode(Sittings((*before, sitting)))
    write_file(path, msgspec.json.format(encoded, indent=1).decode() + "\n")
    return now


def read_sittings(path: Path) -> tuple[Sitting, ...]:
    """The sittings of an environment.json, in order. Raises CheckpointError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Sittings).sittings
    except (OSError, msgspec.DecodeError) as error:
        fact = f"{path} does not say where the run ran: {error}"
        raise CheckpointError(f"{fact}; take it from a copy of the run", file=str(path)) from error


def _version() -> str:
    try:
        return version("bittrue")
    except PackageNotFoundError:
        return "not installed"
