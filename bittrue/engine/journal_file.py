"""JournalFile: records appended to segments in a directory, checksummed and brought to the disk in time."""

import contextlib
import fcntl
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bittrue.errors import ConfigError

MAGIC = b"BTJRNL01"
HEAD = struct.Struct("<II")  # of a record: length of the body, crc32 of those four bytes and the body
SEGMENT_BYTES = 4 << 20  # a segment that has grown beyond is followed by the next
SYNC_EVERY_S = 0.2  # what a power cut may take: the records of so long
_SUFFIX = ".journal"


@dataclass(frozen=True, slots=True)
class Segment:
    """What a segment's file held. ``num_bad``: bytes at its end that are no whole record."""

    number: int
    bodies: list[bytes]
    num_bad: int


def framed(body: bytes) -> bytes:
    """A record as it lies in the file."""
    length = len(body).to_bytes(4, "little")
    return length + zlib.crc32(body, zlib.crc32(length)).to_bytes(4, "little") + body


def read_segment(data: bytes) -> tuple[list[bytes], int]:
    """The bodies of ``data``'s whole records up to the first that is not, and the bytes that remain."""
    if data[: len(MAGIC)] != MAGIC:
        return [], len(data)
    bodies, at = [], len(MAGIC)
    while len(data) - at >= HEAD.size:
        length, checksum = HEAD.unpack_from(data, at)
        body = data[at + HEAD.size : at + HEAD.size + length]
        if len(body) < length or zlib.crc32(body, zlib.crc32(data[at : at + 4])) != checksum:
            break
        bodies.append(body)
        at += HEAD.size + length
    return bodies, len(data) - at


class JournalFile:
    """The segments of one directory, which one process at a time may use.

    ``append`` collects, ``flush`` hands everything to the kernel in one write: from then on it survives the
    death of this process. A thread syncs, so that it survives a power cut ``SYNC_EVERY_S`` later.
    """

    def __init__(self, directory: str) -> None:
        """Raises ConfigError for a directory that cannot be made, read, or is in use by another server."""
        self.directory = Path(directory)
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._directory_fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise unusable(directory, error) from error
        try:
            fcntl.flock(self._directory_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._directory_fd)
            message = f"journal_dir: {directory} is in use by another server; give each its own"
            raise ConfigError(message, field="journal_dir") from error
        self.sizes: dict[int, int] = {}  # bytes by segment, oldest first; the last one grows
        self._fd = -1
        self._pending = bytearray()
        self._syncer = _Syncer(self._directory_fd)

    @property
    def current(self) -> int:
        """The number of the segment that grows."""
        return next(reversed(self.sizes))

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes.values())

    def read(self) -> Iterator[Segment]:
        """What earlier processes left, oldest first. Raises OSError."""
        paths = sorted(path for path in self.directory.glob(f"*{_SUFFIX}") if path.stem.isdigit())
        for path in paths:
            data = path.read_bytes()
            bodies, num_bad = read_segment(data)
            self.sizes[int(path.stem)] = len(data)
            yield Segment(int(path.stem), bodies, num_bad)

    def begin(self, bodies: Iterable[bytes]) -> None:
        """Starts over: a segment with ``bodies`` takes the place of all others, which go once it is on the
        disk. Raises OSError; the others are then still there."""
        self._retire()
        self._pending.clear()
        old = list(self.sizes)
        try:
            self._open_next()
            for body in bodies:
                self.append(body)
            self.flush()
            os.fdatasync(self._fd)
            os.fsync(self._directory_fd)
        except OSError:
            self._abandon(old)
            raise
        for number in old:
            self.delete(number)

    def append(self, body: bytes) -> None:
        self._pending += framed(body)

    def flush(self) -> None:
        """Writes what was appended. Raises OSError: the segment may then end in a part of a record, and only
        ``begin`` goes on."""
        if not self._pending:
            return
        data, self._pending = self._pending, bytearray()
        number = self.current
        with memoryview(data) as view:
            done = 0
            while done < len(view):
                done += os.write(self._fd, view[done:])
        self.sizes[number] += len(data)
        self._syncer.touch(self._fd)
        if self._syncer.error is not None:
            error, self._syncer.error = self._syncer.error, None
            raise error

    def rotate(self) -> None:
        """Starts the next segment. Raises OSError."""
        self.flush()
        self._retire()
        self._open_next()

    def delete(self, number: int) -> None:
        """Removes a segment. Raises OSError."""
        (self.directory / f"{number:08d}{_SUFFIX}").unlink(missing_ok=True)
        self.sizes.pop(number, None)

    def close(self) -> None:
        """Everything written is on the disk; the directory is free for another process."""
        with contextlib.suppress(OSError):
            self.flush()
        self._retire()
        self._syncer.close()
        os.close(self._directory_fd)

    def _open_next(self) -> None:
        number = max(self.sizes, default=0) + 1
        path = self.directory / f"{number:08d}{_SUFFIX}"
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self.sizes[number] = 0
        self._pending[:0] = MAGIC
        self._syncer.note_entry()

    def _abandon(self, old: list[int]) -> None:
        """What was begun in vain goes; ``old`` still holds everything."""
        self._retire()
        self._pending.clear()
        for number in self.sizes.keys() - set(old):
            with contextlib.suppress(OSError):
                self.delete(number)

    def _retire(self) -> None:
        if self._fd >= 0:
            self._syncer.retire(self._fd)
            self._fd = -1


def unusable(directory: str, error: OSError) -> ConfigError:
    """The error of a server that cannot keep its journal where it was told to."""
    reason = error.strerror or str(error)
    return ConfigError(
        f"journal_dir: cannot use {directory}: {reason}; give a directory with room that it can write to",
        field="journal_dir",
    )


class _Syncer:
    """A thread that brings written files to the disk, one round per ``SYNC_EVERY_S`` at most.

    ``error``: the last OSError of a sync, for the writer to take.
    """

    def __init__(self, directory_fd: int) -> None:
        self.error: OSError | None = None
        self._directory_fd = directory_fd
        self._has_entry = False
        self._dirty: set[int] = set()
        self._retired: list[int] = []
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="journal sync", daemon=True)
        self._thread.start()

    def touch(self, fd: int) -> None:
        if fd not in self._dirty:  # only this thread adds; a set is replaced, never emptied, by the other
            with self._changed:
                self._dirty.add(fd)
                self._changed.notify()

    def note_entry(self) -> None:
        """The directory has a new file."""
        with self._changed:
            self._has_entry = True
            self._changed.notify()

    def retire(self, fd: int) -> None:
        """Syncs ``fd`` once more, then closes it."""
        with self._changed:
            self._dirty.add(fd)
            self._retired.append(fd)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._dirty or self._has_entry or self._is_closed)
                dirty, self._dirty = self._dirty, set()
                retired, self._retired = self._retired, []
                has_entry, self._has_entry = self._has_entry, False
                is_last = self._is_closed
            try:
                for fd in dirty:
                    os.fdatasync(fd)
                if has_entry:
                    os.fsync(self._directory_fd)
            except OSError as error:
                self.error = error
            for fd in retired:
                os.close(fd)
            if is_last:
                return
            deadline_s = time.monotonic() + SYNC_EVERY_S
            with self._changed:
                while not self._is_closed and (left_s := deadline_s - time.monotonic()) > 0:
                    self._changed.wait(left_s)
