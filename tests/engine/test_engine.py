"""The in-process engine on a small checkpoint: batching, chunking, preemption, abort, scoring, endings."""

from pathlib import Path

import pytest
import torch

from bittrue.engine.engine import Engine
from bittrue.engine.types import Request, SamplingParams
from bittrue.errors import ConfigError, InvalidRequest, PromptTooLong, QueueFull
from bittrue.kv.layout import KVBudget
from bittrue.model.presets import make_checkpoint
from bittrue.text.messages import ResponseFormat


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("tiny", 0, "bf16", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return Engine(model, kv_memory="64MiB", max_step_tokens=64, max_running=16, threads=1, prefix_cache=False)


def prompt_of(engine: Engine, length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, engine.config.vocab_size, (length,), generator=generator).tolist())


def params(seed: int = 0, **options: object) -> SamplingParams:
    defaults = {"max_tokens": 20, "temperature": 1.0, "seed": seed, "ignore_eos": True}
    return SamplingParams(**{**defaults, **options})  # type: ignore[arg-type]


def test_requests_get_the_same_tokens_alone_and_together(engine: Engine) -> None:
    prompts = [prompt_of(engine, n, n) for n in (1, 2, 5, 60, 130, 200, 3, 90)]
    each = [params(seed=i, temperature=[0.0, 1.0][i % 2]) for i in range(len(prompts))]
    together = engine.generate(prompts, each)
    alone = [engine.generate([p], q)[0] for p, q in zip(prompts, each, strict=True)]
    assert together == alone
    assert all(len(tokens) == 20 for tokens in together)


def test_a_preempted_request_continues_with_the_same_tokens(
    model: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [prompt_of(engine, 120, seed) for seed in range(6)]
    each = [params(seed=i, max_tokens=60) for i in range(6)]
    # Six states but only eight pages: six sequences of two pages each cannot all stay.
    monkeypatch.setattr(KVBudget, "fit", lambda *args, **options: (8, 6))
    small = Engine(model, max_step_tokens=64, threads=1)
    got = small.generate(prompts, each)
    assert small.stats().num_preempted_total > 0
    assert got == engine.generate(prompts, each)
    stats = small.stats()
    assert stats.pages_held == stats.slots_held == 0
    assert stats.pages_free + stats.pages_cached == stats.pages_total
    small.flush()
    assert small.stats().pages_free == stats.pages_total and small.stats().slots_free == stats.slots_total


def test_the_first_event_alone_tells_the_time_in_the_queue(engine: Engine) -> None:
    told = [event.queued_s for event in engine.stream(prompt_of(engine, 5, 1), params(max_tokens=3))]
    assert told[0] is not None and told[0] >= 0
    assert told[1:] == [None, None]


def test_loading_reports_its_progress(model: Path) -> None:
    seen: list[tuple[int, int]] = []
    Engine(model, kv_memory="8MiB", threads=1, progress=lambda done, total, name: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0


def test_scores_are_the_logprobs_of_the_given_tokens(engine: Engine) -> None:
    tokens = prompt_of(engine, 150, 5)
    scores = engine.score(tokens)
    assert len(scores) == 149
    reported = engine.stream(tokens[:100], params(max_tokens=1, prompt_logprobs=2))
    entries = next(iter(reported)).prompt_logprobs
    assert entries is not None and entries[0] is None
    assert [e.logprob for e in entries[1:]] == scores[:99]
    assert all(len(e.top) == 2 for e in entries[1:])


def test_generated_logprobs_equal_the_scores_of_the_same_tokens(engine: Engine) -> None:
    prompt = prompt_of(engine, 70, 6)
    events = list(engine.stream(prompt, params(max_tokens=70, logprobs=0)))
    tokens = [t for e in events for t in e.token_ids]
    logprobs = [entry.logprob for e in events for entry in e.logprobs]
    assert engine.score((*prompt, *tokens))[len(prompt) - 1 :] == logprobs


def test_resumed_tokens_are_replayed_not_sampled(engine: Engine) -> None:
    prompt = prompt_of(engine, 33, 7)
    whole = engine.generate([prompt], params(seed=9))[0]
    engine.add(Request(request_id="r", prompt=prompt, params=params(seed=9), resume=whole[:8]))
    rest = []
    while engine.has_work():
        rest += [t for e in engine.step() for t in e.token_ids]
    assert tuple(rest) == whole[8:]


def test_an_aborted_request_frees_its_memory_and_ends_once(engine: Engine) -> None:
    engine.add(Request(request_id="a", prompt=prompt_of(engine, 150, 8), params=params(max_tokens=500)))
    for _ in range(5):
        engine.step()
    engine.abort("a")
    engine.abort("a")
    events = []
    while engine.has_work():
        events += engine.step()
    assert [e.finish_reason for e in events] == ["abort"]
    stats = engine.stats()
    assert stats.pages_held == 0 and stats.slots_held == 0
    engine.check()


def test_a_closed_stream_aborts_its_sequence(engine: Engine) -> None:
    stream = engine.stream(prompt_of(engine, 10, 9), params(max_tokens=500))
    next(stream)
    stream.close()
    while engine.has_work():
        engine.step()
    assert engine.stats().pages_held == 0


def test_stop_token_ids_end_a_sequence_after_min_tokens(engine: Engine) -> None:
    prompt = prompt_of(engine, 12, 10)
    free = engine.generate([prompt], params(seed=3, max_tokens=30))[0]
    stop = free[4]
    events = list(engine.stream(prompt, params(seed=3, max_tokens=30, stop_token_ids=(stop,))))
    tokens = [t for e in events for t in e.token_ids]
    assert tokens == list(free[: free.index(stop) + 1])
    assert (events[-1].finish_reason, events[-1].stop_match) == ("stop", stop)
    later = engine.generate([prompt], params(seed=3, max_tokens=30, stop_token_ids=(stop,), min_tokens=10))[0]
    assert len(later) >= 10 and stop not in later[:10]


def test_stop_strings_end_a_sequence_where_they_complete(engine: Engine) -> None:
    prompt = prompt_of(engine, 12, 11)
    free = engine.generate([prompt], params(seed=4, max_tokens=40))[0]
    text = engine.parts.tokenizer.decode(free, skip_special=True)
    stop = next(text[i : i + 2] for i in range(4, len(text) - 2) if "\ufffd" not in text[i : i + 2])
    events = list(engine.stream(prompt, params(seed=4, max_tokens=40, stop=(stop,))))
    tokens = [t for e in events for t in e.token_ids]
    assert events[-1].stop_match == stop
    assert stop in engine.parts.tokenizer.decode(tokens, skip_special=True)
    assert tuple(tokens) == free[: len(tokens)]


@pytest.mark.parametrize("field", ["prompt", "resume"])
def test_token_ids_outside_the_vocabulary_are_refused(engine: Engine, field: str) -> None:
    bad = (
        {"prompt": (1, engine.config.vocab_size), "resume": ()}
        if field == "prompt"
        else {"prompt": (1,), "resume": (-1,)}
    )
    with pytest.raises(InvalidRequest, match=field):
        engine.add(Request(request_id="x", params=params(), **bad))
    assert not engine.has_work()


def test_what_cannot_fit_is_refused_before_it_waits(model: Path) -> None:
    small = Engine(model, kv_memory="8MiB", max_context=256, max_running=1, max_queue=1)
    with pytest.raises(PromptTooLong) as error:
        small.add(Request(request_id="long", prompt=(5,) * 300, params=params()))
    assert (error.value.num_tokens, error.value.limit) == (300, 256)
    with pytest.raises(InvalidRequest, match="max_tokens"):
        small.add(Request(request_id="much", prompt=(5,) * 200, params=params(max_tokens=100)))
    for i in range(2):
        small.add(Request(request_id=f"ok{i}", prompt=(5,), params=params()))
    with pytest.raises(QueueFull):
        small.add(Request(request_id="third", prompt=(5,), params=params()))


def test_a_pool_too_small_for_one_page_is_refused_with_the_numbers(model: Path) -> None:
    with pytest.raises(ConfigError, match="kv_memory|KV memory"):
        Engine(model, kv_memory="65KiB")


def test_fingerprints_tell_levels_apart(model: Path, engine: Engine) -> None:
    other = Engine(model, kv_memory="16MiB", max_context=512, level="published")
    assert engine.fingerprint()["digest"] != other.fingerprint()["digest"]
    same = Engine(model, kv_memory="16MiB", max_context=512, max_step_tokens=7)
    assert engine.fingerprint() == same.fingerprint()
    slow = Engine(model, kv_memory="16MiB", max_context=512, backend="reference")
    assert slow.fingerprint()["kernels"] != engine.fingerprint()["kernels"]


@pytest.mark.parametrize("options", [{}, {"min_tokens": 30}, {"ignore_eos": True}])
def test_a_complete_grammar_ends_its_sequence_whatever_else_is_asked(
    engine: Engine, options: dict[str, object]
) -> None:
    grammar = engine.parts.compiler.compile(ResponseFormat(kind="regex", pattern="[ab]{3}"))
    asked = params(max_tokens=60, grammar=grammar, **{"ignore_eos": False, **options})
    events = list(engine.stream(prompt_of(engine, 9, 12), asked))
    tokens = [t for e in events for t in e.token_ids]
    text = engine.parts.tokenizer.decode(tokens, skip_special=True)
    assert len(text) == 3 and set(text) <= {"a", "b"}
    assert events[-1].finish_reason == "stop"
    assert tokens.count(engine.config.eos_id) == 1
