"""Random request mixes on tiny pools: each gets what it gets alone; no page or slot is ever lost."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bittrue.config.formats import Level
from bittrue.engine.engine import Engine
from bittrue.engine.types import Request, SamplingParams, TokenEvent, TokenLogprob
from bittrue.kv.layout import KVBudget
from bittrue.model.presets import make_checkpoint

MOST_STEPS = 5_000
# (pages, slots, tokens of a step): a pool that holds the longest request and little more, steps from one
# token to many.
POOLS = {"maths": ((4, 4, 64), (6, 3, 17), (3, 2, 3)), "published": ((4, 4, 64), (5, 5, 300))}


@dataclass
class Answer:
    """All that the events of one request said."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    end: tuple[object, ...] | None = None

    def take(self, event: TokenEvent) -> None:
        assert self.end is None, "an event after the last"
        self.tokens += event.token_ids
        self.logprobs += event.logprobs
        if event.prompt_logprobs is not None:
            assert self.prompt_logprobs is None, "prompt log-probs came twice"
            self.prompt_logprobs = event.prompt_logprobs
        if event.finish_reason is not None:
            self.end = (event.finish_reason, event.stop_match, event.error)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("tiny", 3, "bf16", tmp_path_factory.mktemp("tiny"))


def random_request(rng: random.Random, name: str, vocab: int) -> Request:
    length = rng.choice((5, 100, 110, 115, 120, 127, 128, rng.randint(1, 300)))
    shared = rng.choice((1, 2, 3))  # prompts that are alike must not be mixed up
    prompt = [(7 * shared + i) % vocab for i in range(length - 1)] + [rng.randrange(vocab)]
    max_tokens = rng.choice((1, 9, 40, 40, 40))
    params = SamplingParams(
        temperature=rng.choice((0.0, 0.7, 1.0, 1.5)),
        top_p=rng.choice((1.0, 0.9)),
        top_k=rng.choice((0, 0, 20)),
        min_p=rng.choice((0.0, 0.05)),
        seed=rng.randrange(2**40),
        max_tokens=max_tokens,
        min_tokens=rng.choice((0, 3)),
        stop=rng.choice(((), (), (), ("the",))),
        stop_token_ids=tuple(rng.sample(range(vocab), rng.choice((0, 0, 0, 20)))),
        ignore_eos=rng.random() < 0.8,
        presence_penalty=rng.choice((0.0, 0.5)),
        frequency_penalty=rng.choice((0.0, 0.3)),
        repetition_penalty=rng.choice((1.0, 1.2)),
        logit_bias=rng.choice(({}, {5: 3.0, 6: -100.0})),
        logprobs=rng.choice((None, 0, 3)),
        prompt_logprobs=rng.choice((None, None, 0, 2)),
    )
    return Request(request_id=name, prompt=tuple(prompt), params=params, priority=rng.choice((0, 0, 0, 1)))


def alone(engine: Engine, request: Request) -> Answer:
    answer = Answer()
    for event in engine.stream(request.prompt, request.params):
        answer.take(event)
    return answer


def run_mix(engine: Engine, requests: list[Request], rng: random.Random) -> tuple[dict[str, Answer], int]:
    """Requests come a few at a time; some are aborted at a random step. Answers, and the preemptions."""
    answers = {r.request_id: Answer() for r in requests}
    waiting = list(requests)
    doomed = [r.request_id for r in requests if rng.random() < 0.25]
    for _ in range(MOST_STEPS):
        while waiting and rng.random() < 0.6:
            engine.add(waiting.pop())
        if doomed and rng.random() < 0.03:
            engine.abort(doomed.pop())  # known, ended already or not come yet
        for event in engine.step():
            answers[event.request_id].take(event)
        engine.check()
        if not waiting and not engine.has_work():
            return answers, engine.stats().num_preempted_total
    raise AssertionError(f"{len(waiting)} requests still wait after {MOST_STEPS} steps")


@pytest.mark.parametrize("level", ["maths", "published"])
def test_any_mix_of_requests_gives_each_what_it_gets_alone(
    model: Path, level: Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The slow path: nothing is taken from the cache.
    roomy = Engine(model, kv_memory="64MiB", max_context=1024, threads=1, level=level, prefix_cache=False)
    num_compared = num_preempted = 0
    for seed, (pages, slots, step_tokens) in enumerate(POOLS[level]):
        rng = random.Random(seed)
        monkeypatch.setattr(KVBudget, "fit", lambda *_, sizes=(pages, slots), **__: sizes)
        small = Engine(model, max_context=512, threads=1, level=level, max_step_tokens=step_tokens)
        requests = [random_request(rng, f"{seed}-{i}", small.config.vocab_size) for i in range(7)]
        answers, preempted = run_mix(small, requests, rng)
        num_preempted += preempted
        for request in requests:
            got, want = answers[request.request_id], alone(roomy, request)
            assert got.end is not None, f"{request.request_id} never ended"
            if got.end[0] == "abort":
                assert got.tokens == want.tokens[: len(got.tokens)]
                assert got.logprobs == want.logprobs[: len(got.logprobs)]
            else:
                assert got == want
                num_compared += 1
        stats = small.stats()
        assert stats.pages_held == stats.slots_held == 0
        small.flush()
        stats = small.stats()
        assert (stats.pages_free, stats.slots_free) == (stats.pages_total, stats.slots_total)
    assert num_compared >= 10 and num_preempted > 0
