"""Turns the integers of a step into the index tensors every op reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bittrue.ops.contracts import Batch


@dataclass(frozen=True, slots=True)
class Segment:
    """The tokens one sequence contributes to a step; ``token_ids[i]`` stands at position ``start + i``.

    ``kept``: tokens before this position are replayed: the compressed entries that they close stand already.
    """

    token_ids: Sequence[int]
    start: int
    fold: int
    slot: int
    page_ids: Sequence[int]
    kept: int = 0


def build_batch(segments: Sequence[Segment]) -> Batch:
    """Concatenates the segments in order; the page table is padded with -1 to the longest sequence."""
    lengths = [len(s.token_ids) for s in segments]
    width = max((len(s.page_ids) for s in segments), default=0)
    counts = torch.tensor(lengths, dtype=torch.int64)
    offsets = torch.zeros(len(segments) + 1, dtype=torch.int32)
    offsets[1:] = counts.cumsum(0).to(torch.int32)
    starts = torch.tensor([s.start for s in segments], dtype=torch.int32)
    seq_ids = torch.repeat_interleave(torch.arange(len(segments), dtype=torch.int32), counts)
    total = int(counts.sum())
    within = torch.arange(total, dtype=torch.int32) - offsets[:-1][seq_ids.long()]
    pages = torch.full((len(segments), width), -1, dtype=torch.int32)
    for row, segment in zip(pages, segments, strict=True):
        row[: len(segment.page_ids)] = torch.tensor(segment.page_ids, dtype=torch.int32)
    return Batch(
        token_ids=torch.tensor([t for s in segments for t in s.token_ids], dtype=torch.int64),
        positions=starts[seq_ids.long()] + within,
        seq_ids=seq_ids,
        offsets=offsets,
        starts=starts,
        folds=torch.tensor([s.fold for s in segments], dtype=torch.int32),
        slots=torch.tensor([s.slot for s in segments], dtype=torch.int32),
        kept=torch.tensor([s.kept for s in segments], dtype=torch.int32),
        page_table=pages,
    )
