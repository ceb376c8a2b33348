"""What was chosen for the tokens of a sequence is recorded once each, however the sequence was computed."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from support.models import random_ids

from bittrue.engine.engine import Engine
from bittrue.engine.record import expert_ids, row_ids
from bittrue.engine.types import Choices, Request, SamplingParams, TokenEvent
from bittrue.model.batch import Segment
from bittrue.model.presets import make_checkpoint
from bittrue.model.publication import Publisher
from bittrue.model.weights import load_checkpoint
from bittrue.ops.recorded import Chosen

TOPK, VOCAB = 6, 512
FREE = 4 * (TOPK + 1) - 1  # positions below read every entry
SHAPE = {
    "num_hidden_layers": 5,
    "compress_ratios": [0, 4, 128, 4, 128],
    "sliding_window": 8,
    "vocab_size": VOCAB,
    "index_topk": TOPK,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("tiny", 0, "fp4", tmp_path_factory.mktemp("model"), **SHAPE)


def engine_of(model: Path, **knobs: object) -> Engine:
    settings = {"kv_memory": "32MiB", "threads": 1, "log_level": "error", "prefix_cache": False, **knobs}
    return Engine(model, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plain(model: Path) -> Iterator[Engine]:
    engine = engine_of(model)
    yield engine
    engine.close()


def requests() -> list[Request]:
    lengths = (5, FREE - 1, FREE + 2, 150, 61)
    return [
        Request(
            request_id=f"r{i}",
            prompt=tuple(random_ids(length, VOCAB, seed=i)),
            params=SamplingParams(max_tokens=20, temperature=1.0, seed=i, ignore_eos=True),
            records_choices=i != 1,
        )
        for i, length in enumerate(lengths)
    ]


def finished(
    engine: Engine, asked: list[Request], *, preempts: str = ""
) -> dict[str, tuple[tuple[int, ...], TokenEvent]]:
    """Tokens and last event of every request."""
    tokens: dict[str, list[int]] = {request.request_id: [] for request in asked}
    last: dict[str, TokenEvent] = {}
    for request in asked:
        engine.add(request)
    for number in range(10_000):
        if not engine.has_work():
            break
        if preempts and number == 7:
            assert engine.preempt(preempts)
        for event in engine.step():
            tokens[event.request_id] += event.token_ids
            if event.finish_reason is not None:
                last[event.request_id] = event
    return {name: (tuple(tokens[name]), last[name]) for name in tokens}


def chosen_at_once(engine: Engine, token_ids: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Experts and rows of one plain forward pass over all tokens."""
    chosen = Chosen()
    pages = tuple(range(-(-len(token_ids) // 128)))
    engine._runner.forward([Segment(token_ids, 0, 0, 0, pages)], chosen)
    return tuple(np.stack([t.numpy() for t in each], 1) for each in (chosen.experts, chosen.rows))  # type: ignore[return-value]


def assert_recorded(choices: Choices | None, truth: tuple[np.ndarray, np.ndarray], first: int = 0) -> None:
    assert choices is not None
    experts, rows = truth
    assert choices.first == first
    assert np.array_equal(expert_ids(choices), experts[first:])
    assert choices.first_row == max(first, FREE) or not len(row_ids(choices))
    assert np.array_equal(row_ids(choices), rows[max(first, FREE) :])


@pytest.mark.parametrize(
    "knobs",
    [{}, {"max_step_tokens": 16}, {"speculation": "ngram", "max_draft": 3}],
    ids=["batched", "chunked", "drafts"],
)
def test_choices_are_those_of_one_pass_over_the_sequence(
    model: Path, plain: Engine, knobs: dict[str, object]
) -> None:
    engine = engine_of(model, **knobs)
    found = finished(engine, requests(), preempts="r3")
    for request in requests():
        tokens, event = found[request.request_id]
        if not request.records_choices:
            assert event.choices is None
            continue
        truth = chosen_at_once(plain, (*request.prompt, *tokens[:-1]))
        assert truth[0].shape[1:] == (
            plain.config.num_layers - plain.config.num_hash_layers,
            plain.config.experts_per_token,
        )
        assert_recorded(event.choices, truth)
    assert engine.stats().num_preempted_total == 1
    engine.close()


def test_choices_begin_where_the_cached_prefix_ends(model: Path, plain: Engine) -> None:
    engine = engine_of(model, prefix_cache=True)
    request = requests()[3]
    first = finished(engine, [request])["r3"][1]
    again = msgspec.structs.replace(request, request_id="again", prompt=(*request.prompt, 7, 8))
    tokens, event = finished(engine, [again])["again"]
    assert first.choices is not None and first.choices.first == 0
    assert 0 < event.num_cached_tokens <= len(request.prompt)
    assert_recorded(
        event.choices, chosen_at_once(plain, (*again.prompt, *tokens[:-1])), event.num_cached_tokens
    )
    engine.close()


def test_ids_take_as_few_bytes_as_they_need(model: Path) -> None:
    engine = engine_of(model, max_context=2048)
    choices = finished(engine, [requests()[3]])["r3"][1].choices
    assert choices is not None
    assert choices.expert_shape[3] == 1 and choices.row_shape[3] == 2
    assert len(choices.experts) == int(np.prod(choices.expert_shape))
    assert len(choices.rows) == int(np.prod(choices.row_shape))
    engine.close()


def test_what_another_sequence_computed_after_a_preemption_is_not_claimed(model: Path, plain: Engine) -> None:
    engine = engine_of(model, prefix_cache=True, max_step_tokens=16, max_running=1)
    one = requests()[3]
    other = msgspec.structs.replace(one, request_id="other", params=requests()[4].params, priority=-1)
    engine.add(one)
    for _ in range(3):
        engine.step()
    assert engine.preempt(one.request_id)
    engine.add(other)  # computes the rest of the prompt
    tokens: dict[str, list[int]] = {one.request_id: [], other.request_id: []}
    choices: dict[str, Choices] = {}
    while engine.has_work():
        for event in engine.step():
            tokens[event.request_id] += event.token_ids
            if event.choices is not None:
                choices[event.request_id] = event.choices
    firsts = [choices[name].first for name in tokens]
    assert 48 < firsts[0] < len(one.prompt), "it took nothing from the other one"
    for name, first in zip(tokens, firsts, strict=True):
        assert_recorded(choices[name], chosen_at_once(plain, (*one.prompt, *tokens[name][:-1])), first)
    engine.close()


def test_an_aborted_prefill_has_no_record(model: Path) -> None:
    engine = engine_of(model, max_step_tokens=16)
    engine.add(requests()[3])
    engine.step()
    engine.abort("r3")
    (event,) = engine.step()
    assert event.choices is not None and event.choices.first == len(requests()[3].prompt) - 1
    assert len(expert_ids(event.choices)) == len(row_ids(event.choices)) == 0
    engine.close()


def test_positions_are_recorded_as_the_weights_of_the_rows_chose(
    model: Path, tmp_path: Path, plain: Engine
) -> None:
    other = make_checkpoint("tiny", 1, "fp4", tmp_path / "other", **SHAPE)
    update = Publisher().update(dict(load_checkpoint(other).all_tensors()))
    engine = engine_of(model, prefix_cache=True, max_step_tokens=16, max_running=1)
    one = requests()[3]
    engine.add(one)
    tokens: list[int] = []
    while len(tokens) < 5:
        tokens += [token for event in engine.step() for token in event.token_ids]
    # The prompt is computed by a sequence that comes before it, with the new weights.
    assert engine.preempt(one.request_id)
    engine.update_weights(update, running="retract")
    first = msgspec.structs.replace(one, request_id="first", priority=-1, prompt=one.prompt[:100])
    engine.add(first)
    last = None
    while engine.has_work():
        for event in engine.step():
            if event.request_id == one.request_id:
                tokens += event.token_ids
                last = event.choices or last
    assert last is not None and [version for _, version in last.versions][1:] == [update.version]
    changed = engine_of(other)
    assert last.first > 0, "it took nothing from the other one"
    assert_recorded(last, chosen_at_once(changed, (*one.prompt, *tokens[:-1])), last.first)
    engine.close()
    changed.close()


def test_tokens_that_only_rebuild_a_state_are_not_recorded(model: Path, plain: Engine) -> None:
    """A prefix resumed from stored rows is run over again behind its window, with other choices there."""
    engine = engine_of(model, prefix_cache=True, snapshot_every=0)
    first, second = (
        Request(
            request_id=name,
            prompt=(*random_ids(140, VOCAB, seed=3), *random_ids(9, VOCAB, seed=seed)),
            params=SamplingParams(max_tokens=8, temperature=1.0, seed=seed, ignore_eos=True),
            records_choices=True,
        )
        for seed, name in enumerate(("first", "second"))
    )
    finished(engine, [first])
    tokens, last = finished(engine, [second])["second"]
    engine.close()
    assert engine.stats().cache.hit_tokens.get("replay", 0) > 0 and last.choices is not None
    assert 0 < last.choices.first <= len(second.prompt)
    assert_recorded(last.choices, chosen_at_once(plain, (*second.prompt, *tokens)[:-1]), last.choices.first)
