"""Captures the kernel calls of a function once, and replays them with one call: no Python between the ops.

The function runs with ops whose kernels are written down instead of called. Its tensors keep their addresses,
so a replay reads the inputs and writes the results in place. The bits are those of the direct call: the same
kernels in the same order on the same arguments.
"""

import ctypes
import math
import struct
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bittrue.config.formats import ceil_div
from bittrue.errors import BackendUnavailable
from bittrue.ops.contracts import OpTable
from bittrue.ops.cpu.library import BUILD_REMEDY, F32, LIBRARY_PATH, PTR, Kernel, Kernels

# What a captured function may ask of torch besides memory: other shapes of it.
_VIEWS = frozenset(
    {"view", "_unsafe_view", "slice", "select", "unsqueeze", "squeeze", "alias", "detach", "t"}
)
# Of address space: a block takes memory only where something is written. One block holds all captures, or
# nearly: in blocks just large enough, each capture with one row more than the last would need another.
_BLOCK_BYTES = 64 << 20
_ALIGNMENT = 64


class Lease:
    """A span of the workspace, held while a tensor over it lives: it carries the lease as an attribute."""

    __slots__ = ("_generation", "_span", "_workspace")

    def __init__(self, workspace: "Workspace", span: "_Span") -> None:
        self._workspace, self._span = workspace, span
        self._generation = workspace.generation

    def __del__(self) -> None:
        if self._generation == self._workspace.generation:
            self._workspace.give_back(self._span)


class _Span(NamedTuple):
    """Bytes ``start`` to ``end`` of a block."""

    block: int
    start: int
    end: int


class Workspace:
    """Memory that captured functions write to, one after the other: each starts with all of it free.

    While a function is captured, what its tensors no longer need goes to the ops that follow: calls are
    replayed in order, so who writes there later does so after the last reader.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._blocks: list[Tensor] = []
        self._free: list[_Span] = []  # in order, none touching the next

    @property
    def num_bytes(self) -> int:
        """Of address space; of memory, what the largest capture used."""
        return sum(block.nbytes for block in self._blocks)

    def rewind(self) -> None:
        """Frees everything: tensors of earlier captures are overwritten when the next is replayed."""
        self.generation += 1
        self._free = [_Span(i, 0, block.nbytes) for i, block in enumerate(self._blocks)]

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of the first free bytes that suffice, not cleared."""
        num_bytes = math.prod(shape) * dtype.itemsize
        size = max(1, ceil_div(num_bytes, _ALIGNMENT)) * _ALIGNMENT
        place = next((i for i, span in enumerate(self._free) if span.end - span.start >= size), None)
        if place is None:
            place = self._add_block(max(_BLOCK_BYTES, size))
        block, start, end = self._free[place]
        self._free[place : place + 1] = [_Span(block, start + size, end)] if start + size < end else []
        made = self._blocks[block][start : start + num_bytes].view(dtype).view(shape)
        made.lease = Lease(self, _Span(block, start, start + size))  # type: ignore[attr-defined]
        return made

    def give_back(self, span: _Span) -> None:
        insort(self._free, span)
        joined: list[_Span] = []
        for each in self._free:
            if joined and joined[-1].block == each.block and joined[-1].end == each.start:
                joined[-1] = _Span(each.block, joined[-1].start, each.end)
            else:
                joined.append(each)
        self._free = joined

    def _add_block(self, size: int) -> int:
        """A new block; returns its place among the free spans."""
        # An array of numpy's starts where it likes: begin at a cache line.
        raw = torch.from_numpy(np.empty(size + _ALIGNMENT, dtype=np.uint8))
        self._blocks.append(raw[-raw.data_ptr() % _ALIGNMENT :][:size])
        self._free.append(_Span(len(self._blocks) - 1, 0, size))
        return len(self._free) - 1


@dataclass(frozen=True, slots=True)
class CapturedCalls:
    """A captured function: ``replay()`` computes ``result`` again from what its inputs hold now.

    Results are overwritten by the next replay of any function captured by the same table.
    """

    result: Any
    calls: tuple[str, ...]  # the kernels, in order
    _library: ctypes.CDLL
    _program: np.ndarray  # u64, see csrc/program.cpp
    _address: ctypes.c_void_p
    _count: ctypes.c_int64
    _kept: tuple[Any, ...]  # what the program points to

    def replay(self) -> Any:
        self._library.bittrue_run_program(self._address, self._count)
        return self.result

    def time(self) -> list[tuple[str, float]]:
        """Replays once with a clock around every call: (kernel, seconds) in order."""
        nanoseconds = np.zeros(len(self.calls), dtype=np.int64)
        target = ctypes.c_void_p(nanoseconds.ctypes.data)
        self._library.bittrue_time_program(self._address, self._count, target)
        return [(name, ns * 1e-9) for name, ns in zip(self.calls, nanoseconds.tolist(), strict=True)]


@dataclass(frozen=True, slots=True)
class _WritingKernels(Kernels):
    """Kernels that write down how they are called."""

    slots: list[int] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def bind(self, name: str, *argtypes: type) -> Kernel:
        symbol = f"bittrue_{name}_{self.isa}_replay"
        try:
            address = ctypes.cast(self.library[symbol], ctypes.c_void_p).value
        except AttributeError:
            address = None

        def write_down(*args: Any) -> None:
            if address is None:
                raise BackendUnavailable(
                    f"{LIBRARY_PATH.name} has no {symbol}, so no captured step can hold it; {BUILD_REMEDY}"
                )
            assert len(args) == len(argtypes), f"{name} takes {len(argtypes)} arguments, not {len(args)}"
            self.slots.extend((address, len(args)))
            self.slots.extend(self._slot(value, kind) for value, kind in zip(args, argtypes, strict=True))
            self.calls.append(name)

        return write_down

    def _slot(self, value: Any, kind: type) -> int:
        if kind is F32:
            return int(struct.unpack("<I", struct.pack("<f", value))[0])
        if kind is PTR and not isinstance(value, int):
            structure = value._obj  # of ctypes.byref
            self.kept.append(structure)
            return ctypes.addressof(structure)
        return int(value) & 0xFFFF_FFFF_FFFF_FFFF


class _OnlyMemory(TorchDispatchMode):
    """Gives memory of the workspace and refuses to compute: a replay would leave that out."""

    def __init__(self, workspace: Workspace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._workspace = workspace

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import its compiler to tell it to leave this mode alone: 2 s and 65 MiB at the first
        # decode step, and nothing here is ever compiled.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name == "empty":
            return self._workspace.take(tuple(args[0]), kwargs.get("dtype") or torch.float32)
        if name == "empty_like":
            return self._workspace.take(tuple(args[0].shape), args[0].dtype)
        if name in _VIEWS:
            made = func(*args, **kwargs)
            if hasattr(args[0], "lease"):
                made.lease = args[0].lease
            return made
        raise RuntimeError(f"a captured step may only call kernels, but it calls torch's {name}")


class CpuCapture:
    """Captures functions of ``table``, which ``table_of(kernels)`` made."""

    def __init__(self, kernels: Kernels, table: OpTable, table_of: Callable[[Kernels], OpTable]) -> None:
        self._kernels = kernels
        self._table = table
        self._table_of = table_of
        self._workspace = Workspace()
        self.count = 0

    def covers(self, table: OpTable) -> bool:
        """Whether every op of ``table`` is one that a capture would hold."""
        return all(getattr(table, name) is getattr(self._table, name) for name in table.op_names())

    def __call__(self, function: Callable[[OpTable], Any]) -> CapturedCalls:
        self.count += 1
        kernels = _WritingKernels(self._kernels.isa, self._kernels.library)
        table = self._table_of(kernels)
        self._workspace.rewind()
        with _OnlyMemory(self._workspace):
            result = function(table)
        program = np.array(kernels.slots, dtype=np.uint64)
        return CapturedCalls(
            result=result,
            calls=tuple(kernels.calls),
            _library=self._kernels.library,
            _program=program,
            _address=ctypes.c_void_p(program.ctypes.data),
            _count=ctypes.c_int64(len(kernels.calls)),
            _kept=(*kernels.kept, function, self._workspace),
        )
