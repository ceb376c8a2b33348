"""Binds the backward kernels of embed, rms_norm and the hyper-connections."""

from collections.abc import Callable
from typing import Any

from bittrue.ops.cpu.library import Kernels


def vector_gradients(kernels: Kernels) -> dict[str, Callable[..., Any]]:
    """The backward ops of this file by name."""
    return {}
