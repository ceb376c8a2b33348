"""Cases of the derivatives of attention and the index scores."""

from bittrue.ops.case_grad import GradCase


def cache_gradient_cases() -> list[GradCase]:
    """Every case of this file's backward ops."""
    return []
