"""Drafts by looking back: what followed the last tokens where they stood before."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from torch import Tensor

from bittrue.spec.proposer import Choose, DraftView

MAX_N: Final = 4
MIN_N: Final = 2
# Token counts from which on a sorted array is cheaper than a dictionary, in time and memory.
_BULK: Final = 2048
_POSITION_BITS: Final = 24  # 16 times the context of the largest model
_MULTIPLIER: Final = 0x9E3779B97F4A7C15
_MASK: Final = 2**64 - 1
_POSITION_MASK: Final = 2**_POSITION_BITS - 1


class NgramProposer:
    """Drafts the tokens after the most recent earlier occurrence of the longest suffix, of 4 down to 2
    tokens, that occurred earlier.

    A sequence is indexed when it first wants drafts, then as it grows: O(1) per token. Its index takes
    24 bytes per token, and a few hundred for each of the latest (at most 2048, or half of the tokens).
    """

    def __init__(self) -> None:
        self._indexes: dict[str, NgramIndex] = {}

    @property
    def is_lazy(self) -> bool:
        return True  # the index catches up by itself

    def after_step(
        self, streams: Tensor, views: Sequence[DraftView], choose: Choose
    ) -> list[tuple[int, ...]]:
        return [self._draft(view) for view in views]

    def forget(self, seq_id: str) -> None:
        self._indexes.pop(seq_id, None)

    def _draft(self, view: DraftView) -> tuple[int, ...]:
        if view.wants <= 0:
            return ()
        index = self._indexes.get(view.seq_id)
        if index is None:
            index = self._indexes[view.seq_id] = NgramIndex()
        after = index.find(view.tokens)
        if after is None:
            return ()
        draft = list(view.tokens[after : after + view.wants])
        # Where the copy reaches the end of what is known it goes on copying itself: text that repeats.
        period = len(draft)
        while len(draft) < view.wants:
            draft.append(draft[-period])
        return tuple(draft)


class NgramIndex:
    """Where every n-gram of one growing sequence ended last.

    An n-gram is known by 40 bits of a hash; what is found is compared token by token, so two of them with
    one hash cost a draft and never give a wrong one.
    """

    def __init__(self) -> None:
        self._size = 0  # tokens whose n-grams are indexed: those of which the next token is known
        # Of each n, ascending: hash, then the position of the n-gram's last token, in one integer.
        self._sorted: dict[int, np.ndarray] = {}
        self._num_sorted = 0
        self._latest: dict[int, dict[int, int]] = {n: {} for n in range(MIN_N, MAX_N + 1)}

    def find(self, tokens: Sequence[int]) -> int | None:
        """The position after the most recent earlier occurrence of the longest known suffix of ``tokens``;
        None where there is none. ``tokens`` begin with those of the last call."""
        assert self._size <= max(0, len(tokens) - 1), "tokens were taken back"
        self._add(tokens)
        for n in range(min(MAX_N, len(tokens)), MIN_N - 1, -1):
            end = self._lookup(n, ngram_hash(tokens[-n:]))
            if end is not None and tokens[end - n + 1 : end + 1] == tokens[-n:]:
                return end + 1
        return None

    def _lookup(self, n: int, key: int) -> int | None:
        """The last position indexed under ``key``."""
        found = self._latest[n].get(key)
        if found is None and n in self._sorted:
            keys = self._sorted[n]
            # The last of those with this hash is the most recent.
            place = int(np.searchsorted(keys, np.uint64((key << _POSITION_BITS) | _POSITION_MASK), "right"))
            if place and int(keys[place - 1]) >> _POSITION_BITS == key:
                found = int(keys[place - 1]) & _POSITION_MASK
        return found

    def _add(self, tokens: Sequence[int]) -> None:
        """Indexes the n-grams that end before the last token: each is followed by a token."""
        end = len(tokens) - 1
        if end - self._num_sorted >= max(_BULK, self._num_sorted // 2):
            self._sort(tokens, end)
            return
        for position in range(self._size, end):
            for n, latest in self._latest.items():
                if position + 1 >= n:
                    latest[ngram_hash(tokens[position + 1 - n : position + 1])] = position
        self._size = max(self._size, end)

    def _sort(self, tokens: Sequence[int], end: int) -> None:
        """Sorts everything anew. The sequence has grown by half since the last time, so a token takes part
        in few sorts."""
        ids = np.array(tokens[:end], dtype=np.int64).view(np.uint64)
        hashes = ids.copy()
        for n in range(2, MAX_N + 1):
            if n > end:
                break
            hashes = _step(hashes[:-1], ids[n - 1 :])
            if n >= MIN_N:
                keys = (hashes >> np.uint64(_POSITION_BITS)) << np.uint64(_POSITION_BITS)
                keys |= np.arange(n - 1, end, dtype=np.uint64)
                keys.sort()
                self._sorted[n] = keys
        for latest in self._latest.values():
            latest.clear()
        self._size = self._num_sorted = end


def _step(hashes: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The hashes of n-grams from those of their first n - 1 tokens and their last tokens; wraps at 2^64."""
    mixed: np.ndarray = (hashes ^ (hashes >> np.uint64(29))) * np.uint64(_MULTIPLIER)
    mixed += ids + np.uint64(1)
    mixed *= np.uint64(_MULTIPLIER)
    return mixed


def ngram_hash(tokens: Sequence[int]) -> int:
    """40 bits of what ``_step`` gives for one n-gram."""
    value = tokens[0]
    for token in tokens[1:]:
        value = (((value ^ (value >> 29)) * _MULTIPLIER & _MASK) + token + 1) * _MULTIPLIER & _MASK
    return value >> _POSITION_BITS
