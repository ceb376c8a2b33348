"""bittrue serves DeepSeek-V4 so that every fast path returns exactly the bits of the slow path."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bittrue.engine.engine import Engine
    from bittrue.engine.types import SamplingParams

__all__ = ["Engine", "SamplingParams"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: `bittrue --help` must not import torch.
    if name == "Engine":
        from bittrue.engine.engine import Engine

        return Engine
    if name == "SamplingParams":
        from bittrue.engine.types import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'bittrue' has no attribute {name!r}")
