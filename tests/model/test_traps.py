"""Springs the known traps of the architecture (spec 7.5) one by one: each moves the logits beyond the
tolerance.

Each variant is the real model with one op replaced by the mistake; the oracle is the independent
simulation. The traps that are not arithmetic (names, config, encoder, formats) are tested where they live;
docs/numerics.md lists all of them.
"""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from oracles.published import published_logits, published_trace
from oracles.random_checkpoint import random_checkpoint
from support.models import logits_of, make_runner, random_ids
from torch import Tensor

from bittrue.engine.runner import Runner
from bittrue.model.batch import Segment
from bittrue.ops.contracts import Batch, ExpertBank, OpTable
from bittrue.ops.dispatch import select

HONEST = select("cpu", threads=1)
LENGTH = 200
TOLERANCE = 2e-5
# The least visible trap moves a logit by more than this.
SPRUNG = 1e-3


@cache
def oracle() -> tuple[dict[str, Any], dict[str, Tensor], list[int], Tensor]:
    # A low clamp, so that it acts; a low top-k, so that selection acts.
    raw, tensors = random_checkpoint(5, swiglu_limit=0.5, index_topk=8)
    ids = random_ids(LENGTH, raw["vocab_size"], seed=1)
    return raw, tensors, ids, published_logits(raw, tensors, ids, level="maths", act=torch.float32)


def error_of(ops: OpTable = HONEST, change: Callable[[Runner], None] | None = None) -> float:
    raw, tensors, ids, expected = oracle()
    runner = make_runner(raw, tensors, ops=ops)
    if change is not None:
        change(runner)
    return float((logits_of(runner, ids, [64, 64, 72]) - expected).nan_to_num(1e9).abs().max())


def earlier(batch: Batch) -> Batch:
    """Positions one too small: visibility floor(t / ratio)."""
    return dataclasses.replace(batch, positions=(batch.positions - 1).clamp(min=0))


def rope_first(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    width = 2 * cos.shape[1]
    rolled = HONEST.rope(x.roll(-width, dims=-1).contiguous(), cos, sin, inverse)
    return rolled.roll(width, dims=-1).contiguous()


def rope_halves(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """Pairs (k, k + R/2) instead of (2k, 2k + 1)."""
    half = cos.shape[1]
    nope, a, b = x[..., : -2 * half], x[..., -2 * half : -half], x[..., -half:]
    s = -sin[:, None] if inverse else sin[:, None]
    c = cos[:, None]
    return torch.cat((nope, a * c - b * s, a * s + b * c), dim=-1).contiguous()


def attention_turned_by(turn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """attention whose queries and outputs are rotated by ``turn``; the op itself is given angles of zero."""

    def attention(
        q: Tensor,
        rows: Tensor,
        batch: Batch,
        kv: Any,
        ids: Any,
        sink: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        norm_eps: float,
        **options: Any,
    ) -> Tensor:
        q = turn(HONEST.rms_norm(q, None, norm_eps), cos, sin, False)
        still = (torch.ones_like(cos), torch.zeros_like(sin))
        # Normalised once more: that changes no more than roundings.
        out = HONEST.attention(q, rows, batch, kv, ids, sink, *still, norm_eps=norm_eps, **options)
        return turn(out, cos, sin, True)

    return attention


def attention_without_norm(*args: Any, scale: float, norm_eps: float, **options: Any) -> Tensor:
    """2^30 swallows every mean square: the norm is a factor of 2^-15, which the scale takes back."""
    return HONEST.attention(*args, scale=scale * 2**15, norm_eps=2.0**30, **options)


def without_overlap(
    u: Tensor, gate: Tensor, weights: Any, batch: Batch, state: Tensor, *rest: Any, **options: Any
) -> None:
    """The previous window is lost at the start of a step."""
    state[..., 1, :] = 0.0
    state[..., 0, :] = 0.0
    HONEST.csa_compress(u, gate, weights, batch, state, *rest, **options)


def swapped_halves(u: Tensor, gate: Tensor, weights: Any, *rest: Any, **options: Any) -> None:
    c = u.shape[1] // 2
    ape = weights.ape.roll(c, dims=1).contiguous()
    swapped = dataclasses.replace(weights, ape=ape)
    HONEST.csa_compress(u.roll(c, 1).contiguous(), gate.roll(c, 1).contiguous(), swapped, *rest, **options)


def no_clamp_on_shared(
    x: Tensor, ids: Tensor, weights: Tensor, bank: ExpertBank, *, limit: float, quantize: bool
) -> Tensor:
    routed = dataclasses.replace(bank, shared=None)
    out = HONEST.experts(x, ids, weights, routed, limit=limit, quantize=quantize)
    nobody, nothing = ids[:, :0].contiguous(), weights[:, :0].contiguous()
    return out + HONEST.experts(x, nobody, nothing, bank, limit=1e9, quantize=quantize)


TRAPS: dict[str, dict[str, Any]] = {
    "2 comb not transposed": {
        "hc_post": lambda y, h, post, comb: HONEST.hc_post(y, h, post, comb.transpose(1, 2).contiguous())
    },
    "3 CSA halves swapped": {"csa_compress": swapped_halves},
    "5 rope on the first features": {"attention": attention_turned_by(rope_first)},
    "5 rope on halves": {"attention": attention_turned_by(rope_halves)},
    "6 no inverse rope": {
        "attention": attention_turned_by(
            lambda x, cos, sin, inverse: x if inverse else HONEST.rope(x, cos, sin, inverse)
        )
    },
    "7 sink left out": {
        "attention": lambda q, rows, batch, kv, ids, sink, cos, sin, **o: HONEST.attention(
            q, rows, batch, kv, ids, torch.full_like(sink, -1e30), cos, sin, **o
        )
    },
    "9 no clamp on the shared expert": {"experts": no_clamp_on_shared},
    "12 CSA overlap lost at a step boundary": {"csa_compress": without_overlap},
    "14 index visibility floor(t / 4)": {
        "index_topk": lambda q, w, batch, *rest, **o: HONEST.index_topk(q, w, earlier(batch), *rest, **o)
    },
    "16 no norm per query head": {"attention": attention_without_norm},
    "17 hash layers without token ids": {
        "route_hash": lambda logits, ids, table, scale: HONEST.route_hash(
            logits, torch.zeros_like(ids), table, scale
        )
    },
    "23 router logits in bf16": {
        "route_topk": lambda logits, bias, k, scale: HONEST.route_topk(
            logits.bfloat16().float(), bias, k, scale
        )
    },
}


def test_the_model_without_a_trap_is_within_the_tolerance() -> None:
    assert error_of() <= TOLERANCE


def test_an_attention_turned_by_the_right_rotation_is_no_trap() -> None:
    assert error_of(HONEST.with_ops(attention=attention_turned_by(HONEST.rope))) <= TOLERANCE


@pytest.mark.parametrize("trap", TRAPS)
def test_a_sprung_trap_shows(trap: str) -> None:
    assert error_of(HONEST.with_ops(**TRAPS[trap])) > SPRUNG


def test_one_rope_base_for_all_layers_shows() -> None:  # trap 4
    def one_base(runner: Runner) -> None:
        runner.model._compress_freq = runner.model._main_freq

    assert error_of(change=one_base) > SPRUNG


def test_a_routing_weight_after_the_down_projection_shows_at_the_published_level() -> None:  # trap 8
    raw, tensors = random_checkpoint(
        5, precision="fp4", num_hidden_layers=1, compress_ratios=[0, 0], num_hash_layers=0
    )
    ids = random_ids(64, raw["vocab_size"], seed=1)
    want = published_trace(raw, tensors, ids).streams[-1]

    def weight_last(x: Tensor, chosen: Tensor, weights: Tensor, bank: ExpertBank, **o: Any) -> Tensor:
        total = torch.zeros(x.shape, dtype=torch.float32)
        ones, routed = torch.ones_like(weights[:, :1]), dataclasses.replace(bank, shared=None)
        for slot in range(chosen.shape[1]):
            part = HONEST.experts(x, chosen[:, slot : slot + 1].contiguous(), ones, routed, **o)
            total += (part.float() * weights[:, slot, None]).to(x.dtype).float()
        shared = HONEST.experts(x, chosen[:, :0].contiguous(), weights[:, :0].contiguous(), bank, **o)
        return (total + shared.float()).to(x.dtype)

    def share_equal(ops: OpTable) -> float:
        runner = make_runner(raw, tensors, level="published", act="bf16", ops=ops)
        streams = runner.forward([Segment(ids, 0, 0, 0, [0])])
        return float((streams.float() == want.float()).double().mean())

    assert share_equal(HONEST) > 0.99
    assert share_equal(HONEST.with_ops(experts=weight_last)) < 0.9


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_reused_slot_leaks_nothing_into_a_short_prompt(length: int) -> None:  # trap 21
    raw, tensors, _, _ = oracle()
    first, second = (random_ids(40, raw["vocab_size"], seed=s) for s in (2, 3))
    chunks = [length] + [1] * (40 - length)
    fresh = logits_of(make_runner(raw, tensors), second, chunks, slot=2)
    runner = make_runner(raw, tensors)
    logits_of(runner, first, [40], slot=2)
    assert torch.equal(logits_of(runner, second, chunks, slot=2), fresh)
