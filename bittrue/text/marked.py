"""Generated tokens as text in which the control tokens are single unmistakable characters."""

import codecs
import re
from collections.abc import Sequence

from bittrue.text.stop import StopMatcher
from bittrue.text.tokenizer import DSML, THINK_END, THINK_START, Tokenizer

# Lone surrogates: no decoded UTF-8 holds one, so text that spells a marker is never mistaken for the token.
MARK_THINK_START = "\ud800"
MARK_THINK_END = "\ud801"
MARK_DSML = "\ud802"
SPELLING = {MARK_THINK_START: THINK_START, MARK_THINK_END: THINK_END, MARK_DSML: DSML}
_ANY_MARK = re.compile("[\ud800-\ud802]")


def spelled(text: str) -> str:
    """Marked text as people see it."""
    return _ANY_MARK.sub(lambda found: SPELLING[found[0]], text)


def has_mark(text: str) -> bool:
    """True when the text holds a control token."""
    return _ANY_MARK.search(text) is not None


class MarkedText:
    """Token ids -> marked text up to the first stop string, never splitting a character.

    Stop strings are sought in the spelled text, as the engine seeks them. Tokens the tokenizer hides (begin,
    end, padding) give no text; other added tokens are spelled out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._mark_of = {tokenizer.special_id(spelling): mark for mark, spelling in SPELLING.items()}
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._matcher = StopMatcher(stop) if stop else None
        self._held = ""  # marked text not yet released
        self._num_open = 0  # spelled characters of it that the matcher has passed: part of a marker

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text."""
        return None if self._matcher is None else self._matcher.matched

    def feed(self, token_ids: Sequence[int]) -> str:
        """The marked text these tokens release."""
        parts: list[str] = []
        for token_id in token_ids:
            mark = self._mark_of.get(token_id)
            if mark is not None:
                parts += (self._decoder.decode(b"", final=True), mark)
            elif token_id not in self._tokenizer.hidden_ids:
                parts.append(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        return self._until_stop("".join(parts))

    def flush(self) -> str:
        """What was held back at the end of the tokens."""
        text = self._until_stop(self._decoder.decode(b"", final=True))
        if self.matched_stop is None:
            text, self._held = text + self._held, ""
        return text

    def _until_stop(self, text: str) -> str:
        if self._matcher is None or self._matcher.matched is not None:
            return "" if self._matcher is not None else text
        self._held += text
        self._num_open += len(self._matcher.feed(spelled(text)).text)
        end = 0
        while end < len(self._held):
            width = len(SPELLING.get(self._held[end], "?"))
            if width > self._num_open:
                break
            self._num_open -= width
            end += 1
        released, self._held = self._held[:end], self._held[end:]
        if self._matcher.matched is not None and self._num_open:
            # The stop string begins inside a marker's spelling; what stands before it is plain text now.
            released += SPELLING[self._held[0]][: self._num_open]
        return released
