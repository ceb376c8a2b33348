"""Several engines sample as one: siblings together, nothing lost, nothing told twice."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from standins.ngram_engine import StandinOptions
from support.remote import (
    TIGHT,
    assert_same,
    engine_here,
    kill,
    rollouts,
    run_config,
    two_models,
    update_to,
)

from bittrue.config.run import RunConfig
from bittrue.engine.link import ProcessLink
from bittrue.engine.types import Request, SamplingParams, TokenEvent
from bittrue.errors import ConfigError, PromptTooLong, PublicationRefused
from bittrue.model.weight_update import Payload, WeightUpdate
from bittrue.obs.log import Log
from bittrue.rl.engine_group import EngineGroup
from bittrue.rl.remote_engine import RemoteEngine

STANDIN = "standins.ngram_engine:NgramEngine"
NAMES = [f"p{i}/{j}" for i in range(8) for j in range(3)]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineGroup]:
    directory = tmp_path_factory.mktemp("standin")
    StandinOptions(step_s=0.001).save(directory)
    config = RunConfig(model=str(directory))
    links = [ProcessLink.start(config, factory=STANDIN) for _ in range(2)]
    made = EngineGroup([RemoteEngine(link, log=Log(io.StringIO())) for link in links])
    yield made
    made.close()


def asked(name: str, *, max_tokens: int = 12) -> Request:
    params = SamplingParams(max_tokens=max_tokens, seed=NAMES.index(name))
    return Request(request_id=name, prompt=(20, 21), params=params)


def drained(group: EngineGroup) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    events: list[TokenEvent] = []
    while group.has_work():
        events += group.step()
    for event in events:
        tokens.setdefault(event.request_id, []).extend(event.token_ids)
    assert sorted(e.request_id for e in events if e.finish_reason) == sorted(tokens)
    return tokens


def test_siblings_go_to_one_engine_and_a_death_in_the_group_changes_nothing(group: EngineGroup) -> None:
    for name in NAMES:
        group.add(asked(name))
    homes = {name: group.engine_of(name) for name in NAMES}
    assert all(homes[name] is homes[f"{name.split('/')[0]}/0"] for name in NAMES)
    assert {id(home) for home in homes.values()} == {id(engine) for engine in group.engines}
    together = drained(group)
    assert sorted(together) == sorted(NAMES) and all(len(tokens) == 12 for tokens in together.values())
    for name in NAMES:
        group.add(asked(name))
    kill(group.engines[0])
    assert drained(group) == together
    assert group.restarts == 1
    assert group.poll() == [] == group.step()
    stats = group.stats()
    assert stats.pages_total == sum(engine.stats().pages_total for engine in group.engines)
    assert stats.weight_version == "standin-1"
    assert stats.cache.tier_bytes == {"host": 10000, "disk": 12000}


def test_an_error_of_one_engine_loses_no_events_of_the_others(group: EngineGroup) -> None:
    bad = Request(request_id="bad/0", prompt=(20,) * 600, params=SamplingParams())
    for name in NAMES[:6]:
        group.add(asked(name))
    group.add(bad)
    tokens: dict[str, list[int]] = {}
    num_refusals = 0
    while group.has_work():
        try:
            events = group.step()
        except PromptTooLong:
            num_refusals += 1
            continue
        for event in events:
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
    assert num_refusals == 1
    assert {name: len(found) for name, found in tokens.items()} == {name: 12 for name in NAMES[:6]}


def test_an_update_that_is_refused_is_answered_by_all(group: EngineGroup) -> None:
    update = WeightUpdate("v2", None, {"t": Payload(b"1234", "d", "torch.int8", (4,), False)})
    for _ in range(2):
        with pytest.raises(PublicationRefused, match="the stand-in has no weights"):
            group.update_weights(update)
    group.add(asked(NAMES[0]))
    assert len(drained(group)[NAMES[0]]) == 12


def test_a_group_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="give at least one"):
        EngineGroup([])


@pytest.mark.slow
def test_rollouts_of_a_group_are_those_of_one_engine(tmp_path: Path) -> None:
    models = two_models(tmp_path)
    links = [ProcessLink.start(run_config(models[0]), factory=TIGHT) for _ in range(2)]
    group = EngineGroup([RemoteEngine(link, log=Log(io.StringIO())) for link in links])
    here = engine_here(models[1])
    assert group.update_weights(update_to(models[1]), running="abort")
    assert_same(rollouts(group), rollouts(here))
    assert all(engine.stats().num_generated_tokens_total > 0 for engine in group.engines)
    group.close()
    here.close()
