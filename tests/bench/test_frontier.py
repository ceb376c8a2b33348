"""Images put a sequence at any context; the frontier tells real prefills from random rows."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bittrue.bench.frontier import Frontier, FrontierBench, engine_config
from bittrue.bench.image import capture, place, random_image
from bittrue.bench.result import decode_result
from bittrue.cli.bench import frontier, parse_contexts
from bittrue.engine.engine import Engine
from bittrue.engine.types import Request, SamplingParams
from bittrue.errors import UsageError
from bittrue.model.presets import make_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("tiny", 5, "fp4", tmp_path_factory.mktemp("frontier") / "tiny")


@pytest.fixture
def engine(model: Path) -> Iterator[Engine]:
    engine = Engine(model, threads=1, kv_memory=1 << 23, max_context=4096, max_running=4, prefix_cache=False)
    yield engine
    engine.close()


def tokens_of(engine: Engine, names: list[str], count: int) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {name: [] for name in names}
    for _ in range(count):
        for event in engine.step():
            found[event.request_id] += event.token_ids
    return found


def test_a_placed_image_goes_on_with_the_tokens_of_its_prefill(engine: Engine) -> None:
    prompts = [tuple((7 * i * i + k) % 1000 for i in range(n)) for k, n in enumerate((300, 517))]
    images, expected = [], []
    for prompt in prompts:
        engine.add(Request(request_id="real", prompt=prompt, params=GREEDY))
        while not engine.step():
            pass
        images.append(capture(engine, "real"))
        assert images[-1].num_computed == len(prompt) and not images[-1].is_filled
        expected.append(tokens_of(engine, ["real"], 8)["real"])
        engine.abort("real")
        engine.step()
    # Together, in the other order: other slots, other pages.
    names = place(engine, images[::-1], max_tokens=12)
    found = tokens_of(engine, names, 8)
    assert [found[name] for name in names] == expected[::-1]
    engine.check()


def test_filled_sequences_decode_and_give_their_pages_back(engine: Engine) -> None:
    ids = [i % 1000 for i in range(2000)]
    images = [random_image(engine, ids[:n], seed=n) for n in (130, 2000, 1281)]
    assert all(image.is_filled for image in images)
    names = place(engine, images, max_tokens=4)
    engine.check()
    stats = engine.stats()
    assert (stats.num_running, stats.slots_held) == (3, 3)
    events = engine.step()
    assert sorted(event.request_id for event in events) == names
    assert all(len(event.token_ids) == 1 for event in events)
    for _ in range(3):
        events = engine.step()
    assert {event.finish_reason for event in events} == {"length"}
    engine.check()
    stats = engine.stats()
    assert stats.pages_held == stats.slots_held == 0
    assert stats.pages_free == stats.pages_total


def test_random_rows_are_finite_and_the_same_for_the_same_seed(engine: Engine) -> None:
    ids = list(range(400))
    one, same, other = (random_image(engine, ids, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parts, same.parts, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one.parts, other.parts, strict=True) if a.numel())
    ops, place_of = engine.parts.runner.model.ops, iter(one.parts)
    for layer in engine.parts.layout.layers:
        for part in layer.parts:
            values = next(place_of)
            if part.dtype == "u8":
                form = layer.key_format if part.name == "keys" else layer.row_format
                assert form is not None
                values = ops.unpack_rows(values.contiguous(), form)
                assert 0.9 < values.std() < 1.1
            assert bool(values.isfinite().all())


def test_the_frontier_tells_real_prefills_from_random_rows(model: Path) -> None:
    plan = Frontier(
        contexts=(1500, 256, 4096), batch=2, max_real_prefill=1500, rounds=2, steps=2, prefill_seconds=0.0
    )
    engine = Engine(model, engine_config(model, plan, threads=1))
    found = list(FrontierBench(engine, plan, lambda line: None).run())
    engine.check()
    assert engine.stats().pages_held == 0
    by_name = {name: [m for m in found if m.name == name] for name in {m.name for m in found}}
    prefills = {m.labels["context"]: m for m in by_name["prefill"]}
    assert set(prefills) == {256, 1500} and all(m.labels["filled"] is False for m in by_name["prefill"])
    assert {m.labels["context"]: m.labels["filled"] for m in by_name["decode"]} == {
        256: False,
        1500: False,
        4096: True,
    }
    assert all(m.repeats == 4 for m in by_name["decode"])
    assert {m.labels["context"] for m in by_name["decode over decode at 4096"]} == {256, 1500}
    resident = {m.labels["context"]: m for m in by_name["resident"]}
    ledger = [resident[context].labels["ledger_bytes"] for context in (256, 1500, 4096)]
    assert ledger == sorted(ledger) and ledger[0] != ledger[-1]


def test_the_memory_holds_the_batch_at_the_longest_context(model: Path) -> None:
    for batch in (1, 7):
        plan = Frontier(contexts=(100, 3000), batch=batch)
        engine = Engine(model, engine_config(model, plan, threads=1))
        pages, slots = engine.parts.num_pages, engine.parts.num_slots
        assert (pages, slots) == (batch * -(-(3001 + plan.margin) // 128), batch)


def test_the_verb_prints_the_record(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert frontier(model, contexts="64", rounds=1, steps=1, prefill_seconds=0, threads=1, json=True) == 0
    result = decode_result(capsys.readouterr().out, source="stdout")
    assert result.benchmark == "frontier" and result.config["level"] == "published"
    assert result.find("decode", context=64, batch=1, filled=False) is not None


@pytest.mark.parametrize("text", ["", "4K", "1,,2", "1.5"])
def test_contexts_that_are_no_numbers_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="contexts"):
        parse_contexts(text)


@pytest.mark.parametrize("bad", [{"contexts": (0,)}, {"contexts": ()}, {"batch": 0}, {"rounds": 0}])
def test_a_frontier_that_measures_nothing_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        Frontier(**{"contexts": (1,), **bad})  # type: ignore[arg-type]
