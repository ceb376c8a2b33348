"""A value head: how much reward an answer is still to bring, read off what the model's head reads."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from bittrue.errors import CheckpointError
from bittrue.train.optim import AdamW, OptimSettings


class ValueHead:
    """V = hidden . w + b. Starts at zero, so that the first advantages are the rewards alone."""

    def __init__(self, width: int, settings: OptimSettings) -> None:
        self.weight = torch.zeros(width, requires_grad=True)
        self.bias = torch.zeros((), requires_grad=True)
        self._optimiser = AdamW({"weight": self.weight, "bias": self.bias}, settings, decay=0.0)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.weight, self.bias)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[N] f32 of [N, D]."""
        return hidden.float() @ self.weight + self.bias

    def step(self, lr: float) -> None:
        """One update by the gradients at hand, which are then gone."""
        self._optimiser.step(lr)
        for leaf in self.leaves:
            leaf.grad = None

    def state(self) -> Iterator[tuple[str, Tensor]]:
        yield "weight", self.weight.detach()
        yield "bias", self.bias.detach()
        yield from self._optimiser.state()

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError naming a tensor that is missing or of another shape."""
        for name, own in self.state():
            if name not in state or state[name].shape != own.shape:
                raise CheckpointError(f"the value head's {name} does not fit the model", tensor=name)
            own.copy_(state[name])
