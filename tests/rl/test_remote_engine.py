"""An engine in a process of its own gives what one in this process gives, however often it is killed."""

import io
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from standins.ngram_engine import StandinOptions
from support.remote import (
    ALONE,
    NUM_TOKENS,
    TIGHT,
    Dying,
    assert_same,
    engine_here,
    kill,
    long_request,
    rollouts,
    run_config,
    two_models,
    update_to,
)

from bittrue.config.run import RunConfig
from bittrue.engine.engine import Engine
from bittrue.engine.link import ProcessLink
from bittrue.engine.types import Request, Running, SamplingParams, TokenEvent
from bittrue.errors import (
    CheckpointError,
    ConfigError,
    EngineDied,
    InvalidRequest,
    PromptTooLong,
    PublicationRefused,
)
from bittrue.model.weight_update import WeightUpdate
from bittrue.obs.log import Log
from bittrue.rl.remote_engine import RemoteEngine
from bittrue.rl.types import Group

STANDIN = "standins.ngram_engine:NgramEngine"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return two_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def updates(models: list[Path]) -> list[WeightUpdate]:
    return [update_to(model) for model in models]


@pytest.fixture(scope="module")
def here(models: list[Path]) -> Iterator[list[Engine]]:
    """Engines in this process that began with the weights of each model."""
    engines: list[Engine] = [engine_here(model) for model in models]
    yield engines
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def expected(here: list[Engine]) -> list[list[Group]]:
    """What is sampled from the weights of each model."""
    found = [rollouts(engine) for engine in here]
    for engine in here:
        stats = engine.stats()
        assert stats.num_preempted_total > 0 and sum(stats.drafts.accepted_at) > 0
    return found


@pytest.fixture(scope="module")
def remote(models: list[Path]) -> Iterator[RemoteEngine]:
    engine = RemoteEngine.start(run_config(models[0], max_restarts=3), factory=TIGHT, log=Log(io.StringIO()))
    yield engine
    engine.close()


@pytest.fixture
def engine(remote: RemoteEngine, updates: list[WeightUpdate]) -> RemoteEngine:
    """The same process for all tests, with the weights of the first model."""
    remote.update_weights(updates[0])
    assert not remote.has_work()
    return remote


def drained(engine: RemoteEngine) -> list[TokenEvent]:
    events = []
    while engine.has_work():
        events += engine.step()
    return events


def tokens_of(events: list[TokenEvent], name: str) -> tuple[int, ...]:
    return tuple(t for event in events if event.request_id == name for t in event.token_ids)


def scores_of(events: list[TokenEvent], name: str) -> list[float]:
    return [each.logprob for event in events if event.request_id == name for each in event.logprobs]


def begun(engine: RemoteEngine, names: list[str]) -> list[TokenEvent]:
    """The events of new requests until each has a few tokens."""
    for i, name in enumerate(names):
        engine.add(long_request(name, seed=i))
    events: list[TokenEvent] = []
    while any(len(tokens_of(events, name)) < 4 for name in names):
        events += engine.step()
    return events


def goes_on(engine: Engine, request: Request, tokens: tuple[int, ...]) -> list[TokenEvent]:
    """What an engine says that is given a request with its first tokens."""
    engine.add(replace_resume(request, tokens))
    events = []
    while engine.has_work():
        events += engine.step()
    return events


def replace_resume(request: Request, tokens: tuple[int, ...]) -> Request:
    return Request(
        request_id=request.request_id,
        prompt=request.prompt,
        params=request.params,
        resume=tokens,
        records_choices=True,
    )


def assert_goes_on_with_the_new_weights(
    events: list[TokenEvent], name: str, seed: int, here: list[Engine], updates: list[WeightUpdate]
) -> None:
    """Tokens and scores up to the change are the old weights', behind it those of the new ones that have
    seen what came before; the event says where."""
    request, tokens = long_request(name, seed=seed), tokens_of(events, name)
    choices = next(event.choices for event in events if event.request_id == name and event.finish_reason)
    assert choices is not None and len(tokens) == 250
    versions = [version for _, version in choices.versions]
    assert versions == [updates[0].version, updates[1].version]
    change = choices.versions[1][0]
    assert 4 <= change < 250
    old, new = goes_on(here[0], request, ()), goes_on(here[1], request, tokens[:change])
    assert tokens[:change] == tokens_of(old, name)[:change]
    assert tokens[change:] == tokens_of(new, name)
    assert scores_of(events, name) == scores_of(old, name)[:change] + scores_of(new, name)


# ---- the same rollouts -----------------------------------------------------------------------------------


def test_rollouts_are_those_of_an_engine_in_this_process(
    engine: RemoteEngine,
    here: list[Engine],
    expected: list[list[Group]],
    updates: list[WeightUpdate],
) -> None:
    assert_same(rollouts(engine), expected[0])
    assert_same(rollouts(engine, ALONE), rollouts(here[0], ALONE), whole_records=True)
    assert engine.update_weights(updates[1])
    assert not engine.update_weights(updates[1])
    assert engine.stats().weight_version == updates[1].version
    assert_same(rollouts(engine), expected[1])
    assert engine.poll() == [] == engine.step()  # nothing to do: no waiting


def test_a_killed_process_is_followed_by_one_that_goes_on(
    engine: RemoteEngine, expected: list[list[Group]], updates: list[WeightUpdate]
) -> None:
    engine.update_weights(updates[1])  # not what the files hold
    pid, restarts = engine.pid, engine.restarts
    assert_same(rollouts(Dying(engine, [NUM_TOKENS // 3])), expected[1])
    assert engine.restarts == restarts + 1 and engine.pid != pid
    assert engine.stats().weight_version == updates[1].version
    assert engine.unfinished() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "at",
    [[0], [1], [NUM_TOKENS - 20], [40, 41], [0, 200, 400, 600, 800]],
    ids=["at once", "early", "late", "twice in a row", "again and again"],
)
def test_kills_at_any_moment_change_nothing(
    engine: RemoteEngine, expected: list[list[Group]], at: list[int]
) -> None:
    restarts = engine.restarts
    assert_same(rollouts(Dying(engine, at)), expected[0])
    assert engine.restarts == restarts + len(at)


def test_nothing_waits_for_a_process_that_loads(tmp_path: Path) -> None:
    StandinOptions().save(tmp_path)
    engine = RemoteEngine.start(RunConfig(model=str(tmp_path)), factory=STANDIN, log=Log(io.StringIO()))
    params = SamplingParams(max_tokens=5)
    kill(engine)
    while engine.restarts == 0:
        assert engine.poll() == []
    begun_s = time.monotonic()
    engine.add(Request(request_id="a", prompt=(20,), params=params))
    assert engine.poll() == []
    assert time.monotonic() - begun_s < 0.1
    events = drained(engine)
    assert len(tokens_of(events, "a")) == 5
    engine.close()


@pytest.mark.slow
def test_a_process_killed_while_it_loads_is_followed_by_another(
    engine: RemoteEngine, expected: list[list[Group]]
) -> None:
    restarts = engine.restarts
    kill(engine)
    first = engine.pid

    def kill_the_next() -> None:
        while engine.pid == first:
            time.sleep(0.01)
        time.sleep(0.3)
        kill(engine)

    killer = threading.Thread(target=kill_the_next)
    killer.start()
    found = rollouts(engine)
    killer.join()
    assert_same(found, expected[0])
    assert engine.restarts == restarts + 2


@pytest.mark.slow
def test_every_event_is_told_once_whatever_died(tmp_path: Path) -> None:
    request = Request(
        request_id="r", prompt=(20, 21), params=SamplingParams(max_tokens=40, prompt_logprobs=0)
    )
    StandinOptions(step_s=0.002).save(tmp_path)
    events = []
    for at in ([], [15]):
        engine = RemoteEngine.start(RunConfig(model=str(tmp_path)), factory=STANDIN, log=Log(io.StringIO()))
        dying = Dying(engine, at)
        dying.add(request)
        told = []
        while engine.has_work():
            told += dying.step()
        assert engine.restarts == len(at)
        engine.close()
        events.append(told)
    undisturbed, disturbed = events
    assert tokens_of(undisturbed, "r") == tokens_of(disturbed, "r")
    for told in events:
        assert sum(event.prompt_logprobs is not None for event in told) == 1
        assert [event.finish_reason for event in told if event.finish_reason] == ["length"]


# ---- weights ---------------------------------------------------------------------------------------------


def test_running_requests_are_computed_again_with_new_weights(
    engine: RemoteEngine, here: list[Engine], updates: list[WeightUpdate]
) -> None:
    events = begun(engine, ["a", "b"])
    assert engine.update_weights(updates[1], running="retract")
    events += drained(engine)
    for i, name in enumerate("ab"):
        assert_goes_on_with_the_new_weights(events, name, i, here, updates)


@pytest.mark.slow
@pytest.mark.parametrize("running", ["in_place", "abort"])
def test_running_requests_go_on_or_end_as_asked(
    engine: RemoteEngine, here: list[Engine], updates: list[WeightUpdate], running: Running
) -> None:
    events = begun(engine, ["a", "b"])
    assert engine.update_weights(updates[1], running=running)
    events += drained(engine)
    old = [goes_on(here[0], long_request(name, seed=i), ()) for i, name in enumerate("ab")]
    for name, before in zip("ab", old, strict=True):
        tokens = tokens_of(events, name)
        ends = [event for event in events if event.request_id == name and event.finish_reason]
        assert len(ends) == 1 and ends[0].choices is not None
        versions = ends[0].choices.versions
        if running == "abort":
            assert ends[0].finish_reason == "abort" and len(tokens) < 250
            assert versions == ((0, updates[0].version),)
        else:
            assert ends[0].finish_reason == "length" and len(tokens) == 250
            assert [version for _, version in versions] == [update.version for update in updates]
        change = versions[-1][0] or len(tokens)
        assert 4 <= change and tokens[:change] == tokens_of(before, name)[:change]


@pytest.mark.slow
def test_a_refused_update_changes_nothing(
    engine: RemoteEngine, expected: list[list[Group]], updates: list[WeightUpdate]
) -> None:
    name, payload = next(iter(updates[1].payloads.items()))
    flipped = replace(payload, data=bytes([payload.data[0] ^ 1]) + payload.data[1:])
    broken = replace(updates[1], payloads={**updates[1].payloads, name: flipped})
    with pytest.raises(PublicationRefused, match="arrived with other bytes") as caught:
        engine.update_weights(broken)
    assert caught.value.tensor == name
    assert engine.stats().weight_version == updates[0].version
    assert_same(rollouts(engine), expected[0])
    with pytest.raises(PublicationRefused, match="came without the rest"):
        engine.update_weights(replace(updates[1], base=updates[0].version))


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [None, 0.0, 0.003, 0.01, 0.03, 0.1])
def test_a_kill_during_an_update_loses_neither_weights_nor_tokens(
    engine: RemoteEngine, here: list[Engine], updates: list[WeightUpdate], delay_s: float | None
) -> None:
    events = begun(engine, ["a", "b"])
    restarts = engine.restarts
    if delay_s is None:
        kill(engine)
    engine.begin_update(updates[1])
    if delay_s is not None:
        time.sleep(delay_s)
        kill(engine)
    assert engine.finish_update()
    assert engine.stats().weight_version == updates[1].version
    events += drained(engine)
    assert engine.restarts == restarts + 1
    for i, name in enumerate("ab"):
        assert_goes_on_with_the_new_weights(events, name, i, here, updates)


@pytest.mark.slow
def test_what_an_update_ended_stays_ended_after_a_kill(
    engine: RemoteEngine, updates: list[WeightUpdate], expected: list[list[Group]]
) -> None:
    events = begun(engine, ["a", "b"])
    engine.begin_update(updates[1], running="abort")
    kill(engine)
    assert engine.finish_update()
    kill(engine)  # perhaps before it has told of the ends
    events += drained(engine)
    assert sorted(event.request_id for event in events if event.finish_reason == "abort") == ["a", "b"]
    assert_same(rollouts(engine), expected[1])


@pytest.mark.slow
def test_deltas_are_enough_to_begin_again(
    engine: RemoteEngine, expected: list[list[Group]], updates: list[WeightUpdate]
) -> None:
    whole, base = updates[1], updates[0]
    same = {name for name in whole.payloads if whole.payloads[name] == base.payloads[name]}
    changed = {name: payload for name, payload in whole.payloads.items() if name not in same}
    delta = WeightUpdate(whole.version, base.version, changed, whole.payloads)
    assert engine.update_weights(delta)
    kill(engine)
    assert_same(rollouts(engine), expected[1])


# ---- refusals and ends -----------------------------------------------------------------------------------


def test_a_refused_request_raises_its_error_and_the_others_go_on(tmp_path: Path) -> None:
    StandinOptions().save(tmp_path)
    engine = RemoteEngine.start(RunConfig(model=str(tmp_path)), factory=STANDIN, log=Log(io.StringIO()))
    params = SamplingParams(max_tokens=5)
    engine.add(Request(request_id="good", prompt=(20,), params=params))
    engine.add(Request(request_id="long", prompt=(20,) * 600, params=params))
    with pytest.raises(InvalidRequest, match="already runs"):
        engine.add(Request(request_id="good", prompt=(20,), params=params))
    events, refusals = [], []
    while engine.has_work():
        try:
            events += engine.step()
        except PromptTooLong as error:
            refusals.append(error)
    assert len(tokens_of(events, "good")) == 5
    assert [error.num_tokens for error in refusals] == [600]
    engine.close()
    engine.close()
    with pytest.raises(EngineDied, match="was closed"):
        engine.add(Request(request_id="later", prompt=(20,), params=params))


def test_an_engine_that_dies_of_everything_is_given_up(tmp_path: Path) -> None:
    StandinOptions(crash_on=[666]).save(tmp_path)
    config = RunConfig(model=str(tmp_path), max_restarts=1)
    log = io.StringIO()
    engine = RemoteEngine.start(config, factory=STANDIN, log=Log(log))
    engine.add(Request(request_id="r", prompt=(20, 666), params=SamplingParams(max_tokens=5)))
    with pytest.raises(EngineDied, match="died without a token, 2 in a row"):
        while engine.has_work():
            engine.step()
    assert engine.restarts == 1 == log.getvalue().count("engine_restarted")
    with pytest.raises(EngineDied, match="2 in a row"):
        engine.poll()
    assert [entry.request.request_id for entry in engine.unfinished()] == ["r"]
    engine.close()


def test_what_cannot_start_says_why(tmp_path: Path) -> None:
    StandinOptions(broken_file="model-00001.safetensors").save(tmp_path)
    with pytest.raises(CheckpointError, match="holds a NaN"):
        RemoteEngine.start(RunConfig(model=str(tmp_path)), factory=STANDIN)
    with pytest.raises(ConfigError, match="is not a directory"):
        RemoteEngine.start(RunConfig(model=str(tmp_path / "none")), factory=STANDIN)


@pytest.mark.slow
def test_a_first_process_killed_while_it_loads_is_followed_by_another(tmp_path: Path) -> None:
    StandinOptions().save(tmp_path)
    link = ProcessLink.start(RunConfig(model=str(tmp_path)), factory=STANDIN)
    link._process.kill()
    engine = RemoteEngine(link, log=Log(io.StringIO()))
    assert engine.restarts == 1
    engine.close()
