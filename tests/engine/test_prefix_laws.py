"""L3 and L4 bit for bit: resumed at every position, in branches and edits, from every tier."""

from collections import Counter
from collections.abc import Iterator

import pytest
from support.small import LEVELS, plain_engines, small_checkpoint

from bittrue.engine.engine import Engine
from bittrue.probes import cache, tiers
from bittrue.probes.engines import Engines
from bittrue.probes.result import LawResult
from bittrue.probes.resume import STRATEGIES, ResumeProbe, edges, policy_of, strategy_of
from bittrue.probes.story import Story, write_story
from bittrue.probes.workload import random_tokens

LENGTH = 600
TAIL = 7  # computed behind each position; the state there is compared whole besides


@pytest.fixture(scope="module", params=LEVELS)
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    model = small_checkpoint(tmp_path_factory.mktemp("model"), precision=LEVELS[request.param])
    with plain_engines(model, level=request.param, kv_canary="raise") as found:
        yield found


@pytest.fixture(scope="module")
def story(engines: Engines) -> Story:
    return write_story(engines.plain, longest=300, seed=1)


def resumed_at(engines: Engines, strategy: str, length: int, every: int, *, max_draft: int) -> Counter[str]:
    """Resumes a prompt at the edges and at each ``every``-th position: tiers, and tokens compared."""
    knobs = {"speculation": "ngram", "max_draft": max_draft} if max_draft else {}
    counts: Counter[str] = Counter()
    with engines.another(prefix_cache=True, **knobs) as engine:
        policy = policy_of(engine.parts, strategy_of(strategy, length))
        probe = ResumeProbe(engine.parts, policy, seed=length)
        cold = probe.cold(random_tokens(probe.draw, engine.parts, length), every_state=True)
        for position in sorted({*edges(policy, length), *range(1, length, every)}):
            one = probe.resume(cold, position, TAIL)
            assert one.difference is None, f"resumed at {position} from {one.start}: {one.difference}"
            counts[str(one.tier)] += 1
            counts["positions"] += one.num_positions
    return counts


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumed_at_many_positions_is_cold(engines: Engines, strategy: str) -> None:
    counts = resumed_at(engines, strategy, 300, 13, max_draft=3)
    assert counts["device"] + counts["replay"] > 12


@pytest.mark.slow
@pytest.mark.parametrize("max_draft", [0, 5])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumed_at_every_position_is_cold(engines: Engines, strategy: str, max_draft: int) -> None:
    counts = resumed_at(engines, strategy, LENGTH, 1, max_draft=max_draft)
    assert sum(counts[tier] for tier in ("None", "device", "replay")) == LENGTH - 1
    assert counts["positions"] > LENGTH * TAIL // 2
    # Each strategy resumes in its own way; with so small a window a replay is often nearer than a state.
    ways = {"full": ("device",), "periodic": ("device", "replay"), "recompute": ("replay",)}
    assert all(counts[way] > LENGTH // 4 for way in ways[strategy]), counts


@pytest.mark.parametrize("rounds", [3, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_branches_of_branches_resume_as_they_run_cold(engines: Engines, strategy: str, rounds: int) -> None:
    with engines.another(prefix_cache=True) as engine:
        probe = ResumeProbe(engine.parts, policy_of(engine.parts, strategy_of(strategy, 400)), seed=rounds)
        cold = probe.cold(random_tokens(probe.draw, engine.parts, 400))
        result = cache.branched_result(engine.parts, probe, cold, probe.draw, rounds)
    assert result.holds, result
    assert result.exercised["branches resumed"] >= rounds


def assert_all_hold(results: Iterator[LawResult], *needs: str) -> None:
    exercised: Counter[str] = Counter()
    for result in results:
        assert result.holds, result
        exercised.update(result.exercised)
    assert all(exercised[need] > 0 for need in needs), exercised


def test_conversations_with_edits_are_answered_as_without_a_cache(engines: Engines, story: Story) -> None:
    assert_all_hold(cache.conversations(engines, story), "tokens from device", "tokens replayed")


def test_conversations_go_on_from_every_tier(engines: Engines, story: Story) -> None:
    assert_all_hold(
        tiers.tiers(engines, story),
        "tokens from host",
        "tokens from disk",
        "tokens from disk after a restart",
        "flipped files missed",
    )


def test_a_tenth_of_the_rows_in_memory_gives_the_same_bits(engines: Engines, story: Story) -> None:
    assert_all_hold(tiers.offload(engines, story), "steps with rows off memory")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
def test_many_conversations_are_answered_as_without_a_cache(engines: Engines, seed: int) -> None:
    story = write_story(engines.plain, longest=(200, 500, 129, 257, 400, 640)[seed - 2], seed=seed)
    assert_all_hold(cache.conversations(engines, story), "tokens from device")
    assert_all_hold(tiers.tiers(engines, story), "tokens from host", "tokens from disk")
    assert_all_hold(tiers.offload(engines, story), "steps with rows off memory")


def test_the_plain_engine_takes_nothing_from_a_cache(engines: Engines, story: Story) -> None:
    counters = engines.plain.stats().cache
    assert sum(counters.hit_tokens.values()) == 0
    assert isinstance(engines.plain, Engine) and engines.plain.stats().pages_cached == 0
