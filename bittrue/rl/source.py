"""What a run asks its policy and how answers are judged: one protocol for every source of prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bittrue.rl.rollout import Prompt
from bittrue.rl.types import Rollout, Scored
from bittrue.rl.verifiers.health import Health


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt of a step. ``task``: its name in metrics. ``judge``: what scores its answers, for the source
    that asked and nobody else."""

    prompt: Prompt
    task: str
    judge: object = field(repr=False)


class Source(Protocol):
    """Prompts of one split and the scores of answers to them."""

    def of_step(self, step: int, count: int) -> list[Asked]:
        """``count`` prompts with keys of their own: the same for the same seed and step, none of another
        split. Fewer only where the split as a whole has fewer."""
        ...

    def score(self, pairs: Sequence[tuple[Asked, Sequence[Rollout]]]) -> list[list[Scored]]:
        """The scores of all groups of a step at once, in their order. An answer cut at its limit is
        unparsable. Raises VerifierUnavailable where no answer could be judged."""
        ...

    def digest(self) -> str:
        """Of what it would ask and how it judges: SHA-256, in hexadecimal."""
        ...

    def health(self) -> Health | None:
        """How its verifiers are doing; None where it judges in this process."""
        ...

    def isolation(self) -> str:
        """What keeps its verifiers apart from this process, for people."""
        ...

    def close(self) -> None:
        """Ends its verifiers. Safe to repeat."""
        ...
