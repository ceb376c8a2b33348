"""Muon: momentum whose every matrix is made near orthogonal by hybrid Newton-Schulz steps (spec 5.4)."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

# x <- a x + b (x x^T) x + c (x x^T)^2 x: eight steps that lift small singular values fast and scatter the
# large ones around 1, then two that settle them there.
_LIFT = (3.4445, -4.7750, 2.0315)
_SETTLE = (2.0, -1.5, 0.5)
_STEPS = (*[_LIFT] * 8, *[_SETTLE] * 2)
_SMALLEST_NORM = 1e-30  # of a matrix of zeros
_GROUP_ELEMENTS = 2**17  # matrices worked on together: what a core's cache holds
# Runs a function on every item, in order: `map`, or the crew's.
Spread = Callable[[Callable[[Tensor], Tensor], Sequence[Tensor]], Iterable[Tensor]]
UPDATE_SCALE = 0.18  # times sqrt(max(rows, cols)): the root mean square of an AdamW update


def newton_schulz(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, R, C] f32, R <= C -> [B, R, C] f32: each matrix with its singular values moved to about 1.

    Products are computed in ``dtype``. A matrix of zeros stays zero.
    """
    assert x.dim() == 3 and x.shape[1] <= x.shape[2], "transpose first: the products are of R x R"
    return torch.cat([_orthogonal(part, dtype) for part in torch.split(x, _per_group(x))])


def _per_group(x: Tensor) -> int:
    return max(1, _GROUP_ELEMENTS // max(1, x.shape[1] * x.shape[2]))


def _orthogonal(x: Tensor, dtype: torch.dtype) -> Tensor:
    norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    x = (x / norms.clamp_min(_SMALLEST_NORM)).to(dtype)
    for a, b, c in _STEPS:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.float()


class Muon:
    """The momentum and the update of a set of matrices. A 3-D parameter is a stack of matrices.

    m <- mu m + g; o = newton_schulz(mu m + g); w <- w (1 - lr decay) - lr 0.18 sqrt(max(rows, cols)) o.
    Matrices of one shape (or its transpose) are worked on together, whatever parameter they belong to.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
        spread: Spread = map,
    ) -> None:
        """``spread`` runs the work on groups of matrices, perhaps side by side."""
        self._spread = spread
        self._parameters = dict(parameters)
        self._mu, self._decay, self._dtype = momentum, weight_decay, dtype
        self._momenta = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
        self._shapes: dict[tuple[int, int], list[str]] = {}
        for name, p in parameters.items():
            rows, cols = p.shape[-2:]
            self._shapes.setdefault((min(rows, cols), max(rows, cols)), []).append(name)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Moves every parameter that has a gradient; the others, and their momenta, are left alone."""
        moves: list[tuple[list[str], list[int], int]] = []
        parts: list[Tensor] = []
        for names in self._shapes.values():
            moving = [name for name in names if self._parameters[name].grad is not None]
            if moving:
                stacks = [self._nesterov(name) for name in moving]
                wide = torch.cat([s.mT if s.shape[1] > s.shape[2] else s for s in stacks])
                pieces = torch.split(wide, _per_group(wide))
                moves.append((moving, [len(stack) for stack in stacks], len(pieces)))
                parts += pieces
        made = iter(list(self._spread(self._orthogonal, parts)))
        for moving, counts, num_pieces in moves:
            update = torch.cat([next(made) for _ in range(num_pieces)])
            self._apply(moving, torch.split(update, counts), lr)

    def state(self) -> Iterable[tuple[str, Tensor]]:
        """The tensors to keep, by name; what they hold changes with the next step."""
        return ((f"momentum.{name}", m) for name, m in self._momenta.items())

    def _orthogonal(self, x: Tensor) -> Tensor:
        with torch.no_grad():  # a thread has a mode of its own
            return newton_schulz(x, self._dtype)

    def _apply(self, names: Sequence[str], updates: Sequence[Tensor], lr: float) -> None:
        for name, update in zip(names, updates, strict=True):
            p = self._parameters[name]
            rows, cols = p.shape[-2:]
            scale = UPDATE_SCALE * max(rows, cols) ** 0.5
            step = update.mT if rows > cols else update
            p.mul_(1 - lr * self._decay).add_(step.reshape(p.shape), alpha=-lr * scale)

    def _nesterov(self, name: str) -> Tensor:
        """Takes the gradient into the momentum; the direction to follow as a stack [B, rows, cols]."""
        p = self._parameters[name]
        assert p.grad is not None
        momentum = self._momenta[name].mul_(self._mu).add_(p.grad)
        return torch.add(p.grad, momentum, alpha=self._mu).view(-1, *p.shape[-2:])
