"""The laws and the arithmetic on shapes and values that published models do not have but a config may."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles.published import published_logits
from oracles.random_checkpoint import random_checkpoint
from support.models import make_runner
from torch import Tensor

from bittrue.ops.dispatch import select
from bittrue.ops.numeric import first_difference
from bittrue.probes.laws import LawProbe

TOLERANCE = 2e-5  # of logits whose standard deviation is near 1
LENGTHS = (5, 131, 258)
LEVELS = {"maths": ("f32", "maths", "f32"), "published": ("fp8", "published", "bf16")}

SHAPES: dict[str, dict[str, Any]] = {
    "nothing is a multiple of 16": {
        "hidden_size": 33,
        "head_dim": 20,
        "qk_rope_head_dim": 6,
        "num_attention_heads": 3,
        "o_groups": 3,
        "o_lora_rank": 7,
        "q_lora_rank": 9,
        "index_head_dim": 8,
        "index_n_heads": 7,
        "moe_intermediate_size": 13,
        "n_routed_experts": 5,
        "num_experts_per_tok": 3,
        "vocab_size": 7,
        "hc_mult": 3,
    },
    "one of everything": {
        "num_attention_heads": 1,
        "o_groups": 1,
        "o_lora_rank": 1,
        "index_n_heads": 1,
        "index_topk": 1,
        "n_routed_experts": 1,
        "num_experts_per_tok": 1,
        "hc_mult": 1,
        "hc_sinkhorn_iters": 1,
        "sliding_window": 1,
    },
    "large heads, all experts, eight streams": {
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "num_attention_heads": 17,
        "o_groups": 17,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "num_experts_per_tok": 8,
        "hc_mult": 8,
        "num_hidden_layers": 3,
        "compress_ratios": [4, 128, 0, 0],
    },
    "blocks of FP8 that end early": {
        "hidden_size": 130,
        "q_lora_rank": 129,
        "moe_intermediate_size": 257,
        "o_lora_rank": 65,
        "num_hidden_layers": 2,
        "compress_ratios": [4, 128, 0],
    },
    "window of three": {"sliding_window": 3, "index_topk": 2},
    "window of 300": {"sliding_window": 300, "index_topk": 2000},
    "window layers alone": {"compress_ratios": [0] * 3, "num_hidden_layers": 2},
    "CSA alone": {"compress_ratios": [4, 4, 0], "num_hidden_layers": 2, "rope_scaling": None},
    "HCA alone": {"compress_ratios": [128, 128, 0], "num_hidden_layers": 2, "num_hash_layers": 2},
}


def assert_laws(raw: dict[str, Any], tensors: dict[str, Tensor], variant: str, seed: int) -> LawProbe:
    """Chunks, batches and threads on both sides of one token; the caches have room for drafts."""
    _, level, act = LEVELS[variant]
    ops = select("cpu", threads=1)
    runner = make_runner(raw, tensors, level=level, act=act, ops=ops, pages=12, slots=6, max_draft=seed % 3)
    probe = LawProbe(runner, num_pages=12, num_slots=6, seed=seed)
    prompts = probe.random_prompts(LENGTHS)
    results = [*probe.chunking(prompts[:1], rounds=1), *probe.batching(prompts, rounds=2)]
    results += probe.threading(prompts, counts=(3,))
    broken = [r for r in results if not r.holds]
    assert not broken, broken[0]
    return probe


def assert_equals_oracle(raw: dict[str, Any], tensors: dict[str, Tensor], probe: LawProbe) -> None:
    for prompt in probe.random_prompts(LENGTHS):
        oracle = published_logits(raw, tensors, list(prompt.token_ids), level="maths", act=torch.float32)
        scale = max(1.0, float(oracle.std()))
        assert float((prompt.expected - oracle).abs().max()) < TOLERANCE * scale


@pytest.mark.parametrize("variant", LEVELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_unusual_shapes_obey_the_laws(shape: str, variant: str) -> None:
    seed = list(SHAPES).index(shape)
    raw, tensors = random_checkpoint(seed, precision=LEVELS[variant][0], **SHAPES[shape])
    probe = assert_laws(raw, tensors, variant, seed)
    if variant == "maths":
        assert_equals_oracle(raw, tensors, probe)


def scaled(part: str, factor: float) -> Callable[[str, Tensor], Tensor]:
    return lambda name, value: (value.float() * factor).to(value.dtype) if part in name else value


def replaced(part: str, number: float) -> Callable[[str, Tensor], Tensor]:
    return lambda name, value: torch.full_like(value, number) if part in name else value


# Each keeps the logits finite. float8 weights are left alone: their scales are drawn, not computed.
EXTREMES: dict[str, Callable[[str, Tensor], Tensor]] = {
    "huge logits": scaled("head.weight", 1e6),
    "sinks that take all": replaced("attn_sink", 1e4),
    "sinks that take nothing": replaced("attn_sink", -1e4),
    "embeddings of zero": replaced("embed.weight", 0.0),
    "embeddings near the smallest numbers": scaled("embed.weight", 1e-38),
    "embeddings far from one": scaled("embed.weight", 1e12),
    "index scores all alike": replaced("indexer.weights_proj", 0.0),
    "compressor gates far apart": scaled("compressor.wgate", 1e3),
    "compressed rows of zero": replaced("compressor.wkv", 0.0),
    "experts all alike": replaced("ffn.gate.weight", 0.0),
    "expert scores far apart": scaled("ffn.gate.weight", 10.0),
    "hyper-connections at their ends": scaled("hc_attn_fn", 1e4),
}


@pytest.mark.parametrize("variant", LEVELS)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_values_obey_the_laws(extreme: str, variant: str) -> None:
    seed = list(EXTREMES).index(extreme)
    raw, tensors = random_checkpoint(
        20 + seed, precision=LEVELS[variant][0], num_hidden_layers=3, compress_ratios=[4, 128, 4, 0]
    )
    tensors = {
        name: value if value.dtype == torch.float8_e4m3fn else EXTREMES[extreme](name, value)
        for name, value in tensors.items()
    }
    probe = assert_laws(raw, tensors, variant, seed)
    for prompt in probe.random_prompts(LENGTHS):
        assert torch.isfinite(prompt.expected).all()


@pytest.mark.parametrize("variant", LEVELS)
def test_steps_beyond_every_block_of_the_kernels_obey_the_laws(variant: str) -> None:
    precision, level, act = LEVELS[variant]
    raw, tensors = random_checkpoint(
        50, precision=precision, num_hidden_layers=2, compress_ratios=[4, 128, 0], vocab_size=32
    )
    # 9,000 tokens have 10 million index scores, more than are held at a time; linear takes 512 rows.
    runner = make_runner(raw, tensors, level=level, act=act, ops=select("cpu", threads=2), pages=80, slots=2)
    probe = LawProbe(runner, num_pages=80, num_slots=2, seed=1)
    prompts = probe.random_prompts((9000, 700))
    steps = [[(0, 513)], [(1, 511), (0, 2000)], [(0, 3487), (1, 1)], [(1, 188), (0, 3000)]]
    results = probe.run(steps, [p.token_ids for p in prompts])
    for prompt, got in zip(prompts, results, strict=True):
        assert first_difference(prompt.expected, got) is None


def test_the_reference_obeys_the_laws_too() -> None:
    for seed, variant in enumerate(LEVELS):
        precision, level, act = LEVELS[variant]
        raw, tensors = random_checkpoint(
            40 + seed, precision=precision, num_hidden_layers=3, compress_ratios=[0, 4, 128, 0], index_topk=4
        )
        runner = make_runner(
            raw, tensors, level=level, act=act, ops=select("reference"), pages=8, slots=4, max_draft=2
        )
        probe = LawProbe(runner, num_pages=8, num_slots=4, seed=seed)
        prompts = probe.random_prompts((3, 34, 131))
        results = [*probe.chunking(prompts[:1], rounds=1), *probe.batching(prompts, rounds=1)]
        results += probe.threading(prompts[1:], counts=(2,))
        broken = [r for r in results if not r.holds]
        assert not broken, broken[0]
