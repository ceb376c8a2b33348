"""What one sequence has produced so far, and the rule for when it ends."""

from dataclasses import dataclass, field

import numpy as np

from bittrue.engine.record import ChoiceRecord
from bittrue.engine.sampler import SampleOutput
from bittrue.engine.types import FinishReason, Request, TokenLogprob
from bittrue.text.detokenize import Detokenizer
from bittrue.text.grammar import DelayedGrammar
from bittrue.text.stop import StopMatcher


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a sequence ended; ``match`` is the stop string or stop token id, if one did it, ``error`` the
    text of an error."""

    reason: FinishReason
    match: str | int | None = None
    error: str | None = None


@dataclass(slots=True)
class Output:
    """The engine's own record of a live sequence, beside the scheduler's. It survives preemption
    unchanged."""

    request: Request
    eos_ids: frozenset[int]
    grammar: DelayedGrammar | None
    record: ChoiceRecord | None
    detokenizer: Detokenizer | None
    stops: StopMatcher | None
    versions: list[tuple[int, str]]  # generated tokens from which on, weight version
    generated: list[int] = field(default_factory=list)
    prompt_logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
    is_prompt_reported: bool = False
    queued_s: float | None = None  # seconds from arrival to the first step that served it
    num_cached: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    is_begun: bool = False  # an event has been sent

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.request.params.prompt_logprobs is not None and not self.is_prompt_reported

    @property
    def is_memoryless(self) -> bool:
        """The choice of a token depends on the logits at its place alone, not on the tokens before it."""
        p = self.request.params
        return (
            self.grammar is None
            and p.repetition_penalty == 1.0
            and not p.presence_penalty
            and not p.frequency_penalty
            and len(self.generated) >= p.min_tokens
        )

    def end_ids(self) -> frozenset[int]:
        params = self.request.params
        stops = frozenset(params.stop_token_ids)
        return stops if params.ignore_eos else stops | self.eos_ids

    def forbidden(self) -> tuple[int, ...]:
        """Ids that must not be chosen now: whatever would end the sequence before min_tokens."""
        if len(self.generated) < self.request.params.min_tokens:
            return tuple(sorted(self.end_ids()))
        return ()

    def allowed(self) -> np.ndarray | None:
        return None if self.grammar is None else self.grammar.allowed_mask()

    def append(self, token_id: int) -> Ending | None:
        """Takes the next token and says whether the sequence ends with it: by an end id, then by a failing
        grammar, then by a stop string, then by its length."""
        params = self.request.params
        self.generated.append(token_id)
        # A grammar gives the end-of-sequence only when it is complete: then nothing can follow, not even with
        # ignore_eos or before min_tokens.
        if token_id in self.end_ids() or (self.grammar is not None and token_id in self.eos_ids):
            return Ending("stop", token_id if token_id in params.stop_token_ids else None)
        if self.grammar is not None:
            self.grammar.accept(token_id)
            if self.grammar.error is not None:
                return Ending("error", error=self.grammar.error)
        if self.detokenizer is not None and self.stops is not None:
            matched = self.stops.feed(self.detokenizer.feed([token_id])).matched
            if matched is not None:
                return Ending("stop", matched)
        return Ending("length") if len(self.generated) >= params.max_tokens else None


@dataclass(slots=True)
class Draw:
    """What one step drew for one sequence. All tokens but the last are drafts that were accepted."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    ending: Ending | None = None

    def take(self, result: SampleOutput, output: Output) -> None:
        self.token_ids.append(result.token_id)
        if result.logprob is not None:
            self.logprobs.append(result.logprob)
        self.ending = output.append(result.token_id)
