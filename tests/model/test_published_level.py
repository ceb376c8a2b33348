"""The published level against an independent simulation of its precision rules, layer by layer and end to
end.

bf16 rounding turns the last bit of a float32 sum into a step of 2^-8, so two correct implementations drift
apart with depth. Hence each layer is given the simulation's own input: what differs then is at most a few
rounding steps. A wrong rule (a missing quantisation, another group) is far outside the bound, as the last
test shows for each of them.
"""

import dataclasses
from collections.abc import Callable
from functools import cache
from statistics import median
from typing import Any

import pytest
import torch
from oracles.compare import assert_same_rules, assert_within_noise
from oracles.published import Trace, published_logits, published_trace
from oracles.random_checkpoint import random_checkpoint
from support.models import logits_of, make_runner, random_ids
from torch import Tensor

from bittrue.config.formats import RowFormat
from bittrue.engine.runner import Runner
from bittrue.kv.layout import KVLayout
from bittrue.kv.pool import allocate
from bittrue.model.batch import Segment, build_batch
from bittrue.model.deepseek_v4 import Angles
from bittrue.ops.contracts import OpTable
from bittrue.ops.dispatch import select

LENGTH = 300
PRECISIONS = ("f32", "bf16", "fp8", "fp4")
# Root mean square of (ours - simulation) over that of the streams, one layer on the same input, median over
# layers: seen at most 4e-4. A single layer may be higher (3e-3 seen), where one flipped bit moved an FP8
# scale or an index pick.
MEDIAN_BOUND = 1e-3
# Every broken rule below moves the median to 3e-3 or more.
BROKEN_BOUND = 2e-3
# Mean KL over positions, nats. The published reference is 1.0e-2 away from its own unquantised mathematics
# (spec 8), and its decode agrees with its prefill in 94 % of arg-maxes.
KL_BOUND = 1e-2


@dataclasses.dataclass(frozen=True)
class Setup:
    runner: Runner
    ids: list[int]
    trace: Trace


@cache
def checkpoint(precision: str) -> tuple[dict[str, Any], dict[str, Tensor], list[int], Trace]:
    raw, tensors = random_checkpoint(1, precision=precision)
    ids = random_ids(LENGTH, raw["vocab_size"], seed=2)
    return raw, tensors, ids, published_trace(raw, tensors, ids)


def setup(precision: str, ops: OpTable | None = None) -> Setup:
    raw, tensors, ids, trace = checkpoint(precision)
    return Setup(make_runner(raw, tensors, level="published", act="bf16", ops=ops), ids, trace)


def layer_errors(s: Setup) -> list[float]:
    """Relative root mean square error of every layer, each on the simulation's input."""
    model = s.runner.model
    batch = build_batch([Segment(s.ids, 0, 0, 0, [3, 6, 2])])
    embedded = model.parameters.embed[batch.token_ids].to(model.act)
    before = embedded.unsqueeze(1).expand(-1, model.config.hc_mult, -1).contiguous()
    window_angles = Angles(*model.ops.rope_angles(batch.positions, model._main_freq))
    compress_angles = Angles(*model.ops.rope_angles(batch.positions, model._compress_freq))
    errors = []
    for block, kv, after in zip(model.parameters.blocks, s.runner.caches, s.trace.streams, strict=True):
        angles = window_angles if block.kind == "window" else compress_angles
        got = model._experts_sublayer(
            model._attention_sublayer(before, batch, block, kv, angles), batch, block
        ).double()
        want = after.double()
        errors.append(float((got - want).square().mean().sqrt() / want.square().mean().sqrt()))
        before = after.to(model.act).contiguous()
    return errors


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_layer_equals_the_simulation_to_within_rounding_steps(precision: str) -> None:
    errors = layer_errors(setup(precision))
    assert median(errors) <= MEDIAN_BOUND, errors


def unquantised_cache(s: Setup) -> Setup:
    """Rows and keys stored in bf16: no KV quantisation, no FP4 keys."""
    layout = KVLayout.of(s.runner.model.config, level="maths", act="bf16")
    return dataclasses.replace(s, runner=Runner(s.runner.model, allocate(layout, pages=32, slots=2)))


HONEST = select("cpu", threads=1)
BROKEN_OPS: dict[str, dict[str, Any]] = {
    "inputs of FP8 weights not quantised": {
        "linear": lambda *args, quantize=False, **options: HONEST.linear(*args, **options),
        "linears": lambda x, weights, quantize, out_dtypes: HONEST.linears(
            x, weights, quantize=(False,) * len(weights), out_dtypes=out_dtypes
        ),
    },
    "experts' inputs not quantised": {
        "experts": lambda *args, limit, quantize: HONEST.experts(*args, limit=limit, quantize=False)
    },
    "probabilities not rounded": {
        "attention": lambda *args, round_probs, **options: HONEST.attention(
            *args, round_probs=False, **options
        )
    },
}


@pytest.mark.parametrize("rule", BROKEN_OPS)
def test_a_broken_rule_is_far_outside_the_bound(rule: str) -> None:
    errors = layer_errors(setup("fp4", HONEST.with_ops(**BROKEN_OPS[rule])))
    assert median(errors) > BROKEN_BOUND, errors


def test_an_unquantised_cache_is_far_outside_the_bound() -> None:
    errors = layer_errors(unquantised_cache(setup("fp4")))
    assert median(errors) > BROKEN_BOUND, errors


def index_without(transform: str) -> Callable[..., Tensor]:
    """index_topk whose queries miss a transform ("nothing": none); its keys come in bf16, which is exact."""

    def index_topk(
        q: Tensor,
        w: Tensor,
        batch: Any,
        keys: Tensor,
        fmt: RowFormat,
        cos: Tensor,
        sin: Tensor,
        **options: Any,
    ) -> Tensor:
        q = HONEST.rope(q, cos, sin, False)
        q = q if transform == "hadamard" else HONEST.hadamard(q)
        q = q if transform == "quant_fp4" else HONEST.quant_fp4(q, 32)
        plain = RowFormat("bf16", fmt.dim)
        rows = HONEST.pack_rows(HONEST.unpack_rows(keys, fmt).flatten(0, 1).bfloat16(), plain)
        rows = rows.view(*keys.shape[:2], plain.bytes)
        still = (torch.ones_like(cos), torch.zeros_like(sin))
        return HONEST.index_topk(q, w, batch, rows, plain, *still, **options)

    return index_topk


@pytest.mark.parametrize("transform", ["hadamard", "quant_fp4"])
def test_an_index_query_without_its_transform_is_far_outside_the_bound(transform: str) -> None:
    s = setup("fp4", HONEST.with_ops(index_topk=index_without(transform)))
    kinds = [block.kind for block in s.runner.model.parameters.blocks]
    csa = [e for e, kind in zip(layer_errors(s), kinds, strict=True) if kind == "csa"]
    assert min(csa) > BROKEN_BOUND, csa


def test_an_index_query_with_both_transforms_is_within_the_bound() -> None:
    errors = layer_errors(setup("fp4", HONEST.with_ops(index_topk=index_without("nothing"))))
    assert median(errors) <= MEDIAN_BOUND, errors


@pytest.mark.parametrize("precision", PRECISIONS)
def test_logits_selections_and_experts_agree_end_to_end(precision: str) -> None:
    picks: list[Tensor] = []
    experts: list[Tensor] = []

    def index_topk(*args: Any, **options: Any) -> Tensor:
        picks.append(HONEST.index_topk(*args, **options))
        return picks[-1]

    def route_topk(*args: Any) -> tuple[Tensor, Tensor]:
        result = HONEST.route_topk(*args)
        experts.append(result[0])
        return result

    s = setup(precision, HONEST.with_ops(index_topk=index_topk, route_topk=route_topk))
    streams = s.runner.forward([Segment(s.ids, 0, 0, 1, [9, 8, 7])])
    ours = (
        torch.cat([x for _, x in s.runner.logits_by_block(streams, range(LENGTH))]).double().log_softmax(-1)
    )
    theirs = s.trace.logits.double().log_softmax(-1)
    kl = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    agree = [share_of_equal_picks(a, b) for a, b in zip(picks, s.trace.index_ids.values(), strict=True)]
    assert kl <= KL_BOUND
    assert agree[0] >= 0.997  # the first index layer; later ones see inputs that have drifted


def share_of_equal_picks(a: Tensor, b: Tensor) -> float:
    valid = (b >= 0).sum()
    return float(sum(torch.isin(x[x >= 0], y[y >= 0]).sum() for x, y in zip(a, b, strict=True)) / valid)


@pytest.mark.parametrize("ratio", [0, 4, 128])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_layer_agrees_with_the_simulation_at_nearly_every_position(ratio: int, precision: str) -> None:
    pairs = []
    for seed in range(3):
        raw, tensors = random_checkpoint(
            seed, precision=precision, num_hidden_layers=1, compress_ratios=[ratio, 0], num_hash_layers=0
        )
        ids = random_ids(200, raw["vocab_size"], seed)
        ours = logits_of(make_runner(raw, tensors, level="published", act="bf16"), ids, [200])
        pairs.append((ours, published_logits(raw, tensors, ids, compute=torch.float64)))
    assert_same_rules(pairs)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_deep_model_is_as_near_as_the_noise_of_the_simulation(precision: str) -> None:
    raw, tensors, ids, trace = checkpoint(precision)
    exact = published_logits(raw, tensors, ids, compute=torch.float64)
    ours = logits_of(make_runner(raw, tensors, level="published", act="bf16"), ids, [LENGTH])
    assert_within_noise(ours, trace.logits, exact)
