"""The optimiser: which parameter moves by which rule, the AdamW rule, gradient clipping, and its state."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bittrue.errors import CheckpointError
from bittrue.train.muon import Muon, Spread

Rule = Literal["muon", "adamw", "adamw_no_decay"]
_TABLES = ("embed.weight", "head.weight")


@dataclass(frozen=True, slots=True)
class OptimSettings:
    """The numbers of both rules; the defaults are the published ones (spec 5.4). ``matrices``: the rule of
    matrices."""

    momentum: float = 0.95
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-20
    weight_decay: float = 0.1
    is_coarse: bool = False  # the products of Newton-Schulz in bf16
    matrices: Literal["muon", "adamw"] = "muon"


def rule_of(name: str, shape: tuple[int, ...]) -> Rule:
    """The rule of a parameter, by its official name.

    Muon: matrices, and stacks of them. AdamW: the embedding and the head, which are matrices but tables of
    tokens. AdamW without decay: norms, sinks, the static parts of the hyper-connections (base, scale) and
    the compressors' position biases (ape, whose rows are no matrix's): pulling a scale or a bias towards zero
    regularises nothing.
    """
    if name in _TABLES:
        return "adamw"
    is_matrix = len(shape) >= 2 and not name.endswith(".ape")
    return "muon" if is_matrix else "adamw_no_decay"


def clip_gradients(parameters: Mapping[str, Tensor], max_norm: float) -> float:
    """Scales all gradients so that their common norm is at most ``max_norm`` (0 = no limit), in place.

    Returns the norm before. Norms are summed in float64, parameter by parameter in the order of their names,
    so the same gradients always give the same bits.
    """
    gradients = [p.grad for _, p in sorted(parameters.items()) if p.grad is not None]
    squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in gradients]
    norm = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    if max_norm and norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / norm)
    return norm


def first_bad_gradient(parameters: Mapping[str, Tensor]) -> str | None:
    """The first parameter, by name, whose gradient has a NaN or an infinity."""
    for name, p in sorted(parameters.items()):
        if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
            return name
    return None


class AdamW:
    """First and second moments with bias correction, and decoupled weight decay."""

    def __init__(self, parameters: Mapping[str, Tensor], settings: OptimSettings, *, decay: float) -> None:
        self._parameters = dict(parameters)
        self._settings, self._decay = settings, decay
        self._m = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
        self._v = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
        self._count = {name: torch.zeros((), dtype=torch.int64) for name in parameters}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Moves every parameter that has a gradient; the others, and their moments, are left alone."""
        s = self._settings
        for name, p in self._parameters.items():
            if p.grad is None:
                continue
            count = int(self._count[name].add_(1))
            m = self._m[name].lerp_(p.grad, 1 - s.beta1)
            v = self._v[name].mul_(s.beta2).addcmul_(p.grad, p.grad, value=1 - s.beta2)
            root = (v / (1 - s.beta2**count)).sqrt_().add_(s.eps)
            p.mul_(1 - lr * self._decay).addcdiv_(m, root, value=-lr / (1 - s.beta1**count))

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors to keep, by name; what they hold changes with the next step."""
        for name in self._parameters:
            yield f"m.{name}", self._m[name]
            yield f"v.{name}", self._v[name]
            yield f"count.{name}", self._count[name]


class Optimiser:
    """Muon for matrices, or AdamW, and AdamW for the rest, at one learning rate."""

    def __init__(
        self, parameters: Mapping[str, Tensor], settings: OptimSettings, *, spread: Spread = map
    ) -> None:
        """``spread``: see Muon."""
        groups: dict[Rule, dict[str, Tensor]] = {"muon": {}, "adamw": {}, "adamw_no_decay": {}}
        for name, p in parameters.items():
            rule = rule_of(name, tuple(p.shape))
            groups[settings.matrices if rule == "muon" else rule][name] = p
        self._muon = Muon(
            groups["muon"],
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            dtype=torch.bfloat16 if settings.is_coarse else torch.float32,
            spread=spread,
        )
        self._adamw = AdamW(groups["adamw"], settings, decay=settings.weight_decay)
        self._plain = AdamW(groups["adamw_no_decay"], settings, decay=0.0)

    def step(self, lr: float) -> None:
        """One update of every parameter that has a gradient."""
        for part in (self._muon, self._adamw, self._plain):
            part.step(lr)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, by name, as views: copy what is to stay."""
        parts: tuple[Iterable[tuple[str, Tensor]], ...] = (
            self._muon.state(),
            self._adamw.state(),
            self._plain.state(),
        )
        return dict(item for part in parts for item in part)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over a ``state`` of the same parameters. Raises CheckpointError naming a tensor that is
        missing, foreign or of another shape."""
        own = self.state()
        for name in sorted(own.keys() | state.keys()):
            if name not in own or name not in state or own[name].shape != state[name].shape:
                raise CheckpointError(f"the optimiser state {name} does not fit the model", tensor=name)
        for name, tensor in own.items():
            tensor.copy_(state[name])
