"""An OpTable that times every call of its ops."""

import time
from collections.abc import Callable
from typing import Any

from bittrue.obs.trace import OpTimes
from bittrue.ops.contracts import OpTable


def traced(table: OpTable, times: OpTimes) -> OpTable:
    """``table`` with a clock around every op; the bits are the same. ``Captured.time`` is that of captured
    steps."""
    return table.with_ops(**{name: _timed(name, getattr(table, name), times) for name in table.op_names()})


def _timed(name: str, op: Callable[..., Any], times: OpTimes) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = op(*args, **kwargs)
        times.add(name, time.perf_counter() - start)
        return result

    return timed
