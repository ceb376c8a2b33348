"""The few torch operations of the model outside the ops: each is exact or rounds once, so shape and threads
cannot show."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from bittrue.ops.numeric import first_difference


def spread(*shape: int) -> Tensor:
    """Values of every magnitude, subnormal ones, zeros and infinities among them."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-149, 128, shape, generator=generator).float()
    values = torch.randn(*shape, generator=generator) * torch.exp2(exponents)
    return values.masked_fill(torch.rand(*shape, generator=generator) < 0.01, 0.0)


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "embedding rows to bf16": lambda x: x.to(torch.bfloat16),
    "bf16 rows to f32": lambda x: x.to(torch.bfloat16).float(),
    "index weights": lambda x: x * (128**-0.5 * 64**-0.5),
    "routed and shared experts, f32": lambda x: (x + x.flip(-1).float()).to(torch.float32),
    "routed and shared experts, bf16": lambda x: (x + x.flip(-1).bfloat16().float()).to(torch.bfloat16),
}


@pytest.fixture
def any_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("width", [1, 7, 33, 4096])
@pytest.mark.usefixtures("any_threads")
def test_a_row_alone_is_the_row_of_a_batch(name: str, width: int) -> None:
    run = OPERATIONS[name]
    x = spread(70_000 // width + 3, width)  # above the size from which torch uses threads
    torch.set_num_threads(1)
    alone = torch.cat([run(x[i : i + 1]) for i in range(0, len(x), 11)])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert first_difference(alone, run(x)[::11]) is None
        assert first_difference(alone[:1], run(x[:5].contiguous())[:1]) is None
