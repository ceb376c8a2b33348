"""The in-process engine: takes requests, runs steps, gives tokens. One thread, one model, one KV memory."""

import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from bittrue.config.run import RunConfig
from bittrue.engine.assembly import Assembly, Progress, assemble
from bittrue.engine.drafting import Drafted, Drafting
from bittrue.engine.output import Draw, Ending, Output
from bittrue.engine.plan import ScheduledSequence, SequenceOutput, StepPlan
from bittrue.engine.record import ChoiceRecord
from bittrue.engine.sampler import SampleInput, SampleOutput, sample, token_logprob
from bittrue.engine.scheduler import Scheduler, SchedulerLimits
from bittrue.engine.sequence import Sequence as LiveSequence
from bittrue.engine.types import (
    EngineStats,
    MemoryReport,
    Request,
    Running,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
)
from bittrue.errors import InvalidRequest
from bittrue.kv.identity import namespace_digest
from bittrue.kv.manager import KVManager
from bittrue.kv.moves import Move
from bittrue.model.batch import Segment
from bittrue.model.publication import LiveWeights
from bittrue.model.weight_update import WeightUpdate
from bittrue.ops.dispatch import build_of
from bittrue.ops.recorded import Chosen
from bittrue.text.detokenize import Detokenizer
from bittrue.text.stop import StopMatcher

_FETCH_WAIT_S = 0.005  # nothing else to do: look again at the inbox soon
_MAX_SPACES = 4096  # digests of salts kept


class Engine:
    """Serves one checkpoint directory. ``Engine(path)`` uses the defaults of RunConfig; keyword arguments
    are its knobs.

    ``add`` / ``step`` / ``abort`` are the whole protocol; ``generate``, ``stream`` and ``score`` are built
    on it.
    """

    def __init__(
        self,
        model: str | Path,
        run: RunConfig | None = None,
        *,
        progress: Progress | None = None,
        verified: str = "",
        parts: Assembly | None = None,
        **knobs: Any,
    ) -> None:
        """``parts``: what it runs on, where that has been assembled for ``run`` already."""
        self.run = run if run is not None else RunConfig(model=str(model), **knobs)
        if parts is None:
            parts = assemble(self.run, progress=progress, verified=verified)
        self.parts = parts
        self.config = parts.config
        self.max_context = parts.max_context
        self._runner = parts.runner
        self._ops = parts.runner.model.ops
        limits = SchedulerLimits(
            max_step_tokens=self.run.max_step_tokens,
            max_running=self.run.max_running,
            max_queue=self.run.max_queue,
            max_context=self.max_context,
            max_draft=parts.layout.max_draft,
        )
        self._kv = KVManager(parts.num_pages, parts.num_slots, parts.policy, parts.tiers)
        self._scheduler = Scheduler(limits, self._kv, parts.budget, self._space)
        self._spaces: dict[str, bytes] = {}
        self._drafting = Drafting(parts.proposer, self._ops, parts.layout.max_draft)
        self._weights = LiveWeights(dict(parts.loaded.checkpoint.all_tensors()), parts.weight_version)
        self._outputs: dict[str, Output] = {}
        self._ready: list[TokenEvent] = []  # events that need no step
        self._names = itertools.count()

    # ---- the protocol ------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Accepts a request or refuses it at once: InvalidRequest, PromptTooLong, QueueFull."""
        self._check_tokens(request)
        output = self._new_output(request)
        sequence = self._scheduler.add(request, time.monotonic())
        if sequence.is_finished:
            self._ready.append(self._event(output, (), (), Ending("length")))
        else:
            self._outputs[request.request_id] = output

    def abort(self, request_id: str) -> None:
        """Ends a sequence and frees its memory; its last event says ``abort``. Unknown ids are ignored."""
        if self._scheduler.abort(request_id) is not None:
            self._move(self._kv.take_moves())
            self._drafting.forget(request_id)
            output = self._outputs.pop(request_id)
            self._ready.append(self._event(output, (), (), Ending("abort")))

    def preempt(self, request_id: str) -> bool:
        """Pauses a running sequence, which goes on as soon as there is room; False where it does not run."""
        is_paused = self._scheduler.preempt(request_id)
        self._move(self._kv.take_moves())
        return is_paused

    def has_work(self) -> bool:
        return bool(self._ready) or self._scheduler.has_work

    def step(self) -> list[TokenEvent]:
        """Runs one step and returns what it added to each sequence; [] when there is nothing to do."""
        events, self._ready = self._ready, []
        plan = self._scheduler.schedule()
        if plan is not None:
            events += self._run(plan)
        elif self._scheduler.has_work and not events:
            self._kv.wait_for_fetches(_FETCH_WAIT_S)
        return events

    def poll(self) -> list[TokenEvent]:
        """What came without waiting: nothing, an engine in this process computes in ``step``."""
        return []

    def stats(self) -> EngineStats:
        stats = self._scheduler.stats()
        tiers, canary = self.parts.tiers, self.parts.canary
        if tiers is not None:
            cache = msgspec.structs.replace(
                stats.cache, tier_bytes=tiers.sizes(), tier_events=tiers.counters()
            )
            stats = msgspec.structs.replace(stats, cache=cache)
        return msgspec.structs.replace(
            stats,
            num_canary_faults_total=0 if canary is None else canary.num_faults,
            weight_version=self.parts.weight_version,
        )

    def update_weights(self, update: WeightUpdate, *, running: Running = "retract") -> bool:
        """Makes ``update`` the weights, between two steps; False where they are these already, and nothing
        happens. Cached prefixes stay, for the version they were computed with. Raises PublicationRefused,
        nothing changed.

        Sequences under way are computed again with the new weights (``retract``), go on over rows of the old
        ones (``in_place``: what they say from then on is of no single version), or end (``abort``).
        """
        staged = self._weights.stage(update)
        if staged is None:
            return False
        if running == "abort":
            for request_id in list(self._outputs):
                self.abort(request_id)
        # What they computed so far is kept for the old version, before anything changes.
        self._scheduler.forget_weights(keeps_running=running == "in_place")
        self._move(self._kv.take_moves())
        self._weights.apply(staged)
        self._spaces.clear()
        self.parts = replace(self.parts, weight_version=self._weights.version)
        for seq_id, output in self._outputs.items():
            begin = len(output.generated)
            keeps_rows = running == "in_place" and self._scheduler.sequence(seq_id).num_computed > 0
            if not keeps_rows and output.versions[-1][0] == begin:  # nothing is left of that version
                output.versions.pop()
            output.versions.append((begin, self._weights.version))
            if output.record is not None and running == "retract":
                output.record.forget()
        return True

    def flush(self) -> dict[str, int]:
        """Drops every cached prefix on every tier and says how much there was. Raises BittrueError where
        something stayed."""
        dropped = self.evict()
        if self.parts.tiers is not None:
            dropped |= self.parts.tiers.flush(None)
        return dropped

    def evict(self) -> dict[str, int]:
        """Drops every cached prefix on the device alone: slower tiers keep what they have."""
        pages, snapshots = self._kv.flush()
        self._move(self._kv.take_moves())
        return {"pages": pages, "snapshots": snapshots}

    @property
    def verified(self) -> str:
        """Identity of the checkpoint's files, whose values were found sound."""
        return self.parts.verified

    def memory(self) -> MemoryReport:
        layout = self.parts.layout
        return MemoryReport(
            ledger=self.parts.ledger.lines,
            page_bytes=layout.page_bytes,
            slot_bytes=layout.slot_bytes,
            max_snapshots=self.parts.budget.max_snapshots,
        )

    def check(self) -> None:
        """Asserts that every page and slot is free, held by a live sequence or cached (tests and
        debugging)."""
        self._scheduler.check()

    def fingerprint(self) -> dict[str, Any]:
        """What the bits of an answer depend on. Two engines with equal fingerprints give equal answers."""
        facts = self._facts()
        digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()
        return {**facts, "digest": digest}

    def _facts(self) -> dict[str, str]:
        parts = self.parts
        return {
            "weight_version": parts.weight_version,
            "tokenizer": parts.tokenizer.digest,
            "level": parts.level,
            "act": parts.act,
            "backend": self._ops.name,
            "kernels": build_of(self._ops),
            "torch": str(torch.__version__),
        }

    def _space(self, salt: str) -> bytes:
        """The namespace of the prefix cache: all that the bits of a row depend on beside the tokens, and who
        may share it."""
        found = self._spaces.get(salt)
        if found is None:
            facts = {**self._facts(), "rows": self.parts.layout.digest().hex()}
            found = namespace_digest(facts, salt)
            if len(self._spaces) >= _MAX_SPACES:
                self._spaces.clear()
            self._spaces[salt] = found
        return found

    def close(self) -> None:
        """Ends every live sequence, writes what the tiers still have to, and lets go of the memory."""
        for request_id in list(self._outputs):
            self.abort(request_id)
        self._ready.clear()
        self.parts.close()

    # ---- conveniences ------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[tuple[int, ...]]:
        """Generated token ids of each prompt. One SamplingParams serves all prompts, or one each."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        names = [self._submit(p, q) for p, q in zip(prompts, each, strict=True)]
        tokens: dict[str, list[int]] = {name: [] for name in names}
        for event in self._drain(set(names)):
            tokens[event.request_id].extend(event.token_ids)
        return [tuple(tokens[name]) for name in names]

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[TokenEvent]:
        """Events of one prompt as they come. Closing the iterator early aborts the sequence."""
        name = self._submit(prompt, params)
        try:
            yield from self._drain({name})
        finally:
            self.abort(name)

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability of every token after the first, given those before it: len(token_ids) - 1 values,
        nats."""
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        name = self._submit(token_ids, params)
        scores: list[float] = []
        for event in self._drain({name}):
            scores += [entry.logprob for entry in event.prompt_logprobs or () if entry is not None]
        return scores

    def _submit(self, prompt: Sequence[int], params: SamplingParams) -> str:
        name = f"local-{next(self._names)}"
        self.add(Request(request_id=name, prompt=tuple(prompt), params=params))
        return name

    def _drain(self, names: set[str]) -> Iterator[TokenEvent]:
        """Steps until the named sequences have ended; events of others are kept for the next ``step``."""
        open_names = set(names)
        while open_names:
            events = self.step()
            foreign = [event for event in events if event.request_id not in names]
            for event in events:
                if event.request_id in open_names:
                    if event.finish_reason is not None:
                        open_names.discard(event.request_id)
                    yield event
            self._ready += foreign

    # ---- one step ----------------------------------------------------------------------------------------

    def _run(self, plan: StepPlan) -> list[TokenEvent]:
        now_s = time.monotonic()
        for seq_id in plan.admitted:
            output = self._outputs[seq_id]
            if output.queued_s is None:
                sequence = self._scheduler.sequence(seq_id)
                output.queued_s = now_s - sequence.arrived_at
                output.num_cached = sequence.num_cached
        begun_s = time.perf_counter()
        streams = self._forward(plan)
        offsets = list(itertools.accumulate((part.num_tokens for part in plan.sequences), initial=0))
        for part, offset in zip(plan.sequences, offsets, strict=False):
            self._score_prompt(part, streams, offset)
        drawn = self._draw(plan, streams, offsets)

        outputs = tuple(
            SequenceOutput(seq_id, tuple(d.token_ids), d.ending.reason if d.ending else None)
            for seq_id, d in drawn.items()
        )
        finished = {sequence.seq_id: sequence for sequence in self._scheduler.commit(plan, outputs)}
        for sequence in finished.values():
            assert sequence.finish_reason is not None
            draw = drawn.setdefault(sequence.seq_id, Draw())
            draw.ending = draw.ending or Ending(sequence.finish_reason)
        self._draft(plan, streams, offsets, drawn, finished, begun_s)
        # After drafting: a snapshot taken now has what the draft module wrote.
        self._move(self._kv.take_moves())
        return [
            self._event(
                self._output_of(seq_id, draw), tuple(draw.token_ids), tuple(draw.logprobs), draw.ending
            )
            for seq_id, draw in drawn.items()
        ]

    def _forward(self, plan: StepPlan) -> Tensor:
        """The streams of the step's tokens, after the moves that come first."""
        self._move(plan.moves)
        segments = [self._segment(part) for part in plan.sequences]
        canary, rows = self.parts.canary, self.parts.row_store
        if canary is not None:
            histories = [self._scheduler.sequence(part.seq_id).tokens for part in plan.sequences]
            canary.before(segments, histories)
        records = [self._outputs[part.seq_id].record for part in plan.sequences]
        chosen = Chosen() if any(record is not None for record in records) else None
        streams = self._runner.forward(segments, chosen)
        if canary is not None:
            canary.after(segments)
        if rows is not None:
            rows.after_step([segment.page_ids for segment in segments])
        if chosen is not None:
            self._record(plan, records, chosen)
        return streams

    def _record(self, plan: StepPlan, records: Sequence[ChoiceRecord | None], chosen: Chosen) -> None:
        row = 0
        for part, record in zip(plan.sequences, records, strict=True):
            if record is not None:
                begin = max(part.start, self._kv.rebuilt_to(part.seq_id))
                if begin < part.start + part.num_tokens:
                    record.take(begin, chosen, slice(row + begin - part.start, row + part.num_tokens))
            row += part.num_tokens

    def _move(self, moves: Sequence[Move]) -> None:
        if moves:
            self.parts.pool.apply(moves)
            if self.parts.canary is not None:
                self.parts.canary.moves(moves)

    def _segment(self, part: ScheduledSequence) -> Segment:
        known = self._scheduler.sequence(part.seq_id).tokens[part.start : part.end - len(part.drafts)]
        return Segment([*known, *part.drafts], part.start, part.fold, part.slot, part.page_ids, part.kept)

    def _draw(self, plan: StepPlan, streams: Tensor, offsets: Sequence[int]) -> dict[str, Draw]:
        """The next tokens of every sequence that samples: the one after its last known token, and as long as
        each equals the draft in its place, the ones after the drafts."""
        going = [
            (part, offset + part.num_tokens - 1 - len(part.drafts))
            for part, offset in zip(plan.sequences, offsets, strict=False)
            if part.samples
        ]
        drawn = {part.seq_id: Draw() for part, _ in going}
        while going:
            # Where a choice does not depend on the tokens before it, all places of a step are drawn at once.
            asked = [
                (part, row, place)
                for part, row in going
                for place in self._places(part, len(drawn[part.seq_id].token_ids))
            ]
            results = self._sample(streams, asked)
            for part, _, place in asked:
                draw, result = drawn[part.seq_id], next(results)
                if place == 0 or (draw.ending is None and draw.token_ids == list(part.drafts[:place])):
                    draw.take(result, self._outputs[part.seq_id])
            going = [
                (part, row)
                for part, row in going
                if part.drafts
                and drawn[part.seq_id].ending is None
                and len(drawn[part.seq_id].token_ids) <= len(part.drafts)
                and drawn[part.seq_id].token_ids == list(part.drafts[: len(drawn[part.seq_id].token_ids)])
            ]
        for part in plan.sequences:
            if part.drafts:
                output = self._outputs[part.seq_id]
                output.num_drafted += len(part.drafts)
                output.num_accepted += len(drawn[part.seq_id].token_ids) - 1
        return drawn

    def _places(self, part: ScheduledSequence, done: int) -> range:
        """The places of a step whose tokens can be drawn when ``done`` are."""
        last = len(part.drafts) if self._outputs[part.seq_id].is_memoryless else done
        return range(done, last + 1)

    def _sample(
        self, streams: Tensor, asked: Sequence[tuple[ScheduledSequence, int, int]]
    ) -> Iterator[SampleOutput]:
        """What is drawn at (sequence, row of its place 0, place), in order."""
        done = 0
        for block, logits in self._runner.logits_by_block(streams, [row + place for _, row, place in asked]):
            items = [self._sample_input(part, place) for part, _, place in asked[done : done + len(block)]]
            done += len(block)
            yield from sample(logits, items, self._ops)

    def _sample_input(self, part: ScheduledSequence, place: int) -> SampleInput:
        """For the token after draft number ``place`` of the step (0: after the last known token)."""
        output = self._outputs[part.seq_id]
        return SampleInput(
            params=output.request.params,
            position=part.end - len(part.drafts) + place,
            prompt=output.request.prompt,
            generated=output.generated,
            forbidden=output.forbidden(),
            allowed=output.allowed(),
        )

    def _draft(
        self,
        plan: StepPlan,
        streams: Tensor,
        offsets: Sequence[int],
        drawn: dict[str, Draw],
        finished: dict[str, LiveSequence],
        begun_s: float,
    ) -> None:
        """Drafts for the next step of every sequence that goes on. The state of one that has ended is a
        snapshot now, and is completed for who goes on from it."""
        if self._drafting.is_off:
            return
        if self._drafting.is_resting(plan):
            for seq_id in finished:
                self._drafting.forget(seq_id)
            return
        drafted = []
        for part, offset in zip(plan.sequences, offsets, strict=False):
            sequence = finished.get(part.seq_id) or self._scheduler.sequence(part.seq_id)
            output, draw = self._outputs[part.seq_id], drawn.get(part.seq_id)
            drafted.append(Drafted(sequence, output, part, offset, draw))
        for seq_id, drafts in self._drafting.after_step(streams, drafted, plan.num_tokens, begun_s):
            self._scheduler.set_drafts(seq_id, drafts)
        for seq_id in finished:
            self._drafting.forget(seq_id)

    def _score_prompt(self, part: ScheduledSequence, streams: Tensor, offset: int) -> None:
        """Records the log-probabilities of the prompt tokens that follow this step's positions."""
        output = self._outputs[part.seq_id]
        if not output.wants_prompt_logprobs:
            return
        prompt = output.request.prompt
        num_top = output.request.params.prompt_logprobs or 0
        # Positions seen before a preemption are computed again, to the same bits: record them once.
        positions = [
            p
            for p in range(part.start, min(part.end, len(prompt) - 1))
            if p + 1 not in output.prompt_logprobs
        ]
        rows = [offset + p - part.start for p in positions]
        done = 0
        for block, logits in self._runner.logits_by_block(streams, rows):
            for p, row in zip(positions[done:], self._ops.log_softmax(logits), strict=False):
                output.prompt_logprobs[p + 1] = token_logprob(row, prompt[p + 1], num_top)
            done += len(block)

    # ---- requests and events -----------------------------------------------------------------------------

    def _check_tokens(self, request: Request) -> None:
        vocab = self.config.vocab_size
        for name, ids in (("prompt", request.prompt), ("resume", request.resume)):
            # A prompt may have a million tokens, and every running sequence waits meanwhile.
            low, high = min(ids, default=0), max(ids, default=0)
            worst = low if low < 0 else high
            if not 0 <= worst < vocab:
                raise InvalidRequest(
                    f"{name} holds token id {worst}; this model's ids are 0 to {vocab - 1}", param=name
                )
        for name, chosen in (
            ("logit_bias", request.params.logit_bias),
            ("stop_token_ids", request.params.stop_token_ids),
        ):
            bad = next((i for i in chosen if not 0 <= i < vocab), None)
            if bad is not None:
                raise InvalidRequest(
                    f"{name} names token id {bad}; this model's ids are 0 to {vocab - 1}", param=name
                )

    def _new_output(self, request: Request) -> Output:
        params = request.params
        tokenizer = self.parts.tokenizer
        output = Output(
            request=request,
            eos_ids=frozenset([self.config.eos_id]),
            grammar=self.parts.new_grammar(params),
            record=ChoiceRecord(self.config, self.max_context) if request.records_choices else None,
            versions=[(0, self.parts.weight_version)],
            detokenizer=Detokenizer(tokenizer) if params.stop else None,
            stops=StopMatcher(params.stop) if params.stop else None,
        )
        for token_id in request.resume:
            output.append(token_id)
        return output

    def _output_of(self, seq_id: str, draw: Draw) -> Output:
        return self._outputs[seq_id] if draw.ending is None else self._outputs.pop(seq_id)

    def _event(
        self,
        output: Output,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        ending: Ending | None,
    ) -> TokenEvent:
        prompt_logprobs = None
        if output.wants_prompt_logprobs and (ending is None or ending.reason != "abort"):
            entries = output.prompt_logprobs
            prompt_logprobs = tuple(entries.get(i) for i in range(len(output.request.prompt)))
            output.is_prompt_reported = True
        choices = None
        if output.record is not None and ending is not None:
            # The last token was never computed.
            num_tokens = len(output.request.prompt) + len(output.generated) - 1
            choices = output.record.choices(num_tokens, output.versions)
        queued_s = None if output.is_begun else output.queued_s
        output.is_begun = True
        return TokenEvent(
            request_id=output.request.request_id,
            token_ids=tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=None if ending is None else ending.reason,
            stop_match=None if ending is None else ending.match,
            num_prompt_tokens=len(output.request.prompt),
            num_cached_tokens=output.num_cached,
            num_drafted=output.num_drafted,
            num_accepted=output.num_accepted,
            queued_s=queued_s,
            choices=choices,
            error=None if ending is None else ending.error,
        )
