"""Binds the backward kernels of matrix products, experts, routing and pooling."""

from collections.abc import Callable
from typing import Any

from bittrue.ops.cpu.library import Kernels


def matrix_gradients(kernels: Kernels) -> dict[str, Callable[..., Any]]:
    """The backward ops of this file by name."""
    return {}
