"""The cases of every op, gathered: what tests, `ops check` and `ops bench` run."""

from bittrue.ops.case import Case
from bittrue.ops.cases_cache import cache_cases
from bittrue.ops.cases_matrix import matrix_cases
from bittrue.ops.cases_vector import vector_cases


def all_cases() -> tuple[Case, ...]:
    """Every case of every op."""
    return (*matrix_cases(), *vector_cases(), *cache_cases())
