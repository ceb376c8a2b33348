"""What the scheduler promises: refusals by arithmetic, fairness both ways, preemption that loses no token."""

from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bittrue.engine.plan import SequenceOutput, StepPlan
from bittrue.engine.scheduler import Scheduler, SchedulerLimits
from bittrue.engine.sequence import AGING, Sequence
from bittrue.engine.types import PrefillProgress, Request, SamplingParams
from bittrue.errors import ConfigError, InvalidRequest, PromptTooLong, QueueFull
from bittrue.kv.layout import KVBudget
from bittrue.kv.manager import CachePolicy, KVManager


def make(
    *,
    budget: int = 512,
    running: int = 8,
    queue: int = 100,
    context: int = 4096,
    pages: int = 64,
    slots: int = 8,
) -> Scheduler:
    return Scheduler(SchedulerLimits(budget, running, queue, context), KVManager(pages, slots))


def request(name: str, num_prompt: int, max_tokens: int = 4, **more: object) -> Request:
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=more.pop("prompt_logprobs", None))  # type: ignore[arg-type]
    return Request(request_id=name, prompt=tuple(range(num_prompt)), params=params, **more)  # type: ignore[arg-type]


def next_token(tokens: list[int]) -> int:
    """Stands for the model: depends on every token before."""
    return hash(tuple(tokens)) % 1000


def commit(scheduler: Scheduler, plan: StepPlan) -> tuple[Sequence, ...]:
    outputs = [
        SequenceOutput(part.seq_id, (next_token(scheduler.sequence(part.seq_id).tokens),))
        for part in plan.sequences
        if part.samples
    ]
    finished = scheduler.commit(plan, tuple(outputs))
    scheduler.check()
    return finished


def step(scheduler: Scheduler) -> dict[str, int]:
    """Run one step: tokens computed per sequence."""
    plan = scheduler.schedule()
    assert plan is not None
    commit(scheduler, plan)
    return {part.seq_id: part.num_tokens for part in plan.sequences}


def run_all(scheduler: Scheduler, most: int = 10_000) -> dict[str, tuple[int, Sequence]]:
    """Run to the end: per sequence the step it ended in, and the sequence."""
    ended: dict[str, tuple[int, Sequence]] = {}
    for number in range(most):
        plan = scheduler.schedule()
        if plan is None:
            return ended
        ended.update({s.seq_id: (number, s) for s in commit(scheduler, plan)})
    raise AssertionError(f"not finished after {most} steps")


def alone(prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens


# Requests in.


def test_a_prompt_that_can_never_fit_is_refused_with_both_numbers() -> None:
    scheduler = make(context=1000)
    with pytest.raises(PromptTooLong, match="1001 tokens.*1000 tokens") as too_long:
        scheduler.add(request("a", 1001), 0.0)
    assert (too_long.value.num_tokens, too_long.value.limit) == (1001, 1000)
    with pytest.raises(
        InvalidRequest, match="990 tokens and max_tokens is 11, 1001 together.*1000"
    ) as invalid:
        scheduler.add(request("a", 990, 11), 0.0)
    assert invalid.value.param == "max_tokens" and invalid.value.code == "context_length_exceeded"
    with pytest.raises(InvalidRequest, match="KV memory of this server holds 256 tokens.*--kv-memory"):
        make(pages=2).add(request("a", 250, 7), 0.0)
    with pytest.raises(InvalidRequest, match="no tokens"):
        scheduler.add(request("a", 0), 0.0)
    assert not scheduler.has_work and scheduler.schedule() is None


def test_a_request_that_fills_the_whole_pool_runs() -> None:
    scheduler = make(pages=2)
    scheduler.add(request("a", 250, 6), 0.0)
    assert run_all(scheduler)["a"][1].num_generated == 6


def test_an_id_can_be_used_again_only_after_its_request_ended() -> None:
    scheduler = make()
    scheduler.add(request("a", 3), 0.0)
    with pytest.raises(InvalidRequest, match="already runs"):
        scheduler.add(request("a", 3), 0.0)
    run_all(scheduler)
    scheduler.add(request("a", 3), 0.0)


def test_a_full_queue_refuses_and_then_takes_again() -> None:
    scheduler = make(running=2, queue=1)
    for name in "abc":
        scheduler.add(request(name, 3), 0.0)
    with pytest.raises(QueueFull, match="3 requests"):
        scheduler.add(request("d", 3), 0.0)
    scheduler.abort("b")
    scheduler.add(request("d", 3), 0.0)


@pytest.mark.parametrize("field", ["max_step_tokens", "max_running", "max_context", "max_queue"])
def test_limits_out_of_range_name_the_field(field: str) -> None:
    values = {"max_step_tokens": 1, "max_running": 1, "max_queue": 0, "max_context": 1, field: -1}
    with pytest.raises(ConfigError, match=field) as caught:
        SchedulerLimits(**values)
    assert caught.value.field == field


def test_resumed_tokens_are_computed_and_not_sampled_again() -> None:
    scheduler = make()
    whole = alone((0, 1, 2), 6)
    scheduler.add(request("a", 3, 6, resume=tuple(whole[3:7])), 0.0)
    plan = scheduler.schedule()
    assert plan is not None and [(p.start, p.num_tokens, p.samples) for p in plan.sequences] == [(0, 7, True)]
    assert commit(scheduler, plan) == ()
    assert run_all(scheduler)["a"][1].tokens == whole
    assert scheduler.stats().num_generated_tokens_total == 2


def test_a_resume_that_is_complete_ends_at_once() -> None:
    scheduler = make(running=1, queue=0)
    scheduler.add(request("other", 3), 0.0)
    sequence = scheduler.add(request("a", 3, 2, resume=(7, 8)), 0.0)
    assert sequence.is_finished and sequence.finish_reason == "length" and sequence.generated == (7, 8)


def test_prompt_scores_alone_compute_the_prompt_and_sample_nothing() -> None:
    scheduler = make(budget=16)
    scheduler.add(request("a", 40, 0, prompt_logprobs=0), 0.0)
    parts = []
    while (plan := scheduler.schedule()) is not None:
        parts += plan.sequences
        finished = commit(scheduler, plan)
    assert [(p.start, p.num_tokens, p.samples) for p in parts] == [
        (0, 16, False),
        (16, 16, False),
        (32, 8, False),
    ]
    assert [s.finish_reason for s in finished] == ["length"]


# Steps.


def test_chunks_are_contiguous_and_only_the_last_one_samples() -> None:
    scheduler = make(budget=100)
    scheduler.add(request("a", 250, 3), 0.0)
    parts = []
    while (plan := scheduler.schedule()) is not None:
        parts += plan.sequences
        commit(scheduler, plan)
    assert [(p.start, p.num_tokens, p.samples) for p in parts] == [
        (0, 100, False),
        (100, 100, False),
        (200, 50, True),
        (250, 1, True),
        (251, 1, True),
    ]
    assert [p.page_ids for p in parts] == [(0,), (0, 1), (0, 1), (0, 1), (0, 1)]
    assert all(p.fold == p.start for p in parts)


def test_the_fold_lags_by_the_draft_length() -> None:
    scheduler = Scheduler(SchedulerLimits(8, 1, 1, 100, max_draft=3), KVManager(1, 1))
    scheduler.add(request("a", 10, 4), 0.0)
    folds = []
    while (plan := scheduler.schedule()) is not None:
        folds += [(p.start, p.fold) for p in plan.sequences]
        commit(scheduler, plan)
    assert folds == [(0, 0), (8, 5), (10, 7), (11, 8), (12, 9)]


def test_a_short_prompt_does_not_wait_behind_a_million_tokens() -> None:
    scheduler = make(budget=512, context=2**20, pages=2**13 + 8)
    scheduler.add(request("long", 1_000_000, 1), 0.0)
    for _ in range(3):
        step(scheduler)
    scheduler.add(request("short", 300, 1), 0.0)
    assert step(scheduler) == {"long": 256, "short": 256}
    assert step(scheduler) == {"long": 468, "short": 44}
    assert "short" not in step(scheduler)


def test_a_stream_of_short_prompts_does_not_starve_a_long_one() -> None:
    scheduler = make(budget=64, running=6, pages=200)
    scheduler.add(request("long", 3000, 1), 0.0)
    for number in range(ceil(3000 / 32)):
        scheduler.add(request(f"short{number}", 60, 1), 0.0)
        step(scheduler)
    with pytest.raises(KeyError):
        scheduler.sequence("long")


def test_a_long_prompt_does_not_starve_decodes() -> None:
    scheduler = make(budget=32)
    for name in "abcde":
        scheduler.add(request(name, 2, 30), 0.0)
    step(scheduler)
    scheduler.add(request("long", 3000, 1), 0.0)
    for _ in range(29):
        assert step(scheduler) == {**dict.fromkeys("abcde", 1), "long": 27}


def test_decodes_that_fill_the_budget_leave_a_floor_to_prefills_and_take_turns() -> None:
    scheduler = make(budget=8, running=20, slots=20, pages=64)
    names = [f"s{number}" for number in range(12)]
    for name in names:
        scheduler.add(request(name, 1, 100), 0.0)
    step(scheduler), step(scheduler)
    scheduler.add(request("long", 500, 1), 0.0)
    served = []
    for _ in range(24):
        got = step(scheduler)
        assert got.pop("long") == 1 and set(got.values()) == {1} and len(got) == 7
        served.append(set(got))
    for name in names:
        turns = [number for number, got in enumerate(served) if name in got]
        assert max(b - a for a, b in zip([-1, *turns], turns, strict=False)) <= ceil(12 / 7)


def test_with_a_budget_of_one_decode_and_prefill_take_turns() -> None:
    scheduler = make(budget=1)
    scheduler.add(request("a", 1, 10), 0.0)
    step(scheduler)
    scheduler.add(request("b", 6, 1), 0.0)
    got = [next(iter(step(scheduler))) for _ in range(8)]
    assert got in (["a", "b"] * 4, ["b", "a"] * 4)


def test_admission_is_by_priority_then_arrival() -> None:
    scheduler = make(running=1)
    for name, priority in (("late", 1), ("first", 0), ("second", 0)):
        scheduler.add(request(name, 3, 1, priority=priority), 0.0)
    order = sorted(run_all(scheduler).items(), key=lambda item: item[1][0])
    assert [name for name, _ in order] == ["first", "second", "late"]


# Memory.


def test_when_pages_run_out_the_youngest_is_preempted_and_loses_no_token() -> None:
    scheduler = make(pages=3)
    scheduler.add(request("old", 120, 100), 0.0)
    scheduler.add(request("young", 130, 100), 0.0)
    preempted: list[str] = []
    ended = {}
    while (plan := scheduler.schedule()) is not None:
        preempted += plan.preempted
        ended.update({s.seq_id: s for s in commit(scheduler, plan)})
    assert preempted == ["young"]
    for name, num_prompt in (("old", 120), ("young", 130)):
        assert ended[name].tokens == alone(tuple(range(num_prompt)), 100)
    assert ended["young"].num_preemptions == 1 and scheduler.stats().num_preempted_total == 1
    assert scheduler.stats().pages_free == 3


def test_the_youngest_waits_with_what_it_has_instead_of_preempting() -> None:
    scheduler = make(pages=2, budget=64)
    scheduler.add(request("old", 100, 20), 0.0)
    scheduler.add(request("young", 100, 60), 0.0)
    ended = run_all(scheduler)
    assert ended["old"][0] < ended["young"][0]
    assert scheduler.stats().num_preempted_total == 0
    assert ended["young"][1].tokens == alone(tuple(range(100)), 60)


def test_a_preempted_sequence_comes_before_all_that_arrived_later() -> None:
    scheduler = make(pages=3, running=2, slots=2)
    scheduler.add(request("old", 120, 100), 0.0)
    scheduler.add(request("young", 130, 100), 0.0)
    scheduler.add(request("younger", 10, 5), 0.0)
    ended = run_all(scheduler)
    assert ended["young"][1].num_preemptions == 1
    assert ended["old"][0] < ended["young"][0]
    assert ended["younger"][1].tokens == alone(tuple(range(10)), 5)


def test_abort_frees_memory_at_once_in_every_state() -> None:
    scheduler = make(running=1, budget=8)
    for name in ("runs", "waits"):
        scheduler.add(request(name, 20), 0.0)
    step(scheduler)
    for name in ("waits", "runs"):
        sequence = scheduler.abort(name)
        assert sequence is not None and sequence.finish_reason == "abort"
        scheduler.check()
    assert scheduler.abort("runs") is None and scheduler.abort("unknown") is None
    stats = scheduler.stats()
    assert (stats.pages_free, stats.slots_free, stats.num_running, stats.num_waiting) == (64, 8, 0, 0)
    assert scheduler.schedule() is None


def test_a_sequence_aborted_during_its_step_takes_nothing_from_it() -> None:
    scheduler = make()
    scheduler.add(request("a", 20), 0.0)
    scheduler.add(request("b", 20), 0.0)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.abort("a")
    again = scheduler.add(request("a", 5), 1.0)
    assert scheduler.commit(plan, (SequenceOutput("a", (1,)), SequenceOutput("b", (2,)))) == ()
    scheduler.check()
    assert again.tokens == [0, 1, 2, 3, 4] and again.num_computed == 0
    assert scheduler.sequence("b").tokens[-1] == 2


def test_stop_and_error_end_a_sequence_with_their_reason() -> None:
    scheduler = make(budget=32)
    scheduler.add(request("a", 3), 0.0)
    scheduler.add(request("b", 60), 0.0)
    plan = scheduler.schedule()
    assert plan is not None and [p.samples for p in plan.sequences] == [True, False]
    ended = scheduler.commit(plan, (SequenceOutput("a", (5,), "stop"), SequenceOutput("b", (), "error")))
    assert [(s.seq_id, s.finish_reason, s.generated) for s in ended] == [
        ("a", "stop", (5,)),
        ("b", "error", ()),
    ]
    assert not scheduler.has_work and scheduler.stats().pages_free == 64


def test_a_step_must_be_committed_before_the_next() -> None:
    scheduler = make()
    scheduler.add(request("a", 3), 0.0)
    scheduler.schedule()
    with pytest.raises(AssertionError, match="not committed"):
        scheduler.schedule()


# Prefixes.


def make_cached(every: int = 0, *, budget: int = 64, slots: int = 16, running: int = 8) -> Scheduler:
    """A replay takes 16 tokens, or those of the open page and 8."""
    policy = CachePolicy(snapshot_every=every, num_layers=2, window=9)
    return Scheduler(SchedulerLimits(budget, running, 400, 4096), KVManager(64, slots, policy))


def prompt_of(name: str, tokens: list[int], **more: object) -> Request:
    return Request(request_id=name, prompt=tuple(tokens), params=SamplingParams(max_tokens=4), **more)  # type: ignore[arg-type]


def test_equal_prompts_that_come_together_compute_their_prefix_once() -> None:
    scheduler = make_cached()
    for number in range(5):
        scheduler.add(prompt_of(f"s{number}", list(range(500))), 0.0)
    ended = run_all(scheduler)
    stats = scheduler.stats()
    assert stats.num_prefill_tokens_total == 500 + 4, "the others compute their last token"
    assert stats.cache.hit_tokens == {"device": 4 * 499} and stats.cache.replayed_tokens == 0
    assert [ended[f"s{number}"][1].num_cached for number in range(5)] == [0, 499, 499, 499, 499]
    assert {tuple(s.tokens) for _, s in ended.values()} == {tuple(alone(tuple(range(500)), 4))}


@pytest.mark.parametrize(
    ("every", "start"), [(0, 400 - 8 - 16), (128, 384), (256, 400 - 8 - 16)], ids=["recompute", "full", "256"]
)
def test_a_branch_of_a_prompt_under_way_starts_as_far_as_its_strategy_allows(every: int, start: int) -> None:
    scheduler = make_cached(every)
    scheduler.add(prompt_of("first", list(range(500))), 0.0)
    step(scheduler)
    scheduler.add(prompt_of("branch", [*range(400), *range(900, 1000)]), 0.0)
    ended = run_all(scheduler)
    assert ended["branch"][1].num_cached == start
    assert scheduler.stats().num_prefill_tokens_total == 500 + 500 - start


def test_who_follows_a_prefix_under_way_holds_up_nobody() -> None:
    scheduler = make_cached(budget=32)
    scheduler.add(prompt_of("first", list(range(500))), 0.0)
    scheduler.add(prompt_of("same", list(range(500))), 0.0)
    scheduler.add(prompt_of("other", list(range(3000, 3020))), 0.0)
    assert set(step(scheduler)) == {"first", "other"}


def test_who_follows_goes_its_own_way_when_the_other_ends() -> None:
    scheduler = make_cached(budget=32)
    scheduler.add(prompt_of("first", list(range(500))), 0.0)
    scheduler.add(prompt_of("same", list(range(500))), 0.0)
    step(scheduler)
    scheduler.abort("first")
    ended = run_all(scheduler)
    assert ended["same"][1].tokens == alone(tuple(range(500)), 4)


def test_one_step_looks_at_a_fixed_part_of_the_queue() -> None:
    """However many follow one prompt, those behind them are reached when it has been computed."""
    scheduler = make_cached(budget=32)
    for number in range(300):
        scheduler.add(prompt_of(f"s{number}", list(range(200))), 0.0)
    scheduler.add(prompt_of("last", list(range(900, 920))), 0.0)
    looked: list[str] = []
    is_ready = scheduler.kv.is_ready

    def watch(seq_id: str, *more: object) -> bool:
        looked.append(seq_id)
        return is_ready(seq_id, *more)  # type: ignore[arg-type]

    scheduler.kv.is_ready = watch  # type: ignore[method-assign, assignment]
    while scheduler.has_work:
        looked.clear()
        step(scheduler)
        assert len(looked) <= 8 + 64


def test_salts_share_nothing() -> None:
    scheduler = make_cached()
    scheduler.add(prompt_of("a", list(range(300)), cache_salt="one"), 0.0)
    scheduler.add(prompt_of("b", list(range(300)), cache_salt="two"), 0.0)
    run_all(scheduler)
    assert scheduler.stats().num_prefill_tokens_total == 600


def test_prompt_scores_are_computed_and_not_taken_from_the_cache() -> None:
    scheduler = make_cached()
    scheduler.add(prompt_of("a", list(range(300))), 0.0)
    run_all(scheduler)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    scheduler.add(Request(request_id="b", prompt=tuple(range(300)), params=params), 0.0)
    assert run_all(scheduler)["b"][1].num_cached == 0
    assert scheduler.stats().num_prefill_tokens_total == 600


def test_a_preempted_sequence_goes_on_from_its_snapshot() -> None:
    scheduler = make_cached()
    scheduler.add(prompt_of("a", list(range(300))), 0.0)
    while scheduler.sequence("a").num_remaining != 1:
        step(scheduler)
    assert scheduler.preempt("a") and not scheduler.preempt("a")
    assert step(scheduler) == {"a": 1}
    assert run_all(scheduler)["a"][1].num_cached == 0, "it was spared nothing when it came"


def test_a_low_priority_is_overtaken_by_a_fixed_number_of_later_requests() -> None:
    scheduler = make(running=1, queue=3 * AGING)
    scheduler.add(request("blocks", 3, 1), 0.0)
    scheduler.add(request("low", 3, 1, priority=1), 0.0)
    for number in range(2 * AGING):
        scheduler.add(request(f"s{number}", 3, 1), 0.0)
    ended = sorted(run_all(scheduler).items(), key=lambda item: item[1][0])
    place = [name for name, _ in ended].index("low")
    assert place == 1 + AGING - 1, "one before it, and less than AGING later ones"


# Bounds, over random loads.

loads = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 80)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    load=loads, budget=st.sampled_from([1, 2, 7, 40, 300]), running=st.integers(1, 5), pages=st.integers(3, 9)
)
def test_everyone_finishes_within_the_stated_bound_and_plans_repeat(
    load: list[tuple[int, int]], budget: int, running: int, pages: int
) -> None:
    """A sequence ends within max(4, 2 * max_running) steps per token of itself and of those before it."""
    runs = []
    for _ in range(2):
        scheduler = make(budget=budget, running=running, pages=pages)
        for number, (num_prompt, max_tokens) in enumerate(load):
            scheduler.add(request(f"s{number}", num_prompt, max_tokens), 0.0)
        runs.append(run_all(scheduler, most=100_000))
    first, second = runs
    assert {k: v[0] for k, v in first.items()} == {k: v[0] for k, v in second.items()}
    bound = 0
    for number, (num_prompt, max_tokens) in enumerate(load):
        bound += max(4, 2 * running) * (num_prompt + max_tokens)
        ended_at, sequence = first[f"s{number}"]
        assert ended_at < bound
        assert sequence.tokens == alone(tuple(range(num_prompt)), max_tokens)
    assert first["s0"][1].num_preemptions == 0


def test_stats_tell_which_sequences_prefill_and_count_their_tokens() -> None:
    scheduler = make(budget=100)
    scheduler.add(request("long", 250, 3), 0.0)
    scheduler.add(request("short", 20, 3), 0.0)
    assert scheduler.stats().prefills == ()  # nothing runs yet
    seen = []
    while scheduler.has_work:
        step(scheduler)
        seen.append(scheduler.stats())
    assert seen[0].prefills == (PrefillProgress("long", 80, 250),)
    assert seen[1].prefills == (PrefillProgress("long", 179, 250),)
    assert all(stats.prefills == () for stats in seen[2:])
    totals = [stats.num_prefill_tokens_total for stats in seen]
    assert totals[:3] == [100, 199, 270] and set(totals[2:]) == {270}


def test_what_preemption_loses_counts_as_prefill_again() -> None:
    scheduler = make(pages=4)
    for name in ("old", "young"):
        scheduler.add(request(name, 200, 100), 0.0)
    ended = run_all(scheduler)
    stats = scheduler.stats()
    assert stats.num_preempted_total > 0
    assert stats.num_prefill_tokens_total > 400
    assert stats.num_generated_tokens_total == sum(s.num_generated for _, s in ended.values()) == 200


def test_a_refusal_names_the_bytes_when_the_budget_is_known() -> None:
    budget = KVBudget(page_bytes=1000, slot_bytes=300, max_sequences=8)
    limits = SchedulerLimits(512, 8, 100, 10_000)
    scheduler = Scheduler(limits, KVManager(4, 8), budget)
    needed = budget.needed_for(604)
    with pytest.raises(InvalidRequest, match=rf"larger --kv-memory \({needed} bytes\)$"):
        scheduler.add(request("r", 600), 0.0)
