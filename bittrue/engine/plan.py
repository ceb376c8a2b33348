"""What one step of the engine computes, as integers: written by the scheduler, executed by the runner."""

from dataclasses import dataclass

from bittrue.engine.types import FinishReason
from bittrue.kv.moves import Move


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """One sequence's part of a step: compute its tokens ``start .. start + num_tokens - 1``.

    ``page_ids[i]`` holds tokens 128 * i .. 128 * i + 127; together they cover at least the last token of
    the step. ``fold`` is the position at which the HCA running pool stands (``Batch.folds``; ``start``
    without drafts). Compressed rows of tokens before ``kept`` stand already. ``samples``: the step reaches
    the sequence's last known token, and the next one is to be drawn. ``drafts`` are computed behind that
    token and counted in ``num_tokens``: guesses at the tokens to be drawn.
    """

    seq_id: str
    slot: int
    start: int
    num_tokens: int
    fold: int
    page_ids: tuple[int, ...]
    samples: bool
    kept: int = 0
    drafts: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """Position after the last token of the step."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. ``sequences``: those that decode, then those that prefill, each by rank; ids are request ids.

    ``moves`` come first, in order. ``admitted`` start (again), from position 0 or from what the cache holds
    of them; ``preempted`` gave up their memory and wait.
    """

    step: int
    sequences: tuple[ScheduledSequence, ...]
    moves: tuple[Move, ...] = ()
    admitted: tuple[str, ...] = ()
    preempted: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(part.num_tokens for part in self.sequences)


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What a step gave one sequence: the tokens drawn (when it samples), and the reason when it ends there.

    All tokens but the last are drafts that were accepted. No token with a ``finish_reason`` ends a sequence
    without one (an error). The scheduler itself ends a sequence with "length" at max_tokens.
    """

    seq_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
