"""Small models for tests: a runner over tensors in memory, without a directory."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bittrue.config.formats import ActDtype, Level
from bittrue.config.model import ModelConfig
from bittrue.engine.assembly import build_runner
from bittrue.engine.runner import Runner
from bittrue.model.batch import Segment
from bittrue.model.build import TensorSource
from bittrue.ops.contracts import PAGE_TOKENS, OpTable, Weight
from bittrue.ops.dispatch import select

FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8", torch.int8: "fp4"}


def source_of(tensors: Mapping[str, Tensor]) -> TensorSource:
    def weight(name: str) -> Weight:
        data = tensors[name]
        return Weight(data, tensors.get(name.removesuffix("weight") + "scale"), FORMATS[data.dtype])

    return TensorSource(lambda name: tensors[name], weight)


def make_runner(
    raw_config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    level: Level = "maths",
    act: ActDtype = "f32",
    ops: OpTable | None = None,
    pages: int = 32,
    slots: int = 8,
    max_draft: int = 0,
) -> Runner:
    """A runner whose cache memory starts as garbage, so that reading what was never written shows."""
    config = ModelConfig.from_dict(dict(raw_config))
    runner = build_runner(
        config,
        source_of(tensors),
        ops or select("cpu", threads=1),
        level=level,
        act=act,
        pages=pages,
        slots=slots,
        max_draft=max_draft,
    )
    for cache in runner.caches:
        for part in (cache.window, cache.rows, cache.keys):
            if part is not None:
                part.fill_(0xFF)
        for part in (cache.csa, cache.csa_index, cache.hca_fold, cache.hca_pending):
            if part is not None:
                part.fill_(float("nan"))
    return runner


def logits_of(runner: Runner, token_ids: Sequence[int], chunks: Sequence[int], *, slot: int = 0) -> Tensor:
    """Logits [T, V] of one sequence computed in ``chunks`` tokens a step, in pages dealt from the far end."""
    assert sum(chunks) == len(token_ids)
    needed = -(-len(token_ids) // PAGE_TOKENS)
    num_pages = max((c.rows.shape[0] for c in runner.caches if c.rows is not None), default=needed)
    page_ids = list(range(num_pages - 1, num_pages - 1 - needed, -1))
    parts, start = [], 0
    for count in chunks:
        segment = Segment(token_ids[start : start + count], start, start, slot, page_ids)
        streams = runner.forward([segment])
        parts += [logits.clone() for _, logits in runner.logits_by_block(streams, range(count))]
        start += count
    return torch.cat(parts)


def random_ids(count: int, vocab: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (count,), generator=generator).tolist()
