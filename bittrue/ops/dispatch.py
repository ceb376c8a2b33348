"""Chooses one implementation of every op, once, at start-up: what was asked for or an error."""

import hashlib

import torch

from bittrue.errors import ConfigError
from bittrue.ops.contracts import OpTable
from bittrue.ops.cpu.grad_impls import cpu_gradients
from bittrue.ops.cpu.impls import cpu_table
from bittrue.ops.cpu.library import LIBRARY_PATH, available_isas, load_kernels
from bittrue.ops.gradients import GradTable
from bittrue.ops.ref.grad_table import reference_gradients
from bittrue.ops.ref.table import reference_table

BACKENDS = ("reference", "cpu")


def select(backend: str, *, isa: str | None = None, threads: int | None = None) -> OpTable:
    """The OpTable of ``backend`` (one of BACKENDS).

    ``isa`` and ``threads`` belong to the CPU backend: the instruction set (default the best this processor
    runs) and the threads of its kernels, for the whole process (default one per processor it may run on).
    ConfigError for an unknown name or an option the backend has not, BackendUnavailable when it cannot run
    here.
    """
    if backend == "reference":
        for name, value in (("isa", isa), ("threads", threads)):
            if value is not None:
                raise ConfigError(f"the reference backend has no option {name!r}; leave it out", field=name)
        return reference_table()
    if backend == "cpu":
        kernels = load_kernels(isa)
        if threads is not None:
            kernels.set_threads(threads)
        return cpu_table(kernels)
    raise ConfigError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}", field="backend")


def select_gradients(table: OpTable) -> GradTable:
    """The backward ops of the backend that ``table`` (of ``select``) belongs to. BackendUnavailable when it
    has none."""
    if table.name.startswith("cpu:"):
        return cpu_gradients(load_kernels(table.name.removeprefix("cpu:")))
    return reference_gradients()


def describe(table: OpTable) -> str:
    """One line for the start-up log: the backend, and for the CPU its instruction set and threads."""
    if not table.name.startswith("cpu:"):
        return f"{table.name} ops in PyTorch"
    isas = ", ".join(available_isas())
    return f"{table.name} ops, {load_kernels().threads} threads (this processor runs {isas})"


def build_of(table: OpTable) -> str:
    """Names the compiled kernels behind a table (two builds may differ in bits); for the reference, torch's
    version."""
    if not table.name.startswith("cpu:"):
        return f"torch {torch.__version__}"
    return hashlib.blake2b(LIBRARY_PATH.read_bytes(), digest_size=16).hexdigest()
