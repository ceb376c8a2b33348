"""CSA rows in a memory-mapped file, of which a bounded part is in memory."""

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bittrue.errors import ConfigError, KVCorrupted
from bittrue.kv.layout import CachePart, KVLayout, LayerLayout
from bittrue.kv.pool import Allocator, plain_memory

Indices = npt.NDArray[np.int64]

OS_PAGE_BYTES = mmap.PAGESIZE
# A read fault maps cached neighbours too, within an aligned window of this size (the kernel's fault-around).
FAULT_BYTES = 1 << 16
# After letting go, this part of the hot set is free for the faults before the next time.
FREED_SHARE = 0.25

# linux/fs.h: ask for the ranges of an address space that are present, Linux 6.7 and later.
_PAGEMAP_SCAN = (3 << 30) | (96 << 16) | (ord("f") << 8) | 16
_SCAN_ARGUMENT = struct.Struct("12Q")
_PAGE_IS_PRESENT = 1 << 3
_PAGEMAP_PRESENT = np.uint64(1 << 63)
# fcntl.h: what sync_file_range is to do.
_WAIT_BEFORE, _WRITE = 1, 2


class RowStore(Protocol):
    """Where rows that are kept off the device lie: what a pool, an engine and the metrics ask of it.

    ``allocator()``: for one ``kv.pool.allocate``; tensors of parts that are not offloaded are plain memory.
    ``after_step``: called between steps with the pages of the sequences that ran and of the moves before
    them; brings the device's share back to its bound. ``resident_bytes``: the device's share now.
    ``close``: gives everything back that the tensors do not need any more.
    """

    def allocator(self) -> Allocator: ...
    def after_step(self, page_ids: Iterable[Sequence[int]]) -> None: ...
    def resident_bytes(self) -> int: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class OffloadFile:
    """The offloaded parts of a pool, each a tensor over one shared mapping of a file without a name.

    The kernels read and write rows where they lie; the operating system brings in what they touch. So bits
    are the same by construction, and what this class keeps is a bound:

    - When ``after_step`` returns, at most ``hot_bytes`` of the mapping are resident (RSS). During a step,
      what the step touches comes on top.
    - What is let go is at once no memory of the process; dirty rows begin their way to the disk then, and at
      the next letting go it is checked that they arrived. Until the kernel wants the memory for something
      else, the file's cache still has them, and a row that is wanted again comes back without reading.
    - Pages go in the order of their last use by a sequence; of pages equally old, in a circle.
    - The room on disk is reserved at the start: a full disk is an error then, and never later. (File systems
      that cannot reserve, such as those that copy on write, can still end a process with SIGBUS.)
    - The file never has a name, so nothing is left of it however the process ends.

    Measuring is by counting faults, few when the hot set fits: tens of microseconds a step. Only where so
    many came that the bound could be passed is the kernel asked which pages are present; that and letting
    go take about as long as the faults took (8 ms with 256 MiB hot, after a thousand faults).
    """

    layout: KVLayout
    num_pages: int
    hot_bytes: int
    is_in_memory: bool  # the directory's file system keeps files in memory: nothing is saved there
    _fd: int
    mapping: mmap.mmap
    _offsets: Indices
    _page_bytes: Indices  # bytes of a KV page, by offloaded layer
    present_pages: Callable[[], Indices]  # those of the mapping that are resident, ascending
    _last_used: Indices
    _step: int = 0
    _measured: int = 0
    _faults: int = 0
    _hand: int = 0
    _on_their_way: list[tuple[int, int]] = field(default_factory=list)
    _arrays: dict[int, tuple[Sequence[int], Indices]] = field(default_factory=dict)

    @classmethod
    def create(cls, directory: str | Path, layout: KVLayout, *, pages: int, hot_bytes: int) -> "OffloadFile":
        """The file for ``pages`` pages of ``layout`` (made with ``offload``), in ``directory``.

        Raises ConfigError where the model has no such rows, the directory cannot be written, or the file
        does not fit.
        """
        num_bytes = layout.offload_file_bytes(pages)
        if num_bytes == 0:
            raise ConfigError(
                "this model has no CSA rows that could be kept off memory; leave --offload-dir empty",
                field="offload_dir",
            )
        fd = _reserve(Path(directory), num_bytes)
        mapping = mmap.mmap(fd, num_bytes)
        # Rows are chosen one by one: what lies behind a row in the file is no guess at the next.
        mapping.madvise(mmap.MADV_RANDOM)
        with suppress(OSError):  # a kernel that has no huge pages refuses, and maps none
            mapping.madvise(mmap.MADV_NOHUGEPAGE)
        sizes = [layer.offloaded_page_bytes for layer in layout.layers if layer.offloaded_page_bytes]
        return cls(
            layout=layout,
            num_pages=pages,
            hot_bytes=hot_bytes,
            is_in_memory=_is_in_memory(fd),
            _fd=fd,
            mapping=mapping,
            _offsets=np.array(layout.offload_offsets(pages), dtype=np.int64),
            _page_bytes=np.array(sizes, dtype=np.int64),
            present_pages=present_pages_of(mapping),
            _last_used=np.zeros(pages, dtype=np.int64),
            _faults=_num_faults(),
        )

    @property
    def file_bytes(self) -> int:
        return int(self._offsets[-1])

    def allocator(self) -> Allocator:
        """Deals the regions of the file to the offloaded parts, in the order of the layers."""
        offsets = iter(self._offsets[:-1].tolist())

        def allocate(layer: LayerLayout, part: CachePart, shape: tuple[int, ...]) -> Tensor:
            if not part.offloaded:
                return plain_memory(layer, part, shape)
            assert shape == (self.num_pages, *part.shape), "the file was made for another number of pages"
            count = self.num_pages * part.bytes
            return torch.frombuffer(self.mapping, dtype=torch.uint8, count=count, offset=next(offsets)).view(
                shape
            )

        return allocate

    def after_step(self, page_ids: Iterable[Sequence[int]]) -> None:
        """Marks ``page_ids`` (one sequence of KV pages each) as used now; lets go of cold rows where more
        than ``hot_bytes`` may be resident. A tuple that comes again step by step is taken apart once.

        Raises KVCorrupted where the disk did not take rows that were let go before.
        """
        self._step += 1
        arrays = {}
        for pages in page_ids:
            known = self._arrays.get(id(pages))
            if known is None or not isinstance(pages, tuple):
                known = (pages, np.array(pages, dtype=np.int64))
            arrays[id(pages)] = known
            self._last_used[known[1]] = self._step
        self._arrays = arrays
        at_most = self._measured + (_num_faults() - self._faults) * FAULT_BYTES
        if min(at_most, self.file_bytes) > self.hot_bytes:
            self.trim()

    def trim(self) -> None:
        """Measures, and lets go of the coldest pages where more than ``hot_bytes`` are resident."""
        self._faults = _num_faults()
        present = self.present_pages()
        if len(present) * OS_PAGE_BYTES > self.hot_bytes:
            keep = int(self.hot_bytes * (1 - FREED_SHARE)) // OS_PAGE_BYTES
            goes = self._coldest(present, len(present) - keep)
            self._let_go(_runs(present, goes))
            present = present[~goes]
        self._measured = len(present) * OS_PAGE_BYTES

    def resident_bytes(self) -> int:
        """Bytes of the mapping that are memory of this process, as the kernel says."""
        return len(self.present_pages()) * OS_PAGE_BYTES

    def close(self) -> None:
        """Nothing stays resident. The room on disk is free once the last tensor is gone; what tensors there
        are can be read until then."""
        self.mapping.madvise(mmap.MADV_DONTNEED)
        os.close(self._fd)

    # ---- letting go --------------------------------------------------------------------------------------

    def _coldest(self, present: Indices, count: int) -> npt.NDArray[np.bool_]:
        """Marks the ``count`` pages to let go: least recently used first, equals onward from the hand."""
        num = self.file_bytes // OS_PAGE_BYTES
        key = self._used(present) * num + (present - self._hand) % num
        chosen = np.argpartition(key, count - 1)[:count]
        self._hand = int(present[chosen[np.argmax(key[chosen])]] + 1) % num
        goes = np.zeros(len(present), dtype=np.bool_)
        goes[chosen] = True
        return goes

    def _used(self, present: Indices) -> Indices:
        """The step that last used each page: the later one, where two KV pages share it."""
        begin = present * OS_PAGE_BYTES
        layer = np.searchsorted(self._offsets, begin, side="right") - 1
        within, size = begin - self._offsets[layer], self._page_bytes[layer]
        first = np.minimum(within // size, self.num_pages - 1)
        last = np.minimum((within + OS_PAGE_BYTES - 1) // size, self.num_pages - 1)
        used: Indices = np.maximum(self._last_used[first], self._last_used[last])
        return used

    def _let_go(self, runs: list[tuple[int, int]]) -> None:
        for start, size in self._on_their_way:
            self._sync(start, size, _WAIT_BEFORE)
        self._on_their_way = runs
        for start, size in runs:
            # On a shared mapping this takes the pages out of the process; what they hold stays in the file.
            self.mapping.madvise(mmap.MADV_DONTNEED, start, size)
            self._sync(start, size, _WRITE)

    def _sync(self, start: int, size: int, what: int) -> None:
        if sync_file_range(self._fd, start, size, what) != 0:
            code = ctypes.get_errno()
            raise KVCorrupted(
                f"rows of the offload file are lost: the disk answered {os.strerror(code)!r}; restart on a "
                "sound disk, with another --offload-dir or none"
            )


def _runs(present: Indices, goes: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(start, size) in bytes of the stretches of the file that hold only pages to let go, and absent ones."""
    edges = np.flatnonzero(np.diff(goes, prepend=False, append=False))
    begin, end = edges[0::2], edges[1::2] - 1
    starts = present[begin] * OS_PAGE_BYTES
    sizes = (present[end] + 1) * OS_PAGE_BYTES - starts
    return list(zip(starts.tolist(), sizes.tolist(), strict=True))


# ---- the file --------------------------------------------------------------------------------------------


def _reserve(directory: Path, num_bytes: int) -> int:
    """A file of ``num_bytes`` without a name, its room on disk reserved."""
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            disk = os.fstatvfs(file.fileno())
            # What cannot fit is not tried: others that write there would meet a full disk meanwhile.
            if num_bytes > disk.f_bavail * disk.f_frsize:
                raise OSError(errno.ENOSPC, f"{disk.f_bavail * disk.f_frsize} are free")
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            return os.dup(file.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise ConfigError(
                f"the offload file takes {num_bytes} bytes, but {directory} has no room for it "
                f"({error.strerror}); make room, name another --offload-dir, or lower --kv-memory",
                field="offload_dir",
            ) from None
        raise ConfigError(
            f"no offload file can be made in {directory}: {error.strerror}; --offload-dir names a "
            "directory that can be written",
            field="offload_dir",
        ) from None


def _is_in_memory(fd: int) -> bool:
    """Whether the file lies on a tmpfs or ramfs, by the table of mounts."""
    device = os.fstat(fd).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split()
        if fields[2] == number:
            return fields[fields.index("-") + 1] in ("tmpfs", "ramfs")
    return False


def _num_faults() -> int:
    """Page faults of this process so far: no page of a mapping becomes resident without one."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt + usage.ru_majflt


_libc: Any = ctypes.CDLL(None, use_errno=True)


def sync_file_range(fd: int, start: int, size: int, what: int) -> int:
    function = _libc.sync_file_range
    return int(function(fd, ctypes.c_int64(start), ctypes.c_int64(size), ctypes.c_uint(what)))


# ---- what is present -------------------------------------------------------------------------------------


def present_pages_of(mapping: mmap.mmap) -> Callable[[], Indices]:
    """A function that lists the pages of ``mapping`` that are resident, ascending: by a scan of the kernel's,
    or where the kernel (before 6.7) has none, by reading its page map, 1.6 ms per GiB."""
    try:
        next(scanned(mapping))
    except StopIteration:
        return lambda: joined(scanned(mapping))
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
        return lambda: joined(read_page_map(mapping))
    return lambda: joined(scanned(mapping))


def joined(parts: Iterator[Indices]) -> Indices:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def scanned(mapping: mmap.mmap) -> Iterator[Indices]:
    base, end = _bounds(mapping)
    ranges = np.empty((1 << 12, 3), dtype=np.uint64)
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        start = base
        while start < end:
            to, room = ranges.ctypes.data, len(ranges)
            argument = bytearray(
                _SCAN_ARGUMENT.pack(
                    96, 0, start, end, 0, to, room, 0, 0, _PAGE_IS_PRESENT, 0, _PAGE_IS_PRESENT
                )
            )
            count = fcntl.ioctl(file.fileno(), _PAGEMAP_SCAN, argument)
            start = _SCAN_ARGUMENT.unpack(argument)[4]
            found = (ranges[:count, :2].astype(np.int64) - base) // OS_PAGE_BYTES
            lengths = found[:, 1] - found[:, 0]
            before = np.cumsum(lengths) - lengths
            yield np.arange(lengths.sum()) + np.repeat(found[:, 0] - before, lengths)


def read_page_map(mapping: mmap.mmap) -> Iterator[Indices]:
    base, end = _bounds(mapping)
    words = np.empty(1 << 16, dtype=np.uint64)
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        for first in range(0, (end - base) // OS_PAGE_BYTES, len(words)):
            part = words[: (end - base) // OS_PAGE_BYTES - first]
            got = os.preadv(file.fileno(), [part.data.cast("B")], (base // OS_PAGE_BYTES + first) * 8)
            assert got == part.nbytes, "the page map ends before the mapping"
            yield first + np.flatnonzero(part & _PAGEMAP_PRESENT)


def _bounds(mapping: mmap.mmap) -> tuple[int, int]:
    """First and last address."""
    base = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
    return base, base + len(mapping)
