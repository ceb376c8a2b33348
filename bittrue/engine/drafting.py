"""Between two steps: asks the proposer for drafts, as many as pay, with the sampler's own noise."""

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from torch import Tensor

from bittrue.engine.output import Draw, Output
from bittrue.engine.plan import ScheduledSequence, StepPlan
from bittrue.engine.sampler import SampleInput, choose_tokens
from bittrue.engine.sequence import Sequence
from bittrue.ops.contracts import OpTable
from bittrue.spec.control import LOOK_EVERY, DraftControl
from bittrue.spec.proposer import DraftView, Proposer


@dataclass(frozen=True, slots=True)
class Drafted:
    """One sequence after a step, the step's part of it, and the first row of its streams."""

    sequence: Sequence
    output: Output
    part: ScheduledSequence
    first_row: int
    draw: Draw | None


class Drafting:
    """Drafts of all live sequences. It changes how fast tokens come, never which."""

    def __init__(self, proposer: Proposer | None, ops: OpTable, max_draft: int) -> None:
        self._proposer = proposer
        self._ops = ops
        self._control = DraftControl(max_draft)
        self._num_captures = 0  # when the last drafts were made
        self._rest = 0  # steps that a lazy proposer need not hear of, because drafts did not pay just now,
        self._resting: tuple[str, ...] = ()  # for these sequences

    @property
    def is_off(self) -> bool:
        return self._proposer is None

    def is_resting(self, plan: StepPlan) -> bool:
        """Whether nothing has to be done after this step."""
        if self._rest and self._resting == tuple(part.seq_id for part in plan.sequences):
            self._rest -= 1
            return True
        if self._rest:
            self._rest, self._resting = 0, ()  # cut short: not all the steps have passed
        return False

    def forget(self, seq_id: str) -> None:
        """The sequence has ended, or gave up its memory."""
        if self._proposer is not None:
            self._proposer.forget(seq_id)
            self._control.forget(seq_id)

    def after_step(
        self, streams: Tensor, live: Seq[Drafted], num_rows: int, begun_s: float
    ) -> list[tuple[str, tuple[int, ...]]]:
        """Drafts for every sequence of ``live`` that decodes, and has not ended with the step.

        ``begun_s``: ``time.perf_counter`` when the step of ``num_rows`` rows began.
        """
        if self._proposer is None:
            return []
        drafting_s, captures = time.perf_counter(), self._captures()
        # A time in which something was captured says nothing about the next one.
        if captures == self._num_captures:
            self._control.observe_step(num_rows, drafting_s - begun_s)
        self._num_captures = captures
        for each in live:
            if each.part.drafts and each.draw is not None and not each.sequence.is_finished:
                accepted = len(each.draw.token_ids) - 1
                self._control.observe_drafts(each.sequence.seq_id, len(each.part.drafts), accepted)
        wants = self._wants(live)
        self._resting = ()
        if self._proposer.is_lazy and not any(wants.values()):
            if len(wants) == len(live):  # all decode: the next steps are like this one
                self._rest, self._resting = LOOK_EVERY - 1, tuple(wants)
            return []
        views = [
            DraftView(
                seq_id=each.sequence.seq_id,
                slot=each.part.slot,
                tokens=each.sequence.tokens,
                computed_from=each.part.start,
                # Where nothing was sampled, what follows the last position is not known.
                computed_to=min(each.sequence.num_computed, len(each.sequence.tokens) - 1),
                first_row=each.first_row,
                wants=wants.get(each.sequence.seq_id, 0),
                is_greedy=_is_greedy(each.output),
            )
            for each in live
        ]
        drafts: list[list[int]] = [[] for _ in live]

        def choose(logits: Tensor, rows: Seq[int], place: int) -> list[int]:
            chosen = choose_tokens(logits, [self._input(live[i], drafts[i]) for i in rows], self._ops)
            for i, token in zip(rows, chosen, strict=True):
                drafts[i].append(token)
            return chosen

        proposed = self._proposer.after_step(streams, views, choose)
        took_s, self._num_captures = time.perf_counter() - drafting_s, self._captures()
        if any(wants.values()) and captures == self._num_captures:
            self._control.observe_drafting(sum(map(len, proposed)), took_s)
        pairs = [(each.sequence, found) for each, found in zip(live, proposed, strict=True)]
        return [(one.seq_id, found) for one, found in pairs if found and not one.is_finished]

    def _captures(self) -> int:
        return 0 if self._ops.capture is None else self._ops.capture.count

    def _wants(self, live: Seq[Drafted]) -> dict[str, int]:
        """How many drafts pay, for each sequence that decodes and has more than one token to go."""
        going = [each.sequence for each in live if not each.sequence.is_finished]
        ids = [sequence.seq_id for sequence in going if sequence.num_remaining == 1]
        steps = LOOK_EVERY if self._resting == tuple(ids) else 1
        return {seq_id: self._control.length_for(seq_id, len(ids), num_steps=steps) for seq_id in ids}

    def _input(self, each: Drafted, drafts: Seq[int]) -> SampleInput:
        """What the target will be asked at that place, as far as it is known before: a grammar's mask only
        for the first draft."""
        output = each.output
        return SampleInput(
            params=output.request.params,
            position=len(each.sequence.tokens) + len(drafts),
            prompt=output.request.prompt,
            generated=[*output.generated, *drafts],
            forbidden=output.forbidden(),
            allowed=output.allowed() if not drafts else None,
        )


def _is_greedy(output: Output) -> bool:
    params = output.request.params
    return params.temperature == 0 and not params.logit_bias and output.is_memoryless
