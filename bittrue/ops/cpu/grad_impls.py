"""The CPU backend's GradTable: every backward op bound to the compiled kernels of one instruction set."""

from typing import Any

from bittrue.ops.cpu.grad_cache import cache_gradients
from bittrue.ops.cpu.grad_matrix import matrix_gradients
from bittrue.ops.cpu.grad_vector import vector_gradients
from bittrue.ops.cpu.library import Kernels
from bittrue.ops.gradients import GradTable


def cpu_gradients(kernels: Kernels) -> GradTable:
    """All backward ops on ``kernels``. Raises BackendUnavailable when the library lacks one."""
    ops: dict[str, Any] = {
        **vector_gradients(kernels),
        **matrix_gradients(kernels),
        **cache_gradients(kernels),
    }
    return GradTable(name=f"cpu:{kernels.isa}", **ops)
