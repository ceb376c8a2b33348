"""Usage: how many tokens a request read and wrote, in OpenAI's shape."""

from dataclasses import dataclass

import msgspec
from msgspec import UNSET, UnsetType

from bittrue.engine.types import TokenEvent


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    """The prediction tokens are drafts of speculation; absent where there is none."""

    reasoning_tokens: int
    accepted_prediction_tokens: int | UnsetType = UNSET
    rejected_prediction_tokens: int | UnsetType = UNSET


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


@dataclass(slots=True)
class _Drafts:
    """Drafts of one sequence. An engine that was restarted counts from zero: what came before is in the
    sums."""

    drafted: int = 0
    accepted: int = 0
    drafted_before: int = 0
    accepted_before: int = 0

    def note(self, drafted: int, accepted: int) -> None:
        if drafted < self.drafted:
            self.drafted_before += self.drafted
            self.accepted_before += self.accepted
        self.drafted, self.accepted = drafted, accepted


class UsageTally:
    """Adds up the sequences of one request. The prompt of n sequences counts once, and of it as cached what
    the least cached of them took from there: what one of them computed was computed."""

    __slots__ = ("_drafts", "_has_drafts", "_num_cached", "_num_prompt", "num_generated", "num_reasoning")

    def __init__(self, num_prompt_tokens: int, *, has_drafts: bool) -> None:
        self._num_prompt = num_prompt_tokens
        self._num_cached: dict[int, int] = {}
        self._drafts: dict[str, _Drafts] = {}
        self._has_drafts = has_drafts
        self.num_generated = 0
        self.num_reasoning = 0

    def add(self, event: TokenEvent, *, prompt_index: int) -> None:
        """The first event of a sequence tells what was cached when it began."""
        self.num_generated += len(event.token_ids)
        drafts = self._drafts.get(event.request_id)
        if drafts is None:
            drafts = self._drafts[event.request_id] = _Drafts()
            num_cached = min(event.num_cached_tokens, event.num_prompt_tokens)
            seen = self._num_cached.get(prompt_index, num_cached)
            self._num_cached[prompt_index] = min(seen, num_cached)
        drafts.note(event.num_drafted, event.num_accepted)

    def total(self) -> Usage:
        details = CompletionTokensDetails(self.num_reasoning)
        if self._has_drafts:
            each = self._drafts.values()
            drafted = sum(one.drafted_before + one.drafted for one in each)
            accepted = sum(one.accepted_before + one.accepted for one in each)
            details.accepted_prediction_tokens = accepted
            details.rejected_prediction_tokens = drafted - accepted
        return Usage(
            self._num_prompt,
            self.num_generated,
            self._num_prompt + self.num_generated,
            PromptTokensDetails(sum(self._num_cached.values())),
            details,
        )
