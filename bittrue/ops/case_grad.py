"""What a case of a backward op is: seeded inputs, and the error allowed against the reference in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bittrue.ops.case import Call, Outputs
from bittrue.ops.gradients import BankValues, GradTable


@dataclass(frozen=True, slots=True)
class GradCase:
    """One way to call one backward op.

    Inputs are float32. An output's error is allowed to be ``relative`` times the largest magnitude in it,
    plus ``relative`` times the value. ``bytes``, ``flops``: the least it moves and does.
    """

    op: str
    name: str
    make_inputs: Callable[[int], Call]
    relative: float
    reason: str
    bytes: int = 0
    flops: int = 0

    def outputs(self, table: GradTable, call: Call) -> Outputs:
        """The tensors to compare, in the op's order; what is None is left out."""
        result = getattr(table, self.op)(*call.args, **call.kwargs)
        return tuple(_tensors(result))

    def reference(self, table: GradTable, call: Call) -> Outputs:
        """The same from the reference, computed in float64 from the same inputs."""
        return self.outputs(table, Call(tuple(_widened(a) for a in call.args), call.kwargs))

    def allowed(self, reference: Outputs) -> Outputs:
        """Allowed |error| of each output, of its shape."""
        return tuple(self.relative * (r.abs() + (r.abs().amax() if r.numel() else 0.0)) for r in reference)


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if result is None:
        return []
    if isinstance(result, BankValues):
        return [result.w1, result.w3, result.w2, *(result.shared or ())]
    return [tensor for part in result for tensor in _tensors(part)]


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype == torch.float32 else value
    if isinstance(value, BankValues):
        w1, w3, w2 = value.w1.double(), value.w3.double(), value.w2.double()
        if value.shared is None:
            return BankValues(w1, w3, w2, None)
        s1, s3, s2 = value.shared
        return BankValues(w1, w3, w2, (s1.double(), s3.double(), s2.double()))
    return value
