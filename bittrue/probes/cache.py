"""Checks law L3: cold = resumed from any cached position, under each window strategy."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence

from bittrue.engine.assembly import Assembly
from bittrue.kv.layout import PAGE_TOKENS
from bittrue.probes.engines import Engines
from bittrue.probes.result import LawResult
from bittrue.probes.resume import STRATEGIES, Cold, ResumeProbe, edges, policy_of, strategy_of
from bittrue.probes.story import Story, hits
from bittrue.probes.workload import random_tokens

TAIL = 24  # tokens computed behind a position at which a probe resumed


def replay_length(parts: Assembly) -> int:
    """Tokens of a prompt of which a part can be resumed by replay alone, with some room."""
    policy = policy_of(parts, 0)
    first = 1
    while policy.replay_tokens(first) >= first:
        first += 1
    return first + 130


def resumed_at_positions(engines: Engines, *, max_tokens: int, rounds: int, seed: int) -> Iterator[LawResult]:
    """Below the scheduler, each strategy: a prompt resumed at every edge and at random positions; then
    prompts that branch off. Whole logit rows and stored bytes are compared."""
    parts = engines.parts
    draw = random.Random(seed)
    length = min(max_tokens, replay_length(parts), parts.max_context - 1)
    tokens = random_tokens(draw, parts, length)
    for strategy in STRATEGIES:
        policy = policy_of(parts, strategy_of(strategy, length))
        probe = ResumeProbe(parts, policy, seed=seed)
        # A turn that ended within a page: the state there has a pool half full, which the next page needs.
        turn = max(1, length - PAGE_TOKENS - 22)
        if strategy != "recompute":
            probe.cold(tokens[:turn])
        cold = probe.cold(tokens)
        positions = {*edges(policy, length), turn - 1, turn} & set(range(1, length))
        positions |= {draw.randrange(1, length) for _ in range(4 * rounds)}
        yield resumed_result(probe, cold, sorted(positions), strategy)
        yield branched_result(parts, probe, cold, draw, rounds)


def resumed_result(probe: ResumeProbe, cold: Cold, positions: Sequence[int], strategy: str) -> LawResult:
    """Resumes at all ``positions`` and sums up."""
    exercised: Counter[str] = Counter()
    found, count = None, 0
    for index, position in enumerate(positions):
        # Now and then to the end: some of what is wrong shows when a page ends.
        one = probe.resume(cold, position, TAIL if index % 3 else len(cold.tokens))
        count += one.num_positions
        if one.tier is not None:
            exercised[f"tokens from {one.tier}"] += one.start
            # The recompute strategy has snapshots too, at ends of prompts: what is its own is the replay.
            exercised[f"resumed, {strategy}"] += strategy != "recompute" or one.tier == "replay"
        exercised["tokens replayed"] += one.kept - one.start
        if found is None and one.difference is not None:
            found = f"resumed at {position} from {one.start}: {one.difference}"
    return LawResult("L3", f"{len(cold.tokens)} tokens, {strategy}", count, found, exercised)


def branched_result(
    parts: Assembly, probe: ResumeProbe, cold: Cold, draw: random.Random, rounds: int
) -> LawResult:
    """Prompts that leave the cached one in its middle, or an earlier branch in its own."""
    found, count, tokens = None, 0, cold.tokens
    exercised: Counter[str] = Counter()
    for turn in range(1 + rounds):
        # In turn anywhere, and so late that even a replay from nothing saves something.
        at = draw.randrange(1, len(tokens)) if turn % 2 else max(1, len(tokens) - draw.randrange(1, 100))
        tokens = (*tokens[:at], *random_tokens(draw, parts, 1 + min(len(tokens) - at, 150)))
        branch = probe.cold(tokens, is_kept=False)
        for position in (len(tokens) - 1, at):
            one = probe.resume(branch, position, TAIL, is_kept=position > at)
            count += one.num_positions
            exercised["branches resumed"] += one.start > 0
            if found is None and one.difference is not None:
                found = f"branch at {at}, resumed from {one.start}: {one.difference}"
    return LawResult("L3", f"branches, a state every {probe.policy.snapshot_every}", count, found, exercised)


def conversations(engines: Engines, story: Story) -> Iterator[LawResult]:
    """Through the whole engine, each strategy: conversations that grow, branch and are edited."""
    for strategy in STRATEGIES:
        every = strategy_of(strategy, story.longest)
        with engines.another(prefix_cache=True, snapshot_every=every) as engine:
            answers = story.tell(engine)
            yield story.compare("L3", f"conversations, {strategy}", answers, hits(engine))
