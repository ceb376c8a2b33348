"""What one step of the engine computes, as integers: written by the scheduler, executed by the runner."""

from dataclasses import dataclass

from bittrue.engine.types import FinishReason


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """One sequence's part of a step: compute its tokens ``start .. start + num_tokens - 1``.

    ``page_ids[i]`` holds tokens 128 * i .. 128 * i + 127; together they cover at least the last token of
    the step. ``fold`` is the position at which the HCA running pool stands (``Batch.folds``; ``start``
    without drafts). ``samples``: the step reaches the sequence's last known token, and the next one is to
    be drawn.
    """

    seq_id: str
    slot: int
    start: int
    num_tokens: int
    fold: int
    page_ids: tuple[int, ...]
    samples: bool

    @property
    def end(self) -> int:
        """Position after the last token of the step."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. ``sequences``: those that decode, then those that prefill, each by rank; ids are request ids.

    ``admitted`` start (again) from position 0, in a slot and pages whose old content no op reads;
    ``preempted`` lost their memory and wait.
    """

    step: int
    sequences: tuple[ScheduledSequence, ...]
    admitted: tuple[str, ...] = ()
    preempted: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(part.num_tokens for part in self.sequences)


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What a step gave one sequence: the token drawn (when it samples), and the reason when it ends there.

    ``token_id`` None with a ``finish_reason`` ends a sequence without a token (an error). The scheduler
    itself ends a sequence with "length" at max_tokens.
    """

    seq_id: str
    token_id: int | None = None
    finish_reason: FinishReason | None = None
