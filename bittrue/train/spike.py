"""Loss spikes, and the answer to one: experts chosen for a while by older parameters (spec 5.5)."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bittrue.train.config import SpikeSection
from bittrue.train.trainer import Routes


@dataclass(slots=True)
class SpikeDetector:
    """Tells a spike from the losses and gradient norms of the steps before it."""

    settings: SpikeSection
    losses: list[float] = field(default_factory=list)  # of the last ``window`` steps
    norms: list[float] = field(default_factory=list)

    def reason(self, loss: float, norm: float) -> str | None:
        """Why the next step is a spike; None where it is not, or nothing is watched yet."""
        s = self.settings
        if not s.is_watched or len(self.losses) < s.least:
            return None
        median = statistics.median(self.losses)
        if loss > s.loss_factor * median and loss > median + s.loss_rise:
            return f"loss {loss:.4g}, median {median:.4g}"
        usual = statistics.median(self.norms)
        if s.grad_factor and norm > s.grad_factor * usual:
            return f"gradient norm {norm:.4g}, median {usual:.4g}"
        return None

    def note(self, loss: float, norm: float) -> None:
        """Takes a step into the history."""
        if self.settings.is_watched:
            self.losses = [*self.losses, loss][-self.settings.window :]
            self.norms = [*self.norms, norm][-self.settings.window :]

    def state(self) -> dict[str, Any]:
        """What goes into a checkpoint, as JSON."""
        return {"losses": self.losses, "norms": self.norms}

    def load(self, state: Mapping[str, Sequence[float]]) -> None:
        self.losses, self.norms = list(state["losses"]), list(state["norms"])


@dataclass(slots=True)
class Anticipation:
    """The experts of step t, chosen by the parameters that step t - delay began with.

    It is on in the steps below ``until``. Before the gradient of step t, the parameters of that moment
    choose the experts of step t + delay. In the first ``delay`` steps after it was switched on, no such
    choice was made in time: theirs is made by the parameters it was switched on with.
    """

    delay: int
    until: int = 0
    waiting: dict[int, Routes] = field(default_factory=dict)  # by the step they are for

    def is_on(self, step: int) -> bool:
        return step < self.until

    def routes(self, step: int, choose: Callable[[int], Routes]) -> Routes | None:
        """What the experts of ``step`` are to be, None where they are chosen as usual. ``choose`` gives the
        choice of the present parameters for the documents of a step."""
        if not self.is_on(step):
            self.waiting.clear()
            return None
        for ahead in range(step, min(step + self.delay, self.until - 1) + 1):
            if ahead not in self.waiting:
                self.waiting[ahead] = choose(ahead)
        return self.waiting.pop(step)

    def switch_on(self, until: int) -> None:
        """Begins with the next step; what was chosen by parameters now given up is forgotten."""
        self.until = until
        self.waiting.clear()

    def tensors(self) -> dict[str, Tensor]:
        """The choices that wait, for a checkpoint."""
        return {
            f"{step}.{name}": ids for step, routes in self.waiting.items() for name, ids in routes.items()
        }

    def load(self, until: int, tensors: Mapping[str, Tensor]) -> None:
        self.switch_on(until)
        for key, ids in tensors.items():
            step, _, name = key.partition(".")
            self.waiting.setdefault(int(step), {})[name] = ids.clone()
