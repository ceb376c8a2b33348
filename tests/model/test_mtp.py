"""The draft module against an independent simulation of its section of the specification, at both levels."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.compare import MIN_SHARE, assert_same_rules, share_of_same_rows
from oracles.mtp import mtp_forward, random_mtp
from oracles.random_checkpoint import random_checkpoint
from support.models import make_runner, random_ids, source_of
from torch import Tensor

from bittrue.config.model import ModelConfig
from bittrue.kv.layout import KVLayout
from bittrue.kv.pool import allocate
from bittrue.model.batch import Segment, build_batch
from bittrue.model.build import TensorSource, build_mtp, build_parameters
from bittrue.model.deepseek_v4 import DeepseekV4
from bittrue.model.mtp import Mtp, MtpInput, once_each
from bittrue.model.presets import make_checkpoint
from bittrue.model.weights import load_checkpoint, weight
from bittrue.ops.contracts import LayerCache, OpTable
from bittrue.ops.dispatch import select
from bittrue.ops.numeric import first_difference

LENGTH = 150  # past the window of 128
TOLERANCE = 2e-5  # as for the main model's logits
SLOT, SLOTS = 2, 3


def draft_cache(model: DeepseekV4, *, max_draft: int = 0) -> LayerCache:
    """The ring of the draft layer, all NaN: reading what was never written shows."""
    layout = KVLayout.of(
        model.config,
        level=model.level,
        act="f32" if model.act == torch.float32 else "bf16",
        max_draft=max_draft,
        num_draft_layers=1,
    )
    cache = allocate(layout, pages=1, slots=SLOTS)[-1]
    cache.window.fill_(0xFF)
    return cache


def given(streams: Tensor, next_ids: list[int], start: int = 0) -> MtpInput:
    batch = build_batch([Segment(next_ids, start, start, SLOT, ())])
    return MtpInput(batch, streams.contiguous(), once_each(len(next_ids), streams.shape[1]))


def made(
    seed: int, *, precision: str = "f32", level: Any = "maths", act: Any = "f32", ops: OpTable | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], Mtp, Tensor, list[int]]:
    """A one-layer checkpoint with a draft module, that module, streams of a prompt and the prompt."""
    raw, tensors = random_checkpoint(
        seed, precision=precision, num_hidden_layers=1, compress_ratios=[4, 0], num_hash_layers=1
    )
    tensors |= random_mtp(seed + 50, raw, precision=precision)
    runner = make_runner(raw, tensors, level=level, act=act, ops=ops)
    ids = random_ids(LENGTH + 1, raw["vocab_size"], seed)
    streams = runner.forward([Segment(ids[:-1], 0, 0, 0, [3, 1])])
    mtp = Mtp(runner.model, build_mtp(runner.model.config, source_of(tensors)))
    return raw, tensors, mtp, streams, ids


def test_streams_and_logits_equal_the_simulation_at_the_maths_level() -> None:
    for seed in range(3):
        raw, tensors, mtp, streams, ids = made(seed)
        own = mtp.forward(given(streams, ids[1:]), draft_cache(mtp.model))
        want_streams, want_logits = mtp_forward(raw, tensors, streams, ids[1:])
        assert float((own - want_streams).abs().max()) <= TOLERANCE
        assert float((mtp.logits(own) - want_logits).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("precision", ["bf16", "fp8", "fp4"])
def test_logits_agree_with_the_simulation_at_the_published_level(precision: str) -> None:
    pairs = []
    for seed in range(3):
        raw, tensors, mtp, streams, ids = made(seed, precision=precision, level="published", act="bf16")
        ours = mtp.logits(mtp.forward(given(streams, ids[1:]), draft_cache(mtp.model)))
        theirs = mtp_forward(
            raw, tensors, streams, ids[1:], level="published", act=torch.bfloat16, compute=torch.float64
        )[1]
        pairs.append((ours, theirs))
    assert_same_rules(pairs)


def test_projections_of_unquantised_inputs_are_far_outside_the_bound() -> None:
    honest = select("cpu", threads=1)
    ops = honest.with_ops(linear=lambda *a, quantize=False, **options: honest.linear(*a, **options))
    for seed in range(3):
        raw, tensors, mtp, streams, ids = made(seed, precision="fp8", level="published", act="bf16")
        broken = mtp.on(ops)
        ours = broken.logits(broken.forward(given(streams, ids[1:]), draft_cache(mtp.model)))
        theirs = mtp_forward(raw, tensors, streams, ids[1:], level="published", act=torch.bfloat16)[1]
        assert share_of_same_rows(ours, theirs) < MIN_SHARE / 2


@pytest.mark.parametrize(
    ("precision", "level", "act"), [("f32", "maths", "f32"), ("fp4", "published", "bf16")]
)
def test_rows_stored_alone_are_those_of_the_whole_layer(precision: str, level: str, act: str) -> None:
    _, _, mtp, streams, ids = made(1, precision=precision, level=level, act=act)
    whole, alone = draft_cache(mtp.model, max_draft=3), draft_cache(mtp.model, max_draft=3)
    mtp.forward(given(streams, ids[1:]), whole)
    mtp.store_rows(given(streams, ids[1:]), alone)
    assert torch.equal(whole.window, alone.window)
    assert whole.window[SLOT].ne(0xFF).any()
    assert whole.window[SLOT - 1].eq(0xFF).all()


def test_a_position_alone_equals_the_same_position_in_one_pass() -> None:
    _, _, mtp, streams, ids = made(2, precision="fp4", level="published", act="bf16")
    want = mtp.forward(given(streams, ids[1:]), draft_cache(mtp.model))
    cache = draft_cache(mtp.model)
    got = [mtp.forward(given(streams[t : t + 1], ids[t + 1 : t + 2], t), cache) for t in range(LENGTH)]
    assert first_difference(want, torch.cat(got)) is None


def test_a_call_can_be_captured() -> None:
    _, _, mtp, streams, ids = made(3)
    capture = mtp.model.ops.capture
    assert capture is not None
    want = mtp.forward(given(streams, ids[1:]), draft_cache(mtp.model))
    step, cache = given(streams, ids[1:]), draft_cache(mtp.model)
    captured = capture(lambda ops: mtp.on(ops).forward(step, cache))
    assert first_difference(want, captured.replay()) is None


def test_the_module_of_a_stored_checkpoint_is_found_by_its_published_names(tmp_path: Path) -> None:
    directory = make_checkpoint("tiny", 0, "fp4", tmp_path / "model", draft="mtp")
    checkpoint = load_checkpoint(directory)
    source = TensorSource(checkpoint.tensor, lambda name: weight(checkpoint, name))
    config = ModelConfig.from_dict(dict(checkpoint.raw_config))
    model = DeepseekV4(
        config, build_parameters(config, source), select("cpu", threads=1), level="published", act="bf16"
    )
    mtp = Mtp(model, build_mtp(config, source))
    ids = random_ids(6, config.vocab_size, seed=0)
    streams = model.ops.embed(torch.tensor(ids[:-1]), model.parameters.embed, config.hc_mult, model.act)
    ours = mtp.logits(mtp.forward(given(streams, ids[1:]), draft_cache(model)))
    tensors = dict(checkpoint.all_tensors())
    theirs = mtp_forward(
        checkpoint.raw_config, tensors, streams, ids[1:], level="published", act=torch.bfloat16
    )[1]
    assert share_of_same_rows(ours, theirs) >= MIN_SHARE
