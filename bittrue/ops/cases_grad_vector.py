"""Cases of the derivatives of embed, rms_norm and the hyper-connections."""

from bittrue.ops.case_grad import GradCase


def vector_gradient_cases() -> list[GradCase]:
    """Every case of this file's backward ops."""
    return []
