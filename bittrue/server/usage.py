"""Usage: how many tokens a request read and wrote, in OpenAI's shape."""

import msgspec

from bittrue.engine.types import TokenEvent


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class UsageTally:
    """Adds up the sequences of one request. The prompt of n sequences counts once."""

    __slots__ = ("_num_cached", "_num_prompt", "num_generated", "num_reasoning")

    def __init__(self, num_prompt_tokens: int) -> None:
        self._num_prompt = num_prompt_tokens
        self._num_cached: dict[int, int] = {}
        self.num_generated = 0
        self.num_reasoning = 0

    def add(self, event: TokenEvent, *, prompt_index: int) -> None:
        self.num_generated += len(event.token_ids)
        if event.num_cached_tokens:
            seen = self._num_cached.get(prompt_index, event.num_cached_tokens)
            self._num_cached[prompt_index] = min(seen, event.num_cached_tokens)

    def total(self) -> Usage:
        return Usage(
            self._num_prompt,
            self.num_generated,
            self._num_prompt + self.num_generated,
            PromptTokensDetails(sum(self._num_cached.values())),
            CompletionTokensDetails(self.num_reasoning),
        )
