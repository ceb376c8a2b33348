"""Compares tensors: bit for bit or within an allowed error, naming the first coordinate that differs."""

from dataclasses import dataclass

import torch
from torch import Tensor

_INT_OF_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Difference:
    """Where and how two tensors differ first. ``kind`` is shape, dtype, nan, inf or value."""

    kind: str
    left: str
    right: str
    coordinate: tuple[int, ...] = ()
    count: int = 1  # coordinates that differ in this way
    total: int = 1

    def __str__(self) -> str:
        if self.kind in ("shape", "dtype"):
            return f"{self.kind} {self.left} against {self.right}"
        return (
            f"{self.kind} at {list(self.coordinate)}: {self.left} against {self.right} "
            f"({self.count} of {self.total} differ)"
        )


def bits(x: Tensor) -> Tensor:
    """The same bytes as signed integers of the same width."""
    return x.contiguous().view(_INT_OF_WIDTH[x.element_size()])


def _form_difference(a: Tensor, b: Tensor) -> Difference | None:
    if a.shape != b.shape:
        return Difference("shape", str(list(a.shape)), str(list(b.shape)))
    if a.dtype != b.dtype:
        return Difference("dtype", str(a.dtype), str(b.dtype))
    return None


def _named(kind: str, a: Tensor, b: Tensor, differs: Tensor) -> Difference | None:
    count = int(differs.sum())
    if count == 0:
        return None
    flat = int(differs.flatten().int().argmax())
    coordinate = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), differs.shape))
    left, right = (repr(x[coordinate].item()) for x in (a, b))
    return Difference(kind, left, right, coordinate, count, differs.numel())


def first_difference(a: Tensor, b: Tensor, allowed: Tensor | None = None) -> Difference | None:
    """The first difference in row-major order, None if there is none.

    Shapes and dtypes are compared first, then the places of NaN and of each infinity, then the values: bit
    for bit (any NaN equals any NaN, +0 differs from -0), or, given ``allowed`` (broadcastable to a), by
    |a - b| <= allowed in float64.
    """
    difference = _form_difference(a, b)
    if difference is not None or a.numel() == 0:
        return difference
    if not a.dtype.is_floating_point:
        return _named("value", a, b, a != b)
    x, y = a.double(), b.double()
    nan_x, nan_y = x.isnan(), y.isnan()
    difference = _named("nan", a, b, nan_x != nan_y)
    if difference is not None:
        return difference
    infinite = x.isinf() | y.isinf()
    difference = _named("inf", a, b, infinite & (x != y) & ~nan_x)
    if difference is not None:
        return difference
    if allowed is None:
        return _named("value", a, b, (bits(a) != bits(b)) & ~nan_x)
    return _named("value", a, b, ((x - y).abs() > allowed.double()) & ~nan_x & ~infinite)


def bitwise_equal(a: Tensor, b: Tensor) -> Difference | None:
    """None when every bit is equal, else the first difference."""
    return first_difference(a, b)


def max_ulp(a: Tensor, b: Tensor) -> int:
    """Largest distance in representable values of the dtype; a and b of one float dtype, without NaN."""
    if a.numel() == 0:
        return 0
    low = torch.iinfo(_INT_OF_WIDTH[a.element_size()]).min

    def ordered(x: Tensor) -> Tensor:
        i = bits(x)
        return torch.where(i < 0, low - i, i).long()  # negative floats count downwards from zero

    return int((ordered(a) - ordered(b)).abs().max())


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two tensors of one shape, in float64; 1.0 when both are zero."""
    x, y = a.double().flatten(), b.double().flatten()
    norms = float(x.norm() * y.norm())
    if norms == 0.0:
        return 1.0 if float(x.norm() + y.norm()) == 0.0 else 0.0
    return float(x @ y) / norms
