"""The interface of everything that drafts: told after every step what it kept, asked what may come next.

Whatever is drafted, the output is the same: a draft becomes output only where the target samples it anyway.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# (logits [n, V] f32, the view of each row, place of the drafts: 0 = the first) -> n token ids. It draws what
# the target would draw from these logits with the noise of that position, and does not keep the logits.
Choose = Callable[[Tensor, Sequence[int], int], list[int]]


@dataclass(frozen=True, slots=True)
class DraftView:
    """One sequence after a step.

    The step computed and kept positions ``computed_from .. computed_to - 1``; its rows of streams start at
    ``first_row``. A sequence that decodes has all its tokens but the last one computed; only then may
    ``wants`` be above 0. One that ended with the step wants none: its state may be gone on from.
    """

    seq_id: str
    slot: int
    tokens: Sequence[int]  # all known ones, only ever appended to
    computed_from: int
    computed_to: int
    first_row: int
    wants: int  # drafts, at most
    is_greedy: bool = False  # the target takes the arg-max of the logits of every place, whatever came before


class Proposer(Protocol):
    """Drafts for all live sequences at once. ``is_lazy``: it need not be called after a step where nobody
    wants drafts."""

    @property
    def is_lazy(self) -> bool: ...

    def after_step(
        self, streams: Tensor, views: Sequence[DraftView], choose: Choose
    ) -> list[tuple[int, ...]]:
        """The drafts of each view, in order: what may follow its last token; up to ``wants``, perhaps none.

        ``streams`` [T, M, D] act are the step's. They and the step's logits may be overwritten by this call:
        the engine has drawn its tokens before.
        """
        ...

    def forget(self, seq_id: str) -> None:
        """The sequence has ended; an unknown one is ignored."""
        ...
