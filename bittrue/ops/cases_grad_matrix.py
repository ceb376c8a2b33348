"""Cases of the derivatives of matrix products, experts, routing and pooling."""

from bittrue.ops.case_grad import GradCase


def matrix_gradient_cases() -> list[GradCase]:
    """Every case of this file's backward ops."""
    return []
