"""TextStream: the text of one sequence as its tokens arrive, up to the stop that ended it."""

from bittrue.engine.types import SamplingParams, TokenEvent
from bittrue.text.detokenize import Detokenizer
from bittrue.text.stop import StopMatcher
from bittrue.text.tokenizer import Tokenizer


class TextStream:
    """Joined pieces are the same for any split into events.

    The engine decides where a sequence ends. Text that may become a stop string waits until it does or
    cannot; text of the first ``min_tokens`` tokens is never part of a stop string.
    """

    __slots__ = ("_detokenizer", "_min_tokens", "_num_tokens", "_stops")

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopMatcher(params.stop) if params.stop else None
        self._min_tokens = params.min_tokens
        self._num_tokens = 0

    def feed(self, event: TokenEvent) -> str:
        """The text that can be shown now. A stop string or stop token that ended the sequence is left out."""
        ids = event.token_ids
        if isinstance(event.stop_match, int):
            ids = ids[:-1]
        text = self._feed_ids(ids)
        if event.finish_reason is not None and not isinstance(event.stop_match, str):
            text += self._rest()
        return text

    def _feed_ids(self, ids: tuple[int, ...]) -> str:
        if self._stops is None:
            return self._detokenizer.feed(ids)
        num_early = max(0, min(self._min_tokens - self._num_tokens, len(ids)))
        self._num_tokens += len(ids)
        early = self._detokenizer.feed(ids[:num_early])
        return early + self._stops.feed(self._detokenizer.feed(ids[num_early:])).text

    def _rest(self) -> str:
        tail = self._detokenizer.flush()
        if self._stops is None:
            return tail
        return self._stops.feed(tail).text + self._stops.flush().text
