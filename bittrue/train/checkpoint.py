"""Checkpoints of a run: everything the next step depends on, written whole or not at all, and checked."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bittrue.errors import CheckpointError, UsageError
from bittrue.model.export import write_safetensors
from bittrue.model.tensor_file import map_tensors, read_header

TENSORS_FILE = "state.safetensors"
FACTS_FILE = "state.json"
_LOCK_FILE = ".lock"
_NAME = re.compile(r"step-(\d{6,})")
_STALE = re.compile(r"\.(old|new)-step-\d{6,}")
_MISSING = "nothing"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a checkpoint holds. ``facts`` are JSON; ``tensors`` are views of the file."""

    step: int  # steps done
    path: Path
    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix`` and a dot, without these."""
        start = f"{prefix}."
        return {n.removeprefix(start): t for n, t in self.tensors.items() if n.startswith(start)}


class Checkpoints:
    """The checkpoints in one run directory: ``step-000120`` holds state.safetensors and state.json.

    The newest ``keep`` that are due every ``every`` steps stay, and any that is newer than these; with
    ``keeps_first`` that of step 0 too.
    """

    def __init__(self, directory: Path, *, every: int, keep: int, keeps_first: bool = False) -> None:
        self._directory, self._every, self._keep = directory, every, keep
        self._keeps_first = keeps_first

    def steps(self) -> list[int]:
        """The steps there is a checkpoint of, ascending; whether one can be read shows when it is."""
        found = (_NAME.fullmatch(path.name) for path in self._directory.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self._directory / f"step-{step:06d}"

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
        """Writes a checkpoint beside the others and renames it into place. Raises CheckpointError where that
        cannot be done; those there were are untouched then."""
        path = self.path(step)
        staging = self._directory / f".new-{path.name}"
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            write_safetensors(staging / TENSORS_FILE, {n: t.detach() for n, t in tensors.items()})
            body = {"step": step, "sha256": _sha256(staging / TENSORS_FILE), **facts}
            _write_text(
                staging / FACTS_FILE, json.dumps({"checksum": _checksum(body), **body}, indent=1) + "\n"
            )
            _sync_directory(staging)
            self._put(staging, path)
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise CheckpointError(self._failed(path, error), file=str(path)) from error
        self._prune(step)
        return path

    def load(self, step: int) -> Snapshot:
        """Reads a checkpoint and checks every byte. Raises CheckpointError that names the file."""
        return read_checkpoint(self.path(step))

    def newest(self, *, warn: Callable[[str], None]) -> Snapshot | None:
        """The newest checkpoint that is whole; None where there is none at all. Of each that is not, ``warn``
        is told. Raises CheckpointError where there are some and none is whole."""
        steps = self.steps()
        broken: list[CheckpointError] = []
        for i, step in reversed(list(enumerate(steps))):
            try:
                return self.load(step)
            except CheckpointError as error:
                broken.append(error)
                before = self.path(steps[i - 1]).name if i else _MISSING
                warn(f"{error}; {before} is used instead" if i else str(error))
        if broken:
            fact = f"{self._directory} holds {len(broken)} checkpoints and none can be read: {broken[0]}"
            raise CheckpointError(f"{fact}; start again in another directory", file=str(self._directory))
        return None

    def drop_after(self, step: int) -> None:
        """Removes the checkpoints of later steps: of a course that was given up."""
        for later in self.steps():
            if later > step:
                shutil.rmtree(self.path(later))
        _sync_directory(self._directory)

    def clean(self) -> None:
        """Removes what a killed process left half done."""
        for path in self._directory.iterdir():
            if _STALE.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _put(self, staging: Path, path: Path) -> None:
        old = self._directory / f".old-{path.name}"
        if path.exists():  # it could not be read, or belongs to a course that was given up
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        staging.rename(path)
        _sync_directory(self._directory)
        shutil.rmtree(old, ignore_errors=True)

    def _prune(self, newest: int) -> None:
        steps = [step for step in self.steps() if step <= newest]
        due = [step for step in steps if step % self._every == 0]
        kept = set(due[-self._keep :]) | {step for step in steps if not due or step > due[-1]}
        kept |= {0} if self._keeps_first else set()
        for step in steps:
            if step not in kept:
                shutil.rmtree(self.path(step), ignore_errors=True)

    def _failed(self, path: Path, error: OSError) -> str:
        steps = self.steps()
        last = f"the last good checkpoint is {self.path(steps[-1])}" if steps else "there is none yet"
        return (
            f"cannot write the checkpoint {path}: {error.strerror or error}; {last}; make room and run the "
            "same command again"
        )


def read_checkpoint(path: Path) -> Snapshot:
    """The checkpoint at ``path``, with every byte checked. Raises CheckpointError that names the file."""
    facts = _read_facts(path / FACTS_FILE)
    file = path / TENSORS_FILE
    entries = read_header(file)
    if _sha256(file) != facts["sha256"]:
        raise _unreadable(file, "its bytes are not those that were written: the checksum differs")
    return Snapshot(facts["step"], path, facts, map_tensors(file, entries))


@contextlib.contextmanager
def run_directory(directory: Path) -> Iterator[None]:
    """Makes the directory and holds it: one process at a time trains in it. Raises UsageError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / _LOCK_FILE).open("w")
    except OSError as error:
        fact = f"cannot write {directory}: {error.strerror or error}"
        raise UsageError(f"{fact}; choose another directory") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"another process trains in {directory}; wait for it, or stop it") from error
        yield


def write_file(path: Path, text: str) -> None:
    """Replaces a small file of a run directory at once. Raises CheckpointError where that fails."""
    staging = path.with_name(f".{path.name}.new")
    try:
        _write_text(staging, text)
        staging.replace(path)
        _sync_directory(path.parent)
    except OSError as error:
        staging.unlink(missing_ok=True)
        fact = f"cannot write {path}: {error.strerror or error}"
        raise CheckpointError(f"{fact}; make room and run the same command again", file=str(path)) from error


def check_same(
    path: Path, saved: Mapping[str, Any], present: Mapping[str, Any], *, what: str, remedy: str
) -> None:
    """Raises CheckpointError naming the first field in which a checkpoint's ``saved`` facts differ."""
    for name in sorted(saved.keys() | present.keys()):
        before, now = saved.get(name, _MISSING), present.get(name, _MISSING)
        if before != now:
            fact = f"{path} is of another {what}: {name} was {_shown(before)}, now it is {_shown(now)}"
            raise CheckpointError(f"{fact}; {remedy}", file=str(path))


def _shown(value: object) -> str:
    return value if value == _MISSING else json.dumps(value)


def _read_facts(file: Path) -> dict[str, Any]:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(file, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise _unreadable(file, f"is not whole: {error}") from error
    if not isinstance(facts, dict) or facts.pop("checksum", None) != _checksum(facts):
        raise _unreadable(file, "its content is not what was written: the checksum differs")
    return facts


def _unreadable(file: Path, fact: str) -> CheckpointError:
    return CheckpointError(f"{file}: {fact}", file=str(file))


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_text(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
