"""Documents to batches: every document is a sequence of its own, from position 0, on pages of its own.

So positions, window, pooling groups and visibility restart with each document by construction (spec 2.13):
there is no mask to get wrong, and no padding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bittrue.kv.layout import pages_for
from bittrue.model.batch import Segment, build_batch
from bittrue.ops.contracts import Batch


def split(lengths: Sequence[int], limit: int) -> Iterator[range]:
    """Runs of consecutive documents of at most ``limit`` tokens together; a longer document stands alone."""
    begin = used = 0
    for i, length in enumerate(lengths):
        if i > begin and used + length > limit:
            yield range(begin, i)
            begin, used = i, 0
        used += length
    if begin < len(lengths):
        yield range(begin, len(lengths))


def num_pages(lengths: Sequence[int]) -> int:
    """Pages a packed batch of these documents occupies."""
    return sum(pages_for(length) for length in lengths)


def pack(
    token_ids: Sequence[NDArray[np.int32]],
    *,
    starts: Sequence[int] | None = None,
    totals: Sequence[int] | None = None,
) -> Batch:
    """The batch of whole documents, document i in state slot i and on pages in order.

    With ``starts`` and ``totals`` the tokens of document i are a chunk of it that begins there, and its pages
    are those of all its tokens."""
    segments, page = [], 0
    for i, ids in enumerate(token_ids):
        start = 0 if starts is None else starts[i]
        count = pages_for(len(ids) if totals is None else totals[i])
        pages = range(page, page + count)
        segments.append(Segment(token_ids=ids.tolist(), start=start, fold=start, slot=i, page_ids=pages))
        page += count
    return build_batch(segments)


def shifted(batch: Batch) -> Batch:
    """The same batch with, at every position, the token after it: what a draft module reads. The last token
    of a document has none and gets id 0, whose row nothing reads."""
    token_ids = torch.roll(batch.token_ids, -1)
    lengths = batch.offsets[1:] > batch.offsets[:-1]
    token_ids[(batch.offsets[1:][lengths] - 1).long()] = 0
    return replace(batch, token_ids=token_ids)


def behind(batch: Batch) -> Tensor:
    """The row before each row of whole documents [T] i64; of a document's first row, that row itself."""
    before = torch.arange(-1, batch.num_tokens - 1)
    first = batch.offsets[:-1][batch.offsets[1:] > batch.offsets[:-1]].long()
    before[first] = first
    return before
