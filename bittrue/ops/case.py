"""What a case of an op is: seeded inputs, the error allowed and why, and the invariance the op must keep."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bittrue.ops.contracts import OpTable
from bittrue.ops.numeric import Difference, first_difference


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one call of an op."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Allowed |error| = relative * |reference| + magnitude * (the case's magnitude or 1); integers exact."""

    relative: float
    magnitude: float
    reason: str


EXACT = Tolerance(0.0, 0.0, "exact by definition")

Outputs = tuple[Tensor, ...]
Run = Callable[[OpTable, Call], Outputs]
Invariance = Callable[[Callable[[Call], Outputs], Call, int], Difference | None]


@dataclass(frozen=True, slots=True)
class Case:
    """One way to call one op.

    ``run`` is needed where the op writes in place: it clones what is written, calls the op and returns it (so
    a call can be repeated). ``magnitude`` gives, what each output's error is relative to: a sum of |terms|.
    ``invariance(run, call, seed)`` is a difference when the result depends on what it must not depend on; for
    an op whose rows are tokens it is ``rows_alone(take)``. ``bytes``, ``flops``: the least it moves and does.
    """

    op: str
    name: str
    make_inputs: Callable[[int], Call]
    tolerance: Tolerance
    run: Run | None = None
    magnitude: Callable[[Call], Outputs] | None = None
    invariance: Invariance | None = None
    bytes: int = 0
    flops: int = 0

    def outputs(self, table: OpTable, call: Call) -> Outputs:
        """The tensors to compare, in the op's order."""
        if self.run is not None:
            return self.run(table, call)
        result = getattr(table, self.op)(*call.args, **call.kwargs)
        return result if isinstance(result, tuple) else (result,)

    def allowed(self, call: Call, reference: Outputs) -> Outputs:
        """Allowed |error| of each output, float64, of the output's shape."""
        scales = self.magnitude(call) if self.magnitude is not None else (torch.ones(()),) * len(reference)
        return tuple(
            self.tolerance.relative * r.double().abs() + self.tolerance.magnitude * s.double()
            for r, s in zip(reference, scales, strict=True)
        )


def generator(seed: int) -> torch.Generator:
    """The random source of a case: the same inputs for the same seed on every machine."""
    return torch.Generator().manual_seed(seed)


def take_args(*positions: int) -> Callable[[Call, Tensor], Call]:
    """A ``take`` for rows_alone: selects rows of the arguments at ``positions`` (None stays None)."""

    def take(call: Call, rows: Tensor) -> Call:
        args = tuple(
            a[rows].contiguous() if i in positions and a is not None else a for i, a in enumerate(call.args)
        )
        return Call(args, call.kwargs)

    return take


def rows_alone(take: Callable[[Call, Tensor], Call]) -> Invariance:
    """The invariance of a row-wise op: rows in any order, a subset, and single rows keep their bits.

    ``take(call, rows)`` is the call on the given rows only; row i of an output belongs to row i of the call.
    """

    def invariance(run: Callable[[Call], Outputs], call: Call, seed: int) -> Difference | None:
        full = run(call)
        num_rows = full[0].shape[0]
        order = torch.randperm(num_rows, generator=generator(seed))
        subsets = [order, order[: (num_rows + 1) // 2]] + [order[i : i + 1] for i in range(min(3, num_rows))]
        subsets.append(order[:0])
        for rows in subsets:
            for part, whole in zip(run(take(call, rows)), full, strict=True):
                difference = first_difference(part, whole[rows])
                if difference is not None:
                    return difference
        return None

    return invariance
