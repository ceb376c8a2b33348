"""The running state of one request: its tokens so far, and how many of them the cache holds."""

from dataclasses import dataclass, field
from typing import Literal

from bittrue.engine.types import FinishReason, Request

AGING = 256
Status = Literal["waiting", "running", "finished"]


@dataclass(slots=True, eq=False)
class Sequence:
    """Owned by the scheduler, which alone changes it; others read.

    ``tokens`` is prompt + generated (``request.resume`` counts as generated). The first ``num_computed`` of
    them are in the cache.
    """

    request: Request
    arrival: int  # number of requests accepted before this one
    arrived_at: float  # seconds, on the clock of the caller; decides nothing
    tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    status: Status = "waiting"
    slot: int | None = None
    fold: int = 0  # position at which the HCA running pool stands
    kept: int = 0  # compressed rows of tokens before this position stood when it was admitted
    drafts: tuple[int, ...] = ()  # guesses at the tokens after the last one, for the next step
    num_scored: int = 0  # positions whose logits were computed, as prompt log-probabilities need
    num_cached: int = 0  # tokens that the cache spared it, when it was first admitted
    follows: "Sequence | None" = None  # the running sequence that computes a prefix of this one,
    follows_to: int = 0  # and how far that has to come
    last_step: int = -1  # last step that served it (or admitted it)
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None

    @classmethod
    def of(cls, request: Request, *, arrival: int, now: float) -> "Sequence":
        return cls(request, arrival, now, tokens=[*request.prompt, *request.resume])

    @property
    def seq_id(self) -> str:
        return self.request.request_id

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first: the smaller number; no two ranks are equal. One step of priority is worth
        ``AGING`` arrivals: so many later requests, and no more, overtake one of the next priority."""
        return (self.arrival + AGING * self.request.priority, self.arrival)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def generated(self) -> tuple[int, ...]:
        return tuple(self.tokens[len(self.request.prompt) :])

    @property
    def num_remaining(self) -> int:
        """Known tokens not computed yet: 1 while it decodes, more while it prefills."""
        return len(self.tokens) - self.num_computed

    @property
    def is_exhausted(self) -> bool:
        """Nothing is left to sample: max_tokens are generated."""
        return self.num_generated >= self.request.params.max_tokens

    @property
    def is_finished(self) -> bool:
        return self.status == "finished"
