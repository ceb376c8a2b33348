"""The reference GradTable: every derivative as autograd through a plain, smooth form of the op."""

from bittrue.ops.gradients import GradTable
from bittrue.ops.ref.grad_cache import cache_gradients
from bittrue.ops.ref.grad_matrix import matrix_gradients
from bittrue.ops.ref.grad_vector import vector_gradients


def reference_gradients() -> GradTable:
    """Every backward op as its reference, in the floating dtype of its inputs."""
    return GradTable(name="reference", **vector_gradients(), **matrix_gradients(), **cache_gradients())
