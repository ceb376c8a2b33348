"""The cases of every backward op, gathered: what tests, `ops check` and `ops bench` run."""

from bittrue.ops.case_grad import GradCase
from bittrue.ops.cases_grad_cache import cache_gradient_cases
from bittrue.ops.cases_grad_matrix import matrix_gradient_cases
from bittrue.ops.cases_grad_vector import vector_gradient_cases


def gradient_cases() -> tuple[GradCase, ...]:
    """Every case of every backward op."""
    return (*vector_gradient_cases(), *matrix_gradient_cases(), *cache_gradient_cases())
