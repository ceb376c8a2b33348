"""How many CPU threads the ops of this process use. No result ever depends on it (law L8)."""

import torch

from bittrue.ops.contracts import OpTable
from bittrue.ops.cpu.library import load_kernels


def threads_of(ops: OpTable) -> int:
    """The threads that the kernels of a CPU table use, or torch for the reference."""
    if ops.name.startswith("cpu:"):
        return load_kernels(ops.name.removeprefix("cpu:")).threads
    return torch.get_num_threads()


def set_threads(ops: OpTable, threads: int) -> None:
    """Lets torch and, for a CPU table, its kernels use ``threads`` threads from now on."""
    torch.set_num_threads(threads)
    set_kernel_threads(ops, threads)


def set_kernel_threads(ops: OpTable, threads: int) -> None:
    """The same for the kernels alone; a table without kernels has none to set."""
    if ops.name.startswith("cpu:"):
        load_kernels(ops.name.removeprefix("cpu:")).set_threads(threads)
