"""Token ids to text piece by piece, never splitting a character."""

import codecs
from collections.abc import Iterable

from bittrue.text.tokenizer import Tokenizer


class Detokenizer:
    """Incremental decoder of one sequence: the pieces joined equal ``Tokenizer.decode`` of all ids at once.

    Bytes of an unfinished character are held back until a token completes it or ``flush`` ends the sequence.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.hidden_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The text these ids add; may be empty."""
        joined = b"".join(self._tokenizer.token_bytes(i) for i in ids if i not in self._hidden)
        return self._decoder.decode(joined)

    def flush(self) -> str:
        """The held-back bytes as U+FFFD; the decoder starts afresh."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
