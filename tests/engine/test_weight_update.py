"""New weights in a running engine: the answers are those of an engine that began with them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.models import random_ids
from support.small import small_checkpoint

from bittrue.engine.engine import Engine, Running
from bittrue.engine.types import Request, SamplingParams
from bittrue.model.publication import Publisher
from bittrue.model.weight_update import WeightUpdate
from bittrue.model.weights import load_checkpoint

VOCAB = 512
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPT = tuple(random_ids(150, VOCAB, seed=1))
KNOBS: dict[str, object] = {
    "kv_memory": "32MiB",
    "threads": 1,
    "log_level": "error",
    "max_context": 1024,
    "speculation": "mtp",
}


@pytest.fixture(scope="module", params=["bf16", "fp4"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [small_checkpoint(root / str(i), precision=request.param, seed=i, draft="mtp") for i in range(2)]


@pytest.fixture
def engine(models: list[Path]) -> Iterator[Engine]:
    made = Engine(models[0], **KNOBS)  # type: ignore[arg-type]
    yield made
    made.check()
    made.close()


@pytest.fixture(scope="module")
def expected(models: list[Path]) -> Iterator[Engine]:
    """An engine that began with the second weights."""
    made = Engine(models[1], **KNOBS)  # type: ignore[arg-type]
    yield made
    made.close()


def update_to(model: Path) -> WeightUpdate:
    return Publisher().update(dict(load_checkpoint(model).all_tensors()))


def begun(engine: Engine, num_tokens: int) -> list[int]:
    """The first tokens of a request that goes on."""
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    engine.add(Request(request_id="r", prompt=PROMPT, params=params, records_choices=True))
    tokens: list[int] = []
    while len(tokens) < num_tokens:
        tokens += [token for event in engine.step() for token in event.token_ids]
    return tokens


def test_answers_and_scores_are_those_of_the_new_weights(
    engine: Engine, expected: Engine, models: list[Path]
) -> None:
    before = engine.generate([PROMPT], GREEDY)
    assert engine.update_weights(update := update_to(models[1]))
    assert engine.stats().weight_version == update.version == engine.fingerprint()["weight_version"]
    after = engine.generate([PROMPT], GREEDY)
    assert after == expected.generate([PROMPT], GREEDY) != before
    assert engine.score(PROMPT) == expected.score(PROMPT)
    assert not engine.update_weights(update)  # a second time it is the same
    assert engine.generate([PROMPT], GREEDY) == after
    engine.update_weights(update_to(models[0]))
    assert engine.generate([PROMPT], GREEDY) == before


def test_a_prefix_serves_only_the_weights_it_was_computed_with(engine: Engine, models: list[Path]) -> None:
    first, second = update_to(models[0]), update_to(models[1])
    engine.update_weights(first)
    engine.generate([PROMPT], GREEDY)
    hits = sum(engine.stats().cache.hit_tokens.values())
    engine.update_weights(second)
    engine.generate([PROMPT], GREEDY)
    assert sum(engine.stats().cache.hit_tokens.values()) == hits
    engine.update_weights(first)  # back again: what was cached then is right again
    engine.generate([PROMPT], GREEDY)
    assert sum(engine.stats().cache.hit_tokens.values()) > hits


@pytest.mark.parametrize("running", ["retract", "in_place"])
def test_a_sequence_under_way_goes_on(
    engine: Engine, expected: Engine, models: list[Path], running: Running
) -> None:
    tokens = begun(engine, 5)
    num_before = len(tokens)
    update = update_to(models[1])
    engine.update_weights(update, running=running)
    choices = None
    while engine.has_work():
        for event in engine.step():
            tokens += event.token_ids
            choices = event.choices or choices
    assert len(tokens) == 40 and choices is not None
    assert [version for _, version in choices.versions][1:] == [update.version]
    assert choices.versions[1][0] == num_before
    # Computed again, the rest is what the new weights say after the beginning.
    prompt = (*PROMPT, *tokens[:num_before])
    params = SamplingParams(max_tokens=40 - num_before, temperature=0.0, ignore_eos=True)
    is_new = expected.generate([prompt], params)[0] == tuple(tokens[num_before:])
    assert is_new == (running == "retract")
    # What it computed with either weights does not reach who asks next.
    assert engine.generate([PROMPT], GREEDY) == expected.generate([PROMPT], GREEDY)


@pytest.mark.parametrize("running", ["retract", "in_place"])
def test_rows_of_older_weights_below_a_first_token_are_told(models: list[Path], running: Running) -> None:
    knobs: dict[str, object] = {**KNOBS, "max_step_tokens": 64, "max_running": 1, "speculation": "off"}
    engine = Engine(models[0], **knobs)  # type: ignore[arg-type]
    before = engine.stats().weight_version
    for name in ("begun", "waiting"):
        prompt = (*PROMPT, len(name))
        engine.add(Request(request_id=name, prompt=prompt, params=GREEDY, records_choices=True))
    assert not any(event.token_ids for event in engine.step())  # a part of the first prompt
    engine.update_weights(update := update_to(models[1]), running=running)
    found = {}
    while engine.has_work():
        found |= {event.request_id: event.choices.versions for event in engine.step() if event.choices}
    engine.close()
    after = (0, update.version)
    assert found == {
        "begun": ((0, before), after) if running == "in_place" else (after,),
        "waiting": (after,),
    }


def test_sequences_can_be_ended_instead(engine: Engine, models: list[Path]) -> None:
    begun(engine, 3)
    engine.update_weights(update_to(models[1]), running="abort")
    events = engine.step()
    assert [event.finish_reason for event in events] == ["abort"]
    assert not engine.has_work()
