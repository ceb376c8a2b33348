"""The oracles agree with each other, formats hold by brute force, and every broken rule is noticed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import formats, published
from oracles.compare import assert_same_rules, assert_within_noise, row_distances, share_of_same_rows
from oracles.hf import build_hf, deterministic_topk, hf_logits, ordered_topk
from oracles.published import published_logits, published_trace
from oracles.random_checkpoint import random_checkpoint
from torch import Tensor

LENGTHS = (*range(1, 9), *range(126, 132), *range(255, 258), *range(511, 516))
HF_TOLERANCE = 2e-5  # logits have a standard deviation near 1; both sides show about 5e-6 against float64

CONFIGS: dict[str, dict[str, Any]] = {
    "few-index-heads": {"index_n_heads": 1, "index_topk": 8, "num_hash_layers": 0},
    "many-index-heads": {
        "index_n_heads": 64,
        "index_topk": 24,
        "head_dim": 128,
        "qk_rope_head_dim": 32,
        "index_head_dim": 64,
    },
    "clamps-and-no-yarn": {
        "swiglu_limit": 0.5,
        "rope_scaling": None,
        "hidden_size": 96,
        "num_experts_per_tok": 4,
    },
}


def tokens(count: int, seed: int = 3) -> list[int]:
    return torch.randint(0, 512, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(params=CONFIGS, scope="module")
def pair(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    config, tensors = random_checkpoint(11, **CONFIGS[request.param])
    return config, tensors, build_hf(config, tensors)


def maths(config: dict[str, Any], tensors: dict[str, Tensor], ids: list[int]) -> Tensor:
    return published_logits(config, tensors, ids, level="maths", act=torch.float32)


def test_maths_level_equals_transformers_at_lengths_around_every_boundary(pair: Any) -> None:
    config, tensors, model = pair
    ids = tokens(max(LENGTHS))
    ours = maths(config, tensors, ids)
    with deterministic_topk(model):
        for length in LENGTHS:
            theirs = hf_logits(model, ids[:length])
            assert row_distances(ours[:length], theirs).max() <= HF_TOLERANCE, length


def test_maths_level_of_a_prefix_equals_the_prefix_of_maths_level(pair: Any) -> None:
    config, tensors, _ = pair
    ids = tokens(259)
    whole = maths(config, tensors, ids)
    for length in (1, 3, 4, 5, 127, 128, 129, 256):
        assert row_distances(maths(config, tensors, ids[:length]), whole[:length]).max() <= HF_TOLERANCE, (
            length
        )


def test_transformers_agrees_with_itself_once_ties_have_an_order(pair: Any) -> None:
    config, tensors, model = pair
    ids = tokens(150)
    with deterministic_topk(model):
        full = hf_logits(model, ids)
        for chunk in (3, 64, 128):
            assert row_distances(hf_logits(model, ids, "chunked", chunk=chunk), full).max() <= HF_TOLERANCE, (
                chunk
            )
        assert row_distances(hf_logits(model, ids, "decode", prefill=122), full).max() <= HF_TOLERANCE


@pytest.mark.slow
def test_maths_level_equals_transformers_decoding_token_by_token() -> None:
    config, tensors = random_checkpoint(12, index_n_heads=2, index_topk=8)
    model, ids = build_hf(config, tensors), tokens(260)
    with deterministic_topk(model):
        assert (
            row_distances(maths(config, tensors, ids), hf_logits(model, ids, "decode")).max() <= HF_TOLERANCE
        )


def test_quantised_checkpoints_have_the_same_maths_in_transformers() -> None:
    for precision in ("bf16", "fp8", "fp4"):
        config, tensors = random_checkpoint(13, precision=precision, hidden_size=192, index_n_heads=8)
        model, ids = build_hf(config, tensors), tokens(140)
        with deterministic_topk(model):
            assert row_distances(maths(config, tensors, ids), hf_logits(model, ids)).max() <= HF_TOLERANCE, (
                precision
            )


def test_ordered_topk_breaks_ties_by_the_smaller_id() -> None:
    scores = torch.tensor([[0.0, 2.0, 0.0, 2.0, -1.0, 0.0]])
    assert ordered_topk(scores, 4).indices.tolist() == [[1, 3, 0, 2]]
    with deterministic_topk(None):
        assert scores.topk(4, dim=-1).indices.tolist() == [[1, 3, 0, 2]]
        assert torch.topk(scores, 3, dim=-1, sorted=False).indices.tolist() == [[1, 3, 0]]


def one_layer(seed: int, ratio: int, precision: str = "fp4") -> tuple[dict[str, Any], dict[str, Tensor]]:
    fields = {
        "num_hidden_layers": 1,
        "compress_ratios": [ratio, 0],
        "num_hash_layers": 0,
        "swiglu_limit": 1.0,
    }
    return random_checkpoint(seed, precision=precision, **fields)


@pytest.mark.parametrize("ratio", [0, 4, 128])
@pytest.mark.parametrize("precision", ["f32", "bf16", "fp8", "fp4"])
def test_order_of_additions_hardly_shows_in_one_layer_at_published_level(ratio: int, precision: str) -> None:
    pairs, ids = [], tokens(200)
    for seed in range(3):
        config, tensors = one_layer(seed, ratio, precision)
        exact = published_logits(config, tensors, ids, compute=torch.float64)
        pairs.append((published_logits(config, tensors, ids), exact))
    assert_same_rules(pairs)


def test_levels_differ_and_deep_noise_is_bounded_by_itself() -> None:
    config, tensors = random_checkpoint(6, precision="fp4")
    ids = tokens(140)
    exact = published_logits(config, tensors, ids, compute=torch.float64)
    ours = published_logits(config, tensors, ids)
    assert_within_noise(ours, ours, exact)
    with pytest.raises(AssertionError, match="oracle's noise"):
        assert_within_noise(maths(config, tensors, ids), ours, exact, factor=1.0)


# ---- broken rules: each replaces one function of the oracle ---------------------------------------


def break_attribute(name: str, build: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(published, name, build(getattr(published, name)))


def sink_inside_the_maximum(_: Any) -> Any:
    def broken(
        source: Any, q: Tensor, rows: Tensor, entries: Tensor, allowed: Tensor, sink: Tensor
    ) -> Tensor:
        position = torch.arange(rows.shape[0])
        near = (position <= position[:, None]) & (
            position > position[:, None] - source.config["sliding_window"]
        )
        keys, mask = torch.cat((rows, entries)), torch.cat((near, allowed), dim=-1)
        logits = torch.einsum("tnc,rc->tnr", q, keys) * q.shape[-1] ** -0.5
        logits = logits.masked_fill(~mask[:, None, :], -torch.inf)
        peak = torch.maximum(logits.amax(-1, keepdim=True), sink[:, None])
        weight = torch.exp(logits - peak)
        total = weight.sum(-1, keepdim=True) + torch.exp(sink[:, None] - peak)
        weight = weight.to(torch.bfloat16).float()
        return source.arith.round(torch.einsum("tnr,rc->tnc", weight, keys) / total)

    return broken


def half_order(with_previous: Any) -> Any:
    return lambda slots, dim, missing: with_previous(
        torch.cat((slots[..., dim:], slots[..., :dim]), -1), dim, missing
    )


def weight_after_w2(one_expert: Any) -> Any:
    def broken(source: Any, x: Tensor, prefix: str, weight: Tensor | None) -> Tensor:
        out = one_expert(source, x, prefix, None)
        return out if weight is None else source.arith.round(weight[:, None] * out)

    return broken


def quantise_wo_a_input(project: Any) -> Any:
    return lambda source, out, prefix: project(
        source, formats.quant_fp8(out.flatten(1), 128).view_as(out), prefix
    )


def keep_probabilities(attend: Any) -> Any:
    def broken(source: Any, *rest: Tensor) -> Tensor:
        return attend(
            dataclasses.replace(source, arith=dataclasses.replace(source.arith, published=False)), *rest
        )

    return broken


def no_clamp_on_shared(one_expert: Any) -> Any:
    def broken(source: Any, x: Tensor, prefix: str, weight: Tensor | None) -> Tensor:
        limit = source.config["swiglu_limit"] if weight is not None else 1e9
        return one_expert(
            dataclasses.replace(source, config={**source.config, "swiglu_limit": limit}), x, prefix, weight
        )

    return broken


def turn_the_first_features(rope: Any) -> Any:
    def broken(arith: Any, x: Tensor, positions: Tensor, freqs: Tensor, *, inverse: bool = False) -> Tensor:
        return rope(arith, x.flip(-1), positions, freqs, inverse=inverse).flip(-1)

    return broken


def no_inverse(rope: Any) -> Any:
    def broken(arith: Any, x: Tensor, positions: Tensor, freqs: Tensor, *, inverse: bool = False) -> Tensor:
        return x if inverse else rope(arith, x, positions, freqs)

    return broken


BROKEN_RULES: dict[str, tuple[int, Callable[[pytest.MonkeyPatch], None]]] = {
    "combination not transposed": (
        0,
        break_attribute(
            "hyper_post", lambda f: lambda a, y, s, post, comb: f(a, y, s, post, comb.transpose(1, 2))
        ),
    ),
    "compressor halves swapped": (4, break_attribute("with_previous_window", half_order)),
    "plain rope base in a compressed layer": (
        4,
        break_attribute("rope_frequencies", lambda f: lambda c, ratio: f(c, 0)),
    ),
    "rope on the first features": (0, break_attribute("rope", turn_the_first_features)),
    "no inverse rope": (0, break_attribute("rope", no_inverse)),
    "routing weight after w2": (0, break_attribute("one_expert", weight_after_w2)),
    "no clamp on the shared expert": (0, break_attribute("one_expert", no_clamp_on_shared)),
    "entries visible one window early": (
        4,
        break_attribute("visible_entries", lambda f: lambda n, ratio: f(n + ratio, ratio)[ratio:, :-1]),
    ),
    "sink inside the maximum": (0, break_attribute("attend", sink_inside_the_maximum)),
    "no Hadamard": (4, break_attribute("hadamard", lambda f: lambda x: x)),
    "index path not quantised": (4, break_attribute("quant_fp4", lambda f: lambda x, group: x)),
    "rows not quantised": (0, break_attribute("stored_row", lambda f: lambda source, row: row)),
    "activations not quantised": (
        0,
        break_attribute("quant_fp8", lambda f: lambda x, group: f(x, group) if group == 64 else x),
    ),
    "input of wo_a quantised": (0, break_attribute("output_projection", quantise_wo_a_input)),
    "probabilities not rounded": (0, break_attribute("attend", keep_probabilities)),
    "scale exponent rounded down": (
        0,
        lambda patch: patch.setattr(
            formats, "scale_exponent", lambda amax, top: torch.log2(amax.double() / top).floor().int()
        ),
    ),
}


@pytest.mark.parametrize("rule", BROKEN_RULES)
def test_a_broken_rule_is_noticed_at_the_published_level(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ratio, break_it = BROKEN_RULES[rule]
    ids, checkpoints = tokens(200), [one_layer(seed, ratio) for seed in range(3)]
    truth = [published_logits(config, tensors, ids) for config, tensors in checkpoints]
    break_it(monkeypatch)
    broken = [published_logits(config, tensors, ids) for config, tensors in checkpoints]
    with pytest.raises(AssertionError, match="positions that agree"):
        assert_same_rules(zip(broken, truth, strict=True))


# ---- traces and formats -----------------------------------------------


def test_trace_reports_selections_in_ascending_order() -> None:
    config, tensors = random_checkpoint(7, index_topk=6)
    trace = published_trace(config, tensors, tokens(64), level="maths", act=torch.float32)
    assert sorted(trace.index_ids) == [1, 3, 5]
    for ids in trace.index_ids.values():
        for position, row in enumerate(ids.tolist()):
            picks = [i for i in row if i >= 0]
            assert len(picks) == min(6, (position + 1) // 4)
            assert picks == sorted(set(picks)) and all(i < (position + 1) // 4 for i in picks)
    table = tensors["layers.0.ffn.gate.tid2eid"]
    assert torch.equal(trace.expert_ids[0], table[torch.tensor(tokens(64))])
    assert all((trace.expert_ids[i].diff(dim=-1) > 0).all() for i in range(2, 6))
    assert len(trace.streams) == 6


def test_byte_tables_equal_torchs_own_casts() -> None:
    every_byte = torch.arange(256).to(torch.uint8)
    for table, dtype in (
        (formats.e4m3_table(), torch.float8_e4m3fn),
        (formats.e8m0_table(), torch.float8_e8m0fnu),
    ):
        assert torch.equal(table.nan_to_num(nan=-1.0), every_byte.view(dtype).double().nan_to_num(nan=-1.0))


def test_fp4_bytes_hold_the_even_element_in_the_low_nibble() -> None:
    weight = torch.tensor([[0x21, 0x7F]], dtype=torch.uint8).view(torch.int8)
    scale = torch.tensor([[128]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert formats.dequant_fp4(weight, scale).tolist() == [[1.0, 2.0, -12.0, 12.0]]


def test_fp8_scales_belong_to_blocks_of_128_both_ways() -> None:
    weight = torch.ones(130, 257).to(torch.float8_e4m3fn)
    scale = torch.tensor([[127, 128, 129], [130, 131, 132]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    values = formats.dequant_fp8(weight, scale)
    corners = values[[0, 0, 0, 0, 127, 128, 129], [0, 127, 128, 256, 0, 0, 256]]
    assert corners.tolist() == [1, 1, 2, 4, 1, 8, 32]


def test_e2m1_rounding_is_to_the_nearest_and_ties_go_to_the_even_code() -> None:
    grid = torch.arange(0, 6.5, 1 / 64)
    levels = torch.tensor(formats.E2M1)
    for value, got in zip(grid.tolist(), formats.round_e2m1(grid).tolist(), strict=True):
        distance = (levels - value).abs()
        nearest = [code for code in range(8) if distance[code] == distance.min()]
        wanted = nearest[0] if len(nearest) == 1 else next(code for code in nearest if code % 2 == 0)
        assert got == levels[wanted], value
    assert torch.equal(formats.round_e2m1(-grid), -formats.round_e2m1(grid))


def test_quantised_groups_never_clip_and_share_one_power_of_two() -> None:
    values = (
        torch.randn(64, 200, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 3, 64)[:, None]
    )
    for quant, group, largest, floor in (
        (formats.quant_fp8, 128, 448.0, 1e-4),
        (formats.quant_fp4, 32, 6.0, 6 * 2.0**-126),
    ):
        coded = quant(values, group)
        for begin in range(0, 200, group):
            part, original = coded[:, begin : begin + group], values[:, begin : begin + group]
            amax = original.abs().amax(-1).clamp(min=floor).double()
            scale = 2.0 ** torch.ceil(torch.log2(amax / largest))
            assert (part.abs().amax(-1) / scale <= largest).all() and (amax / scale > largest / 2).all()
            step = 2.0 if group == 32 else 32.0  # spacing of the largest values
            assert ((part - original).abs().amax(-1) <= scale * step / 2).all()


def test_hadamard_is_orthogonal_and_its_own_inverse() -> None:
    values = torch.randn(5, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.allclose(formats.hadamard(formats.hadamard(values)), values, atol=1e-12, rtol=0)
    assert formats.hadamard(torch.eye(4))[1].tolist() == [0.5, -0.5, 0.5, -0.5]
    with pytest.raises(ValueError, match="power of two"):
        formats.hadamard(torch.zeros(3, 48))


def test_share_of_same_rows_counts_positions() -> None:
    oracle = torch.zeros(4, 3)
    assert share_of_same_rows(oracle + torch.tensor([0.0, 1e-5, 1e-2, 1.0])[:, None], oracle) == 0.5
