"""TextStream: the text of one sequence as its tokens arrive, up to the stop that ended it."""

from bittrue.engine.types import SamplingParams, TokenEvent
from bittrue.text.detokenize import Detokenizer
from bittrue.text.stop import StopMatcher
from bittrue.text.tokenizer import Tokenizer


class TextStream:
    """Joined pieces are the same for any split into events.

    The engine decides where a sequence ends. Text that may become a stop string waits until that is clear.
    """

    __slots__ = ("_detokenizer", "_stops")

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopMatcher(params.stop) if params.stop else None

    def feed(self, event: TokenEvent) -> str:
        """The text that can be shown now. A stop string or stop token that ended the sequence is left out."""
        ids = event.token_ids
        if isinstance(event.stop_match, int):
            ids = ids[:-1]
        is_last = event.finish_reason is not None
        text = self._detokenizer.feed(ids)
        if is_last and not isinstance(event.stop_match, str):
            text += self._detokenizer.flush()
        if self._stops is None:
            return text
        shown = self._stops.feed(text).text
        return shown + self._stops.flush().text if is_last else shown
