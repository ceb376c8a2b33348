"""What is kept is measured as it is named: hits come from their tier, bytes meet the arithmetic."""

from pathlib import Path

import pytest

from bittrue.bench.agent import Session, bench_session
from bittrue.bench.cache import FirstTokens, page_cache_share
from bittrue.bench.cache_bytes import STRATEGIES, CachedBytes, expected_bytes, of_shape, snapshots
from bittrue.bench.cache_cost import CacheCost
from bittrue.bench.engines import Answer, Model, ask, decode_speed, greedy
from bittrue.bench.result import Measurement, decode_result
from bittrue.cli.bench_cache import agent, parse_streams
from bittrue.errors import BittrueError, UsageError
from bittrue.model.presets import make_checkpoint

CONFIGS = Path(__file__).parents[1] / "golden" / "configs"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.of(make_checkpoint("tiny", 5, "bf16", tmp_path_factory.mktemp("cache") / "tiny"))


def quiet(line: str) -> None:
    pass


def named(found: list[Measurement], name: str, *labels: str) -> dict[object, Measurement]:
    """Measurements of a name by one label or several."""
    chosen = [m for m in found if m.name == name]
    return {
        m.labels[labels[0]] if len(labels) == 1 else tuple(m.labels[x] for x in labels): m for m in chosen
    }


# ---- first tokens ----


def test_every_way_to_the_first_token_is_the_one_that_is_named(model: Model, tmp_path: Path) -> None:
    found = list(FirstTokens(model, tmp_path, quiet, tokens=1300, rounds=2, threads=1).run())
    times, shares = (named(found, name, "from") for name in ("time to first token", "first token over cold"))
    ways = {"cold", "cold, cache on", "device", "replay, another question", "host"}
    assert set(times) == ways | {"disk, read lately", "disk, not in memory"}
    assert set(shares) == set(times) - {"cold"}
    cached = {way: m.labels["cached"] for way, m in times.items()}
    assert cached["cold"] == cached["cold, cache on"] == 0
    assert all(cached[way] == 1299 for way in times if str(way).startswith(("device", "host", "disk")))
    # Behind 1236 shared tokens nothing is kept: what a replay computes is not counted as cached.
    policy = model.loaded.checkpoint.config
    assert 0 < int(cached["replay, another question"]) < 1236 - (policy.num_layers - 1) * (policy.window - 1)
    assert times["cold"].repeats == 2 and times["device"].repeats == 6
    assert named(found, "disk cache in the page cache", "from")["disk, read lately"].median > 0.9


def test_a_hit_of_another_tier_is_no_measurement(model: Model, tmp_path: Path) -> None:
    bench = FirstTokens(model, tmp_path, quiet, tokens=300, threads=1)
    with model.engine(max_context=600, threads=1) as engine:
        prompt = model.prompt(300, 1)
        ask(engine, [prompt], greedy(1))
        with pytest.raises(BittrueError, match="host.*device"):
            bench._first(engine, prompt, "host")


def test_what_of_the_files_is_in_main_memory_is_measured(tmp_path: Path) -> None:
    (tmp_path / "a.kv").write_bytes(bytes(1 << 20))
    assert page_cache_share(tmp_path, drop=False) == 1.0
    # How much of it a file system lets go of when asked is its own affair: nothing of that can be expected.


# ---- bytes ----


def test_bytes_of_every_strategy_are_those_of_the_arithmetic(model: Model, tmp_path: Path) -> None:
    found = list(CachedBytes(model, tmp_path, quiet, tokens=1100, threads=1).run())
    ratios = named(found, "cached bytes over arithmetic", "strategy", "tier")
    assert set(ratios) == {(s, t) for s in STRATEGIES for t in ("device", "host", "disk")}
    assert {m.median for m in ratios.values()} == {1.0}
    sizes = named(found, "bytes per cached token", "strategy", "tier")
    for tier in ("device", "host", "disk"):
        assert sizes["full", tier].median > sizes["periodic 1024", tier].median
        assert sizes["periodic 1024", tier].median > sizes["recompute", tier].median


def test_states_lie_on_the_grid_and_at_the_ends() -> None:
    assert snapshots(512, 256) == [256, 511, 512]
    assert snapshots(600, 256) == [256, 512, 599, 600]
    assert snapshots(600, 0) == [599, 600]


def test_published_shapes_take_the_published_bytes() -> None:
    # spec: 3,514.2 and 5,031.4 bytes a token, 5,462 and 7,748 tokens of a replay.
    for shape, page, replay in (("flash", 3514.25, 5462), ("pro", 5031.4375, 7748)):
        found = list(of_shape(CONFIGS / f"{shape}.json"))
        limits = named(found, "bytes per token by arithmetic", "strategy")
        assert limits["recompute"].median == page
        state = named(found, "bytes of a state", "shape")[shape].median
        assert limits["periodic 4096"].median == page + state / 4096
        assert named(found, "tokens of a replay from nothing", "shape")[shape].median == replay


def test_an_open_page_is_in_the_blob_of_its_state(model: Model) -> None:
    with model.engine(max_context=256, threads=1) as engine:
        layout = engine.parts.layout
    whole, open_page = (expected_bytes(layout, n, [n]) for n in (256, 256 + 4))
    assert open_page["device"] == whole["device"] + layout.page_bytes
    row = sum(part.bytes // part.shape[0] for each in layout.layers for part in each.parts if part.per == "page" and part.shape[0] > 1)  # fmt: skip  # noqa: E501
    assert open_page["host"] == whole["host"] + row


# ---- cost ----


def test_the_cost_is_taken_against_an_engine_without_a_cache(model: Model, tmp_path: Path) -> None:
    bench = CacheCost(model, tmp_path, quiet, prompt_tokens=200, prefills=1, step_rounds=2, threads=1)
    found = list(bench.run())
    kinds = {"on", "on, with tiers"}
    assert set(named(found, "prefill without a hit, over off", "cache")) == kinds
    steps = named(found, "decode step, over off", "cache", "batch")
    assert set(steps) == {(kind, batch) for kind in kinds for batch in (1, 8)}
    assert all(m.repeats == 2 and m.median > 0 for m in steps.values())


# ---- the agent ----

SMALL = Session(turns=5, system=200, tool=(16, 40), fork_at=2, fork_from=0, edit_every=3, seed=2)


def prompts_of(session: Session) -> list[tuple[int, ...]]:
    prompts, requests = [], session.requests(500)
    step = next(requests)
    while True:
        prompts.append(step[0])
        try:
            step = requests.send(tuple(range(20, 20 + step[1])))
        except StopIteration:
            return prompts


def test_a_session_grows_branches_and_is_edited() -> None:
    prompts = prompts_of(SMALL)
    assert prompts == prompts_of(SMALL)
    assert len(prompts) >= 2 * SMALL.turns and max(map(len, prompts)) <= SMALL.most_tokens
    assert all(prompt[:200] == prompts[0][:200] for prompt in prompts)
    extends = [b[: len(a)] == a for a, b in zip(prompts, prompts[1:], strict=False)]
    assert True in extends and False in extends


def test_the_hit_rate_is_between_none_and_that_of_an_ideal_cache(model: Model) -> None:
    found = list(bench_session(model, SMALL, threads=1, tell=quiet))
    rates = named(found, "token hit rate", "of")
    assert 0.3 < rates["cache"].median <= rates["ideal"].median < 1
    later = named(found, "token hit rate after the first request", "of")
    assert later["cache"].median > rates["cache"].median
    assert set(named(found, "session", "cache")) == {"on", "off"}


def test_the_verb_prints_the_record(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    assert agent(model.directory, turns=2, system=64, threads=1, json=True) == 0
    result = decode_result(capsys.readouterr().out, source="stdout")
    assert result.benchmark == "agent" and result.config["threads"] == 1
    assert result.find("token hit rate", of="cache") is not None


# ---- by hand ----


def test_speed_counts_from_when_every_answer_has_begun() -> None:
    answers = [Answer((1, 2, 3), (1.0, 2.0, 3.0), 0), Answer((1, 2), (2.0, 4.0), 0)]
    assert decode_speed(answers) == 2 / (4.0 - 2.0)


def test_streams_are_numbers() -> None:
    assert parse_streams("1,32") == (1, 32)
    with pytest.raises(UsageError, match="--streams"):
        parse_streams("1,many")


@pytest.mark.parametrize("bad", [{"tokens": 3}, {"rounds": 0}])
def test_a_measurement_of_nothing_is_refused(model: Model, tmp_path: Path, bad: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="must be at least"):
        FirstTokens(model, tmp_path, quiet, **bad)
