"""Crew: micro-batches side by side, one thread each, their results in order.

Ops on a few thousand tokens are too short to share among threads well; whole micro-batches are not. Every
kernel gives the same bits on any number of threads and results are added in order of the micro-batches, so
how many work at a time changes no bit.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

from bittrue.ops.contracts import OpTable
from bittrue.ops.threads import set_kernel_threads, threads_of

Item = TypeVar("Item")
Result = TypeVar("Result")


class Crew:
    """As many workers as the ops have threads."""

    def __init__(self, ops: OpTable) -> None:
        self._ops = ops
        self._pool: ThreadPoolExecutor | None = None
        self._size = 0

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """``work`` of every item, in order. What a call raises is raised here, when those under way ended."""
        threads = threads_of(self._ops)
        if self._pool is None or self._size != threads:
            self._size = threads
            # Torch's own loops stay in the worker's thread: their sums then do not depend on the crew either.
            self._pool = ThreadPoolExecutor(threads, "crew", initializer=lambda: torch.set_num_threads(1))
        # With fewer items than workers the kernels use the threads that are left over.
        with _kernel_threads(self._ops, 1 if len(items) >= threads else threads):
            futures = [self._pool.submit(work, item) for item in items]
            try:
                results = [future.result() for future in futures]
            finally:  # after an error nothing may go on behind the caller's back
                for future in futures:
                    future.cancel()
                wait(futures)
            yield from results


@contextmanager
def _kernel_threads(ops: OpTable, threads: int) -> Iterator[None]:
    before = threads_of(ops)
    set_kernel_threads(ops, threads)
    try:
        yield
    finally:
        set_kernel_threads(ops, before)
