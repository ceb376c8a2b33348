"""The CPU backend's OpTable: every op bound to the compiled kernels of one instruction set."""

from bittrue.ops.contracts import OpTable
from bittrue.ops.cpu.cache import cache_ops
from bittrue.ops.cpu.library import Kernels
from bittrue.ops.cpu.matrix import matrix_ops
from bittrue.ops.cpu.vector import vector_ops


def cpu_table(kernels: Kernels) -> OpTable:
    """All ops on ``kernels``. Raises BackendUnavailable when the library lacks one."""
    return OpTable(
        name=f"cpu:{kernels.isa}", **matrix_ops(kernels), **vector_ops(kernels), **cache_ops(kernels)
    )
