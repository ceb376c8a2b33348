"""The vector ops of every implementation that runs here: reference and each instruction set."""

from types import SimpleNamespace

import pytest

from bittrue.ops.cpu.library import ISAS, available_isas, load_kernels
from bittrue.ops.cpu.vector import vector_ops
from bittrue.ops.ref import hyper, norm, quant, rope, sample


def reference_ops() -> dict[str, object]:
    modules = (hyper, norm, quant, rope, sample)
    return {name: value for module in modules for name, value in vars(module).items() if callable(value)}


@pytest.fixture(params=["reference", *ISAS])
def ops(request: pytest.FixtureRequest) -> SimpleNamespace:
    if request.param == "reference":
        return SimpleNamespace(**reference_ops())
    if request.param not in available_isas():
        pytest.skip(f"this processor does not run {request.param}")
    return SimpleNamespace(**vector_ops(load_kernels(request.param)))
