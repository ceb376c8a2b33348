"""L6 bit for bit: preempted at every step, into every tier, beside drafts; and everything at once."""

from collections.abc import Iterator

import pytest
from support.small import LEVELS, plain_engines, small_checkpoint

from bittrue.engine.engine import Engine
from bittrue.probes import crash, together
from bittrue.probes.drafts import Adversary, drafted_by, patterns_of, scripts_of
from bittrue.probes.engines import Engines
from bittrue.probes.preemption import Preemptor, asked, preemption
from bittrue.probes.story import write_story
from bittrue.probes.workload import difference, run_requests


@pytest.fixture(scope="module", params=LEVELS)
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    model = small_checkpoint(tmp_path_factory.mktemp("model"), precision=LEVELS[request.param])
    with plain_engines(model, level=request.param) as found:
        yield found


@pytest.mark.parametrize("rounds", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_preempted_at_every_step_is_never_preempted(engines: Engines, rounds: int) -> None:
    preempted = 0
    for result in preemption(engines, rounds=rounds, seed=rounds):
        assert result.holds, result
        assert sum(result.exercised.values()) > 0, result
        preempted += result.exercised.get("preemptions", 0)
    assert preempted > 300


@pytest.mark.parametrize("length", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_preempted_with_drafts_under_way_is_never_preempted(engines: Engines, length: int) -> None:
    requests, plain = asked(engines, seed=5)
    vocab = engines.parts.config.vocab_size
    for then in (None, Engine.evict):
        adversary = Adversary(scripts_of(requests, plain), length, patterns_of(length), vocab=vocab)
        preemptor = Preemptor(then=then)
        knobs = {"speculation": "ngram", "max_draft": length, "kv_canary": "raise", "prefix_cache": True}
        with engines.another(drafted_by(adversary), host_cache=2**24, **knobs) as engine:
            assert difference(plain, run_requests(engine, requests, preemptor)) is None
            # Preempted after each token, nobody ever computes a draft; so now and then.
            preemptor = Preemptor(chance=0.4, then=then)
            assert difference(plain, run_requests(engine, requests, preemptor)) is None
            assert sum(engine.stats().drafts.drafted_at) > 0
        assert preemptor.counts["preemptions"] > 0


@pytest.mark.parametrize("rounds", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_all_fast_paths_at_once_are_the_plain_run(engines: Engines, rounds: int) -> None:
    story = write_story(engines.plain, longest=300, seed=rounds)
    for result in together.together(engines, story, rounds=rounds, seed=rounds):
        assert result.holds, result
        for need in ("tokens resumed", "drafts accepted", "preemptions"):
            assert result.exercised[need] > 0, result


@pytest.mark.slow
def test_twenty_kills_under_32_streams_lose_nothing(engines: Engines) -> None:
    for result in crash.crash(engines, kills=20, streams=32, seed=0):
        assert result.holds, result
        assert result.exercised["kills"] == 20
        assert result.exercised["streams open at a kill"] > 100
