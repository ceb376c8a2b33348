"""A decode step costs Python the same at 900,000 tokens of context as at 900: nothing is copied, nothing is
walked over. Counted, not timed."""

import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from bittrue.config.run import RunConfig
from bittrue.engine.engine import Engine
from bittrue.engine.plan import SequenceOutput, StepPlan
from bittrue.engine.scheduler import Scheduler, SchedulerLimits
from bittrue.engine.types import Request, SamplingParams
from bittrue.engine.wire import StepDone, frame
from bittrue.errors import InvalidRequest
from bittrue.kv.layout import KVBudget, pages_for
from bittrue.kv.manager import KVManager
from bittrue.model.batch import Segment
from bittrue.model.presets import make_checkpoint

MAX_CONTEXT = 1 << 20
SHORT, LONG = 899, 899_999  # both end one token before the middle of a page
COPY_BYTES = 30_000  # one copy of the long sequence's page ids alone would take 56 KB, of its tokens 7 MB


class Walked(list[int]):
    """A list of tokens that counts what is read of it."""

    num_read = 0

    def __iter__(self) -> Iterator[int]:
        Walked.num_read += len(self)
        return super().__iter__()

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        Walked.num_read += len(found) if isinstance(key, slice) else 1
        return found


def lines_run(body: Callable[[], object]) -> int:
    """Lines of Python that ``body`` runs, those of generators and comprehensions included."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        body()
    finally:
        sys.settrace(before)
    return count


def peak_bytes(body: Callable[[], object]) -> int:
    """The most Python memory ``body`` holds beyond what there was."""
    tracemalloc.start()
    try:
        body()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def skip_prefill(scheduler: Scheduler, seq_id: str) -> None:
    """Takes all but the last prompt token of a new sequence for computed: of the first slice the scheduler
    thinks so, of the rest it is told."""
    plan = scheduler.schedule()
    assert plan is not None and not plan.sequences[0].samples
    scheduler.commit(plan, ())
    sequence = scheduler.sequence(seq_id)
    assert scheduler.kv.extend(seq_id, sequence.num_prompt)
    sequence.num_computed = sequence.fold = sequence.num_prompt - 1


def decode_once(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    assert plan is not None
    outputs = tuple(SequenceOutput(part.seq_id, (7,)) for part in plan.sequences if part.samples)
    assert len(outputs) == 1
    scheduler.commit(plan, outputs)
    return plan


def a_scheduler(num_prompt: int) -> Scheduler:
    limits = SchedulerLimits(max_step_tokens=100, max_running=4, max_queue=4, max_context=MAX_CONTEXT)
    scheduler = Scheduler(limits, KVManager(MAX_CONTEXT // 128, 4))
    params = SamplingParams(max_tokens=1000)
    request = Request(request_id="r", prompt=tuple(range(num_prompt)), params=params)
    sequence = scheduler.add(request, 0.0)
    sequence.tokens = Walked(sequence.tokens)
    skip_prefill(scheduler, "r")
    return scheduler


def test_a_step_of_the_scheduler_does_not_grow_with_the_context() -> None:
    costs = {}
    for num_prompt in (SHORT, LONG):
        scheduler = a_scheduler(num_prompt)
        decode_once(scheduler)
        Walked.num_read = 0

        def one_step(scheduler: Scheduler = scheduler) -> None:
            decode_once(scheduler)
            frame(StepDone(events=[], stats=scheduler.stats()))

        lines = lines_run(one_step)
        held = peak_bytes(one_step)
        assert held < COPY_BYTES
        costs[num_prompt] = (lines, Walked.num_read)
    assert costs[SHORT] == costs[LONG]
    assert costs[LONG][1] == 0


def test_plans_carry_the_same_page_ids_until_the_sequence_grows_into_a_new_page() -> None:
    scheduler = a_scheduler(LONG)
    page_ids = [decode_once(scheduler).sequences[0].page_ids for _ in range(130)]
    changes = sum(one is not other for one, other in zip(page_ids, page_ids[1:], strict=False))
    assert len(page_ids[0]) == 7032 and len(page_ids[-1]) == 7033
    assert changes == 1


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("tiny", 3, "bf16", tmp_path_factory.mktemp("long") / "tiny")


def an_engine(directory: Path, **knobs: Any) -> Engine:
    values = {"threads": 1, "kv_memory": "80MiB", "max_running": 2, "max_context": MAX_CONTEXT, **knobs}
    return Engine(directory, RunConfig(model=str(directory), **values))


def test_a_decode_step_of_the_engine_does_not_grow_with_the_context(directory: Path) -> None:
    costs = {}
    for num_prompt in (SHORT, LONG):
        engine = an_engine(directory, max_step_tokens=64)
        prompt = tuple(i % 900 for i in range(num_prompt))
        params = SamplingParams(max_tokens=200, temperature=0.7, seed=1, ignore_eos=True)
        engine.add(Request(request_id="r", prompt=prompt, params=params))
        # The cache is taken as it is: what a step costs does not depend on its values.
        skip_prefill(engine._scheduler, "r")
        for cache in engine._runner.caches:
            for part in (cache.window, cache.csa, cache.csa_index, cache.hca_fold, cache.hca_pending):
                if part is not None:
                    part.zero_()
        for _ in range(3):  # whatever is prepared once is prepared
            assert len(engine.step()[0].token_ids) == 1
        lines = lines_run(engine.step)
        held = peak_bytes(engine.step)
        assert held < COPY_BYTES, num_prompt
        costs[num_prompt] = lines
        engine.close()
    assert costs[SHORT] == costs[LONG]


def test_a_step_of_several_tokens_does_not_grow_with_the_context(directory: Path) -> None:
    """As a sequence with drafts has them."""
    engine = an_engine(directory, max_step_tokens=64)
    runner = engine.parts.runner
    for cache in runner.caches:
        for part in (cache.window, cache.csa, cache.csa_index, cache.hca_fold, cache.hca_pending):
            if part is not None:
                part.zero_()
    costs = {}
    for num_tokens in (SHORT, LONG):
        page_ids = tuple(range(pages_for(num_tokens + 5)))

        def one_step(start: int = num_tokens, page_ids: tuple[int, ...] = page_ids) -> None:
            streams = runner.forward([Segment((5, 6, 7, 8, 9), start, start, 0, page_ids)])
            assert len(list(runner.logits_by_block(streams, range(5)))) == 1

        one_step()  # captured, its page ids known
        costs[num_tokens] = lines_run(one_step)
        assert peak_bytes(one_step) < COPY_BYTES
    assert costs[SHORT] == costs[LONG]
    engine.close()


def test_a_prompt_beyond_the_kv_memory_is_told_how_many_bytes_it_needs(directory: Path) -> None:
    prompt = tuple(i % 900 for i in range(128 * 1024))
    request = Request(request_id="r", prompt=prompt, params=SamplingParams(max_tokens=16))
    small = an_engine(directory, kv_memory="4MiB")
    layout = small.parts.layout
    budget = KVBudget(layout.page_bytes, layout.slot_bytes, 2, small.parts.budget.max_snapshots)
    needed = budget.needed_for(len(prompt) + 16)
    with pytest.raises(InvalidRequest, match=rf"--kv-memory \({needed} bytes\)"):
        small.add(request)
    small.close()
    enough = an_engine(directory, kv_memory=needed)
    enough.add(request)
    assert enough.stats().num_waiting == 1
    enough.close()
    short = an_engine(directory, kv_memory=needed - 1)
    with pytest.raises(InvalidRequest, match="bytes"):
        short.add(request)
    short.close()
