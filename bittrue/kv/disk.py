"""The disk tier: one directory of blob files under a byte budget (docs/kv-disk-format.md)."""

import errno
import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from bittrue.kv.blob import FORMAT_VERSION, HEADER_BYTES, BlobFormat, Fault
from bittrue.kv.disk_room import DiskRoom
from bittrue.kv.identity import DIGEST_BYTES, BlobName
from bittrue.kv.layout import PAGE_TOKENS
from bittrue.kv.recency import Entry, Key, Recency
from bittrue.obs.log import Log

SCAN_EVERY_S = 300.0  # how stale the view of other processes' files may be
OLD_TEMP_S = 600.0  # a temporary file this old has lost its writer
_SCAN_SHARE = 3  # a scan works a third of the time: Python threads take turns with the engine's
_HEX = re.compile(r"[0-9a-f]{40}")
_PAGE = re.compile(r"page-([0-9a-f]{40})\.kv")
_STATE = re.compile(r"state-([0-9]{3})-([0-9a-f]{40})\.kv")
_STATE_CHARS = len("state-127-.kv") + 2 * DIGEST_BYTES
_FAULT_COUNTERS = {
    Fault.TRUNCATED: "disk.corrupt",
    Fault.CORRUPT: "disk.corrupt",
    Fault.WRONG_NAME: "disk.corrupt",
    Fault.STALE: "disk.stale",
    Fault.FOREIGN: "disk.foreign",
}


class DiskTier:
    """Blobs as files, found by name. Any thread may call any method; several processes may use one directory.

    Nothing here raises for what the disk does, except the constructor (ConfigError: the directory cannot be
    used at all) and ``flush``: a blob that cannot be read is missing, one that cannot be written is dropped;
    both are logged and counted.
    """

    def __init__(self, root: str | Path, *, budget_bytes: int, layout: bytes, log: Log) -> None:
        self.counters = dict.fromkeys(
            (
                *("disk.saved", "disk.hit", "disk.miss", "disk.evicted", "disk.dropped", "disk.write_failed"),
                *("disk.read_failed", *sorted(set(_FAULT_COUNTERS.values()))),
            ),
            0,
        )
        self._root = os.path.join(root, f"v{FORMAT_VERSION}")
        self._temp = os.path.join(self._root, "tmp")
        self._format = BlobFormat(layout)
        self._log = log
        self._lock = threading.Lock()  # guards everything below; never held while a file is touched
        self._order = Recency()
        self._unsound: set[Key] = set()  # on disk, but not what we can read: the next save replaces it
        self._last_stamp = 0.0
        self._num_temps = 0
        self._scan_number = 0
        self._generation = 0  # of flushes: what a scan saw before one is not believed after it
        self._last_logged: dict[str, float] = {}
        self._room = DiskRoom(os.fspath(root), self._root, self._temp, budget_bytes=budget_bytes, log=log)
        self._stop = threading.Event()
        self._scanned = threading.Event()
        self._scanner = threading.Thread(target=self._scan_often, name="kv-disk-scan", daemon=True)
        self._scanner.start()

    @property
    def num_bytes(self) -> int:
        """Bytes of the files known: all of them after the first scan, headers included."""
        return self._order.num_bytes

    def has(self, namespace: bytes, name: BlobName) -> bool:
        """Whether there is a file of this name; what is in it, ``read`` finds out."""
        return self.file_bytes(namespace, name) is not None

    def file_bytes(self, namespace: bytes, name: BlobName) -> int | None:
        """Bytes of the file of this name; None if there is none. Files not seen by a scan yet, or written by
        another process, are found all the same: by one stat."""
        key = (namespace, name)
        if self._unsound and key in self._unsound:
            return None
        entry = self._order.get(key)
        if entry is not None:
            return entry.num_bytes
        try:
            found = os.stat(self._path(namespace, name), follow_symlinks=False)
        except OSError:
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def states(self, namespace: bytes, parent: bytes) -> list[tuple[int, bytes]]:
        """(offset, digest) of the states that continue from ``parent``: one listing of one directory."""
        try:
            files = os.listdir(self._node(namespace, parent))
        except OSError:
            return []
        # Cut, not matched: a directory may have thousands, and the engine waits.
        states = [file for file in files if len(file) == _STATE_CHARS and file.startswith("state-")]
        try:
            found = [(int(file[6:9]), bytes.fromhex(file[10:50])) for file in states]
        except ValueError:  # not all of them are ours
            found = [
                (int(match[1]), bytes.fromhex(match[2])) for match in map(_STATE.fullmatch, states) if match
            ]
        if not self._unsound:
            return found
        return [at for at in found if (namespace, BlobName("state", parent, *at)) not in self._unsound]

    def read(self, namespace: bytes, name: BlobName) -> bytes | None:
        """The payload, verified; None if it is not here, whatever the reason (logged and counted)."""
        path = self._path(namespace, name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            self._forget((namespace, name), "disk.miss")  # another process removed it, or it never was
            return None
        except OSError as error:
            self._read_failed(path, error)
            return None
        try:
            payload = self._payload(fd, namespace, name)
            if not isinstance(payload, Fault):
                with suppress(OSError):  # a directory that is only read keeps its times
                    os.utime(fd)
        except OSError as error:
            self._read_failed(path, error)
            return None
        finally:
            os.close(fd)
        if isinstance(payload, Fault):
            self._reject(path, (namespace, name), payload)
            return None
        with self._lock:
            self.counters["disk.hit"] += 1
            self._order.touch((namespace, name), self._now())
        return payload

    def write(self, namespace: bytes, name: BlobName, data: bytes) -> bool:
        """Put the blob on disk, unless it is there; False when it was dropped (logged and counted)."""
        key = (namespace, name)
        file_bytes = HEADER_BYTES + len(data)
        is_there = self.file_bytes(namespace, name) == file_bytes
        if not is_there and self._room.is_paused():
            self.drop(name)
            return False
        limit_bytes = self._room.limit_bytes(self._order.num_bytes)
        with self._lock:
            if is_there and key in self._order:
                self._order.touch(key, self._now())
                return True
            self._order.remove(key)  # of another size: it is replaced
            entry = Entry(key, file_bytes, self._now(), seen=self._scan_number)
            is_held, gone = self._order.admit(entry, limit_bytes)
        self._unlink(gone)
        if not is_held:
            self.count("disk.dropped")
            return False
        return is_there or self._put(key, data)

    def drop(self, name: BlobName) -> None:
        """Count a blob that was not written; what hangs on it will not be written either."""
        with self._lock:
            self._order.refuse(name)
            self.counters["disk.dropped"] += 1

    def touch(self, namespace: bytes, name: BlobName) -> None:
        """Count as used what was found in a faster tier. The file learns of it at the next scan."""
        with self._lock:
            self._order.touch((namespace, name), self._now())

    def flush(self, namespace: bytes | None) -> tuple[int, list[OSError]]:
        """Remove the files of one namespace, or all: how many went, and what could not be removed."""
        self._forget_all(namespace)
        removed = 0
        errors: list[OSError] = []
        for path in self._files(namespace, errors):
            try:
                os.unlink(path)
                removed += 1
            except FileNotFoundError:
                continue  # another process was faster
            except OSError as error:
                errors.append(error)
            else:
                with suppress(OSError):
                    os.rmdir(os.path.dirname(path))
        self._forget_all(namespace)  # also what a scan met meanwhile
        return removed, errors

    def wait_scanned(self, timeout_s: float) -> bool:
        """Whether the first scan ends within ``timeout_s`` seconds: from then on all files count."""
        return self._scanned.wait(timeout_s)

    def close(self) -> None:
        """End the background scan."""
        self._stop.set()
        self._scanner.join()

    def count(self, counter: str) -> None:
        with self._lock:
            self.counters[counter] += 1

    # Names.

    def _node(self, namespace: bytes, digest: bytes) -> str:
        """The directory of one place in the chain: the page that ends there, the states that go on there."""
        place = digest.hex()
        return f"{self._root}/{namespace.hex()}/{place[:2]}/{place}"

    def _path(self, namespace: bytes, name: BlobName) -> str:
        if name.kind == "page":
            return f"{self._node(namespace, name.digest)}/page-{name.parent.hex()}.kv"
        return f"{self._node(namespace, name.parent)}/state-{name.offset:03d}-{name.digest.hex()}.kv"

    # Reading.

    def _payload(self, fd: int, namespace: bytes, name: BlobName) -> bytes | Fault:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            return Fault.CORRUPT
        header = os.pread(fd, HEADER_BYTES, 0)
        length = self._format.payload_bytes(namespace, name, header, found.st_size)
        if isinstance(length, Fault):
            return length
        payload = os.pread(fd, length, HEADER_BYTES)
        while 0 < len(payload) < length:  # one call gives at most 2 GiB
            more = os.pread(fd, length - len(payload), HEADER_BYTES + len(payload))
            if not more:
                break
            payload += more
        if len(payload) < length:
            return Fault.TRUNCATED
        return payload if self._format.is_sound(header, payload) else Fault.CORRUPT

    def _reject(self, path: str, key: Key, fault: Fault) -> None:
        """A file that is not what its name says: removed if it is damaged, left if it may be another's."""
        self._warn("disk_cache_rejected", path=path, reason=fault.value)
        if _FAULT_COUNTERS[fault] == "disk.corrupt":
            with suppress(OSError):
                os.unlink(path)
                self._forget(key, _FAULT_COUNTERS[fault])
                return
        with self._lock:
            self._unsound.add(key)
            self.counters[_FAULT_COUNTERS[fault]] += 1

    def _forget(self, key: Key, counter: str) -> None:
        with self._lock:
            self._order.remove(key)
            self.counters[counter] += 1

    def _forget_all(self, namespace: bytes | None) -> None:
        """Forget the files of one namespace, or of all, and have a scan under way start again."""
        with self._lock:
            self._generation += 1
            for key in self._order.keys():
                if namespace in (None, key[0]):
                    self._order.remove(key)
            self._unsound = {key for key in self._unsound if namespace not in (None, key[0])}

    def _read_failed(self, path: str, error: OSError) -> None:
        self.count("disk.read_failed")
        self._warn("disk_cache_read_failed", path=path, error=error.strerror)

    # Writing.

    def _put(self, key: Key, data: bytes) -> bool:
        """Write under a temporary name, then rename: a reader sees the whole file or none."""
        namespace, name = key
        path = self._path(namespace, name)
        try:
            self._write_file(path, (self._format.header(namespace, name, data), data))
        except OSError as error:
            with self._lock:
                self._order.remove(key)
                self._order.refuse(name)
                self.counters["disk.write_failed"] += 1
            self._room.failed(error, self._order.num_bytes)
            return False
        self._room.worked()
        with self._lock:
            self._unsound.discard(key)
            self.counters["disk.saved"] += 1
        return True

    def _write_file(self, path: str, parts: tuple[bytes, ...]) -> None:
        with self._lock:
            self._num_temps += 1
            temp = f"{self._temp}/{os.getpid()}-{self._num_temps}-{os.urandom(4).hex()}.part"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            fd = os.open(temp, flags, 0o666)
        except FileNotFoundError:  # somebody emptied the directory
            os.makedirs(self._temp, exist_ok=True)
            fd = os.open(temp, flags, 0o666)
        try:
            try:
                for part in parts:
                    view = memoryview(part)
                    while view:
                        view = view[os.write(fd, view) :]
            finally:
                os.close(fd)  # reports what a network file system could not write
            self._rename(temp, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temp)
            raise

    def _rename(self, temp: str, path: str) -> None:
        for _ in range(3):  # between the two calls, an eviction may remove the empty directory
            with suppress(FileNotFoundError):
                os.rename(temp, path)
                return
            os.makedirs(os.path.dirname(path), exist_ok=True)
        os.rename(temp, path)

    def _unlink(self, gone: list[Entry]) -> None:
        """Remove the files of entries that the order holds no longer."""
        for entry in gone:
            path = self._path(*entry.key)
            self.count("disk.evicted")
            # One that stays (a directory that is only read) is counted again by the next scan.
            with suppress(OSError):
                os.unlink(path)
                os.rmdir(os.path.dirname(path))

    def _now(self) -> float:
        """Seconds since 1970, never less than before; called with the lock held."""
        self._last_stamp = max(time.time(), self._last_stamp)
        return self._last_stamp

    # Scanning.

    def _scan_often(self) -> None:
        self._sweep_temps()
        while not self._stop.is_set():
            started = time.monotonic()
            if self._scan() and not self._scanned.is_set():
                self._scanned.set()
                self._log.info(
                    "disk_cache",
                    directory=self._root,
                    files=len(self._order),
                    bytes=self._order.num_bytes,
                    scan_s=time.monotonic() - started,
                )
            if self._scanned.is_set():
                self._stop.wait(SCAN_EVERY_S)

    def _scan(self) -> bool:
        """Learn of every file there is and forget those that are gone; then keep the budget. False when a
        flush or the end came between."""
        with self._lock:
            generation = self._generation
            self._scan_number += 1
        for namespace in self._namespaces([]):
            for fan in _listed(f"{self._root}/{namespace.hex()}", re.compile(r"[0-9a-f]{2}"), []):
                began = time.monotonic()
                for node in _listed(fan, _HEX, []):
                    if not self._scan_node(namespace, node, generation):
                        return False
                if self._stop.wait((_SCAN_SHARE - 1) * (time.monotonic() - began)):
                    return False
        limit_bytes = self._room.limit_bytes(self._order.num_bytes)
        gone = []
        with self._lock:
            if generation != self._generation:
                return False
            for entry in self._order.entries():
                if entry.seen < self._scan_number:
                    self._order.remove(entry.key)
            while self._order.num_bytes > limit_bytes and not self._room.is_paused():
                oldest = self._order.oldest()
                assert oldest is not None, "there are bytes, so there is an entry"
                self._order.remove(oldest.key)
                gone.append(oldest)
        self._unlink(gone)
        return True

    def _scan_node(self, namespace: bytes, node: str, generation: int) -> bool:
        """One directory's files into the order. False when a flush came between."""
        digest = bytes.fromhex(os.path.basename(node))
        found = []
        with suppress(OSError), os.scandir(node) as files:
            for file in files:
                name = _blob_name(digest, file.name)
                if name is not None:
                    with suppress(OSError):
                        found.append(((namespace, name), file.path, file.stat(follow_symlinks=False)))
        used = []
        with self._lock:
            if generation != self._generation:
                return False
            now = self._now()
            for key, path, facts in found:
                entry = self._order.get(key)
                if entry is None:
                    entry = Entry(key, facts.st_size, 0.0)
                    self._order.add(entry)
                entry.seen = self._scan_number
                entry.stamp = max(entry.stamp, min(facts.st_mtime, now))
                if entry.stamp > facts.st_mtime + SCAN_EVERY_S:
                    used.append((path, entry.stamp))
        for path, stamp in used:  # uses in faster tiers, for the next process to know
            with suppress(OSError):
                os.utime(path, (stamp, stamp))
        return True

    def _sweep_temps(self) -> None:
        """Remove what writers that were killed left behind."""
        for path in _listed(self._temp, re.compile(r".+\.part"), []):
            with suppress(OSError):
                if time.time() - os.stat(path).st_mtime > OLD_TEMP_S:
                    os.unlink(path)

    def _namespaces(self, errors: list[OSError]) -> list[bytes]:
        return [bytes.fromhex(os.path.basename(path)) for path in _listed(self._root, _HEX, errors)]

    def _files(self, namespace: bytes | None, errors: list[OSError]) -> Iterator[str]:
        """Every blob file of one namespace or all; what cannot be listed goes to ``errors``."""
        for one in self._namespaces(errors) if namespace is None else [namespace]:
            for fan in _listed(f"{self._root}/{one.hex()}", re.compile(r"[0-9a-f]{2}"), errors):
                for node in _listed(fan, _HEX, errors):
                    yield from _listed(node, re.compile(f"{_PAGE.pattern}|{_STATE.pattern}"), errors)

    def _warn(self, event: str, **fields: object) -> None:
        """A log line, at most one of an event in ten seconds: the counters have them all."""
        now = time.monotonic()
        if now >= self._last_logged.get(event, -10.0) + 10.0:
            self._last_logged[event] = now
            self._log.warning(event, **fields)


def _listed(directory: str, pattern: re.Pattern[str], errors: list[OSError]) -> list[str]:
    """Paths of the entries of ``directory`` whose whole name fits; other names are not ours to touch."""
    try:
        return [f"{directory}/{name}" for name in sorted(os.listdir(directory)) if pattern.fullmatch(name)]
    except OSError as error:
        if error.errno != errno.ENOENT:
            errors.append(error)
        return []


def _blob_name(digest: bytes, file: str) -> BlobName | None:
    """The blob of a file in the directory of ``digest``; None for names that are no blob's."""
    page = _PAGE.fullmatch(file)
    if page is not None:
        return BlobName("page", bytes.fromhex(page[1]), PAGE_TOKENS, digest)
    state = _STATE.fullmatch(file)
    if state is not None:
        return BlobName("state", digest, int(state[1]), bytes.fromhex(state[2]))
    return None
