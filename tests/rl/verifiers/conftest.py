"""Pools that tests share: workers start once."""

from collections.abc import Iterator

import pytest

from bittrue.rl.verifiers.limits import Limits
from bittrue.rl.verifiers.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """As isolated as this machine allows, and patient: a busy machine makes no verdict a timeout."""
    with Pool(num_workers=2, limits=Limits(seconds=60.0, cpu_seconds=20)) as found:
        yield found


@pytest.fixture(scope="session")
def sandboxed(pool: Pool) -> Pool:
    """The same, where a program can neither write outside its directory nor reach a network."""
    if not pool.isolation.is_sandbox:
        pytest.skip(pool.isolation.describe())
    return pool
