"""The runner: small steps are captured by shape; caches behind those of the model are only held."""

import random
from dataclasses import replace

import pytest
import torch
from oracles.random_checkpoint import random_checkpoint
from support.models import logits_of, make_runner, random_ids, source_of
from torch import Tensor

from bittrue.config.model import ModelConfig
from bittrue.engine import graphs
from bittrue.engine.runner import Runner
from bittrue.kv.layout import KVLayout
from bittrue.kv.ledger import GRAPH_ROWS
from bittrue.kv.pool import allocate
from bittrue.model.batch import Segment
from bittrue.model.build import build_parameters
from bittrue.model.deepseek_v4 import DeepseekV4
from bittrue.ops.dispatch import select
from bittrue.ops.numeric import first_difference

OPS = select("cpu", threads=1)
RAW, TENSORS = random_checkpoint(7)


def prefill_steps(num_steps: int, seed: int) -> list[list[Segment]]:
    """Steps of a few sequences with any numbers of tokens, up to and beyond the largest captured step."""
    rng = random.Random(seed)
    done, steps = [0, 0, 0], []
    for _ in range(num_steps):
        chosen = rng.sample(range(3), rng.randint(1, 3))
        segments = []
        for q in chosen:
            count = rng.choice((0, 1, 1, 2, 5, 9, 14, 30)) if segments else 1
            tokens = random_ids(count, RAW["vocab_size"], seed=1000 * q + done[q])
            segments.append(Segment(tokens, done[q], done[q], q, (3 * q, 3 * q + 1, 3 * q + 2)))
            done[q] += count
        steps.append(segments)
    return steps


def logits_of_steps(runner: Runner, steps: list[list[Segment]]) -> list[Tensor]:
    found = []
    for segments in steps:
        streams = runner.forward(segments)
        found += [x.clone() for _, x in runner.logits_by_block(streams, range(len(streams)))]
    return found


@pytest.mark.parametrize("most", [2, 64])
def test_steps_of_any_mix_of_lengths_give_the_bits_of_direct_ones_however_few_captures_are_held(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "GRAPHS", most)
    captured = make_runner(RAW, TENSORS, ops=OPS, pages=9)
    direct = make_runner(RAW, TENSORS, ops=replace(OPS, capture=None), pages=9)
    steps = prefill_steps(25, seed=most)
    got, want = logits_of_steps(captured, steps), logits_of_steps(direct, steps)
    assert len(got) == len(want)
    assert all(first_difference(a, b) is None for a, b in zip(want, got, strict=True))
    small = {(len(s), n) for s in steps if 0 < (n := sum(len(x.token_ids) for x in s)) <= GRAPH_ROWS}
    assert captured._graphs is not None
    assert len(small) > 5 and set(captured._graphs.shapes) <= small
    assert len(captured._graphs.shapes) == min(most, len(small))


def test_the_shape_used_last_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "GRAPHS", 2)
    runner = make_runner(RAW, TENSORS, ops=OPS)
    for count in (1, 2, 1, 3):
        runner.forward([Segment([5] * count, 0, 0, 0, (0,))])
    assert runner._graphs is not None
    assert runner._graphs.shapes == [(1, 1), (1, 3)]


def test_logits_of_some_rows_of_a_captured_step_are_those_of_all() -> None:
    runner = make_runner(RAW, TENSORS, ops=OPS)
    streams = runner.forward([Segment(random_ids(9, RAW["vocab_size"], seed=1), 0, 0, 0, (0,))])
    ((_, block),) = runner.logits_by_block(streams, range(9))
    every = block.clone()
    ((rows, some),) = runner.logits_by_block(streams, [8, 2])
    assert rows == [8, 2] and first_difference(every[[8, 2]], some) is None
    assert first_difference(every[[8, 2]], runner.logits(streams, [8, 2])) is None


def test_caches_of_draft_layers_are_held_and_not_touched() -> None:
    config = ModelConfig.from_dict(dict(RAW))
    layout = KVLayout.of(config, level="maths", act="f32", num_draft_layers=2)
    caches = allocate(layout, pages=3, slots=2)
    model = DeepseekV4(config, build_parameters(config, source_of(TENSORS)), OPS, level="maths", act="f32")
    runner = Runner(model, caches)
    assert runner.caches == caches[: config.num_layers] and runner.draft_caches == caches[-2:]
    for cache in runner.draft_caches:
        cache.window.fill_(7)
    prompt = random_ids(140, RAW["vocab_size"], seed=2)
    chunks = [100, *[1] * 20, 20]
    found = logits_of(runner, prompt, chunks)
    assert first_difference(logits_of(make_runner(RAW, TENSORS, ops=OPS), prompt, [140]), found) is None
    assert all((cache.window == 7).all() for cache in runner.draft_caches)
    with pytest.raises(AssertionError, match="caches for 6 layers"):
        Runner(model, caches[:5])


def test_a_draft_module_may_take_turns_with_the_steps_of_the_runner() -> None:
    """A captured function of the same ops overwrites the step's results, not what was copied from them."""
    runner = make_runner(RAW, TENSORS, ops=OPS)
    assert OPS.capture is not None
    config = runner.model.config
    own = torch.empty(1, config.hc_mult, config.hidden_size)
    draft = OPS.capture(lambda ops: runner.model.on(ops).logits(own))
    tokens = random_ids(30, RAW["vocab_size"], seed=3)
    want = logits_of(make_runner(RAW, TENSORS, ops=OPS), tokens, [30])
    for t, token in enumerate(tokens):
        streams = runner.forward([Segment([token], t, t, 0, (0,))])
        ((_, logits),) = runner.logits_by_block(streams, [0])
        assert first_difference(want[t : t + 1], logits) is None, t
        own.copy_(streams)
        assert first_difference(want[t : t + 1], draft.replay()) is None, t
