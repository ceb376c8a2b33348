"""The maths level against Hugging Face transformers in float32: prefill, chunked prefill and decode, every
length class."""

import random
from functools import cache
from typing import Any

import pytest
import torch
from oracles.hf import build_hf, deterministic_topk, hf_logits
from oracles.random_checkpoint import random_checkpoint
from support.models import logits_of, make_runner, random_ids
from support.selection import SharedSelection

from bittrue.ops.dispatch import select

TOLERANCE = 2e-5  # maximum absolute difference of logits, the bar of spec 9.1 (N0)
LENGTHS = (*range(1, 9), *range(126, 132), *range(255, 258), *range(511, 516))

CONFIGS: dict[str, dict[str, Any]] = {
    "few_index_heads": {"index_n_heads": 1, "index_topk": 12},
    "many_index_heads": {
        "index_n_heads": 16,
        "index_topk": 24,
        "compress_ratios": [4, 128, 0, 4, 128, 0],
        "num_hidden_layers": 5,
        "o_groups": 4,
        "num_hash_layers": 0,
    },
    "wide_heads": {
        "head_dim": 128,
        "qk_rope_head_dim": 32,
        "num_attention_heads": 2,
        "index_head_dim": 64,
        "index_topk": 40,
        "n_routed_experts": 12,
        "num_experts_per_tok": 4,
        "num_hash_layers": 3,
        "compress_ratios": [128, 4, 4, 128, 0],
        "num_hidden_layers": 4,
        "hc_sinkhorn_iters": 12,
        "routed_scaling_factor": 2.5,
    },
}


@cache
def pair(name: str) -> tuple[Any, Any, int]:
    raw, tensors = random_checkpoint(list(CONFIGS).index(name) + 1, **CONFIGS[name])
    return make_runner(raw, tensors), build_hf(raw, tensors), raw["vocab_size"]


def worst(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_full_prefill_equals_transformers_at_every_length(name: str) -> None:
    runner, hf, vocab = pair(name)
    ids = random_ids(max(LENGTHS), vocab, seed=3)
    with deterministic_topk(hf):
        for length in LENGTHS:
            theirs = hf_logits(hf, ids[:length])
            assert worst(logits_of(runner, ids[:length], [length]), theirs) <= TOLERANCE, length


@pytest.mark.parametrize("name", CONFIGS)
def test_chunked_prefill_and_decode_equal_transformers(name: str) -> None:
    runner, hf, vocab = pair(name)
    length = max(LENGTHS)
    ids = random_ids(length, vocab, seed=4)
    with deterministic_topk(hf):
        theirs = hf_logits(hf, ids)
    assert worst(logits_of(runner, ids, [1] * length), theirs) <= TOLERANCE
    for seed in range(3):
        draw = random.Random(seed)
        chunks = []
        while sum(chunks) < length:
            chunks.append(min(draw.choice([2, 3, 5, 7, 33, 64, 127, 128, 129]), length - sum(chunks)))
        assert worst(logits_of(runner, ids, chunks), theirs) <= TOLERANCE, chunks


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_three_thousand_tokens_equal_transformers(name: str) -> None:
    # At this length some queries have two entries whose scores are equal to within rounding; which of them
    # is read moves the logits. The oracle is given our picks there, and only there.
    raw, tensors = random_checkpoint(list(CONFIGS).index(name) + 1, **CONFIGS[name])
    ops, picks = select("cpu", threads=1), []

    def recorded(*args: Any, **options: Any) -> torch.Tensor:
        picks.append(ops.index_topk(*args, **options))
        return picks[-1]

    runner = make_runner(raw, tensors, ops=ops.with_ops(index_topk=recorded))
    ids = random_ids(3000, raw["vocab_size"], seed=5)
    ours = logits_of(runner, ids, [3000])
    selection = SharedSelection(picks)
    with selection:
        theirs = hf_logits(build_hf(raw, tensors), ids)
    assert selection.num_calls == len(picks)
    assert selection.num_swapped_rows <= 0.002 * 3000 * len(picks)
    assert worst(ours, theirs) <= TOLERANCE
    assert worst(logits_of(runner, ids, [1000, 1, 511, 488, 1000]), theirs) <= TOLERANCE
    prompt = 2400
    assert worst(logits_of(runner, ids, [prompt] + [1] * (3000 - prompt)), theirs) <= TOLERANCE
