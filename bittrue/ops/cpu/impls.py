"""The CPU backend's OpTable: every op bound to the compiled kernels of one instruction set."""

from dataclasses import replace
from typing import Any

from bittrue.ops.contracts import OpTable
from bittrue.ops.cpu.cache import cache_ops
from bittrue.ops.cpu.capture import CpuCapture
from bittrue.ops.cpu.library import Kernels
from bittrue.ops.cpu.matrix import matrix_ops
from bittrue.ops.cpu.vector import vector_ops


def cpu_table(kernels: Kernels) -> OpTable:
    """All ops on ``kernels``. Raises BackendUnavailable when the library lacks one."""
    table = _ops(kernels)
    return replace(table, capture=CpuCapture(kernels, table, _ops))


def _ops(kernels: Kernels) -> OpTable:
    ops: dict[str, Any] = {**matrix_ops(kernels), **vector_ops(kernels), **cache_ops(kernels)}
    return OpTable(name=f"cpu:{kernels.isa}", **ops)
