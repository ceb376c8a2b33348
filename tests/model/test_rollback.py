"""Drafts that are rejected leave no trace: logits equal those of a run that never drafted, bit for bit."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from oracles.random_checkpoint import random_checkpoint
from support.models import logits_of, make_runner, random_ids
from torch import Tensor

from bittrue.config.formats import Level
from bittrue.engine.runner import Runner
from bittrue.kv.layout import pages_for
from bittrue.model.batch import Segment, build_batch
from bittrue.ops.dispatch import select
from bittrue.ops.numeric import first_difference

OPS = select("cpu", threads=1)
MAX_DRAFT = 5
NUM_PAGES = 16
# Around the CSA ratio, the window and one and two HCA windows; index top-k (16 rows) bites from 64 on.
LENGTHS = (9, 140, 271)
VARIANTS = {
    "maths-f32": ("f32", "maths", "f32"),
    "maths-bf16": ("bf16", "maths", "bf16"),
    "published-fp8": ("fp8", "published", "bf16"),
    "published-fp4": ("fp4", "published", "bf16"),
}


@dataclass
class Drafted:
    """One sequence that is run with drafts: ``tokens`` are the true ones, ``done`` of them accepted."""

    tokens: list[int]
    slot: int
    page_ids: list[int]
    done: int = 0
    fold: int = 0
    rows: list[Tensor] = field(default_factory=list)

    def next_step(
        self, rng: random.Random, vocab: int, longest_draft: int, is_decode: bool
    ) -> tuple[Segment, int]:
        """A chunk of true tokens, then a draft: some right tokens and some wrong ones. A decode has one sure
        token, and always the longest draft.

        Returns how many tokens of the segment stay.
        """
        left = len(self.tokens) - self.done
        sure = 1 if is_decode else min(left, rng.choice((1, 1, 1, 1, 2, 3, 7, 60, 130)))
        right = min(left - sure, rng.randrange(longest_draft + 1))
        wrong = longest_draft - right
        if not is_decode:
            wrong = rng.randrange(wrong + 1)
        stays = self.tokens[self.done : self.done + sure + right]
        drafted = [*stays, *(rng.randrange(vocab) for _ in range(wrong))]
        return Segment(drafted, self.done, self.fold, self.slot, self.page_ids), len(stays)

    def take(self, segment: Segment, logits: Tensor, stays: int, max_draft: int) -> None:
        self.rows.append(logits[:stays])
        self.done += stays
        # The next step may start before the end of this one; the running pool stays where it was folded to.
        self.fold = max(self.fold, segment.start + len(segment.token_ids) - max_draft)


def unchecked(runner: Runner, segments: Sequence[Segment]) -> Tensor:
    """The step without the runner's look at its integers."""
    with torch.inference_mode():
        return runner.model.forward(build_batch(segments), runner.caches)


def run_with_drafts(
    runner: Runner,
    prompts: list[list[int]],
    seed: int,
    *,
    longest_draft: int = MAX_DRAFT,
    is_decode: bool = False,
    forward: Callable[[Runner, Sequence[Segment]], Tensor] = Runner.forward,
) -> list[Tensor]:
    """Logits of every prompt's positions; in each step some of the sequences advance, in any order."""
    rng = random.Random(seed)
    vocab = runner.model.config.vocab_size
    pages = rng.sample(range(NUM_PAGES), NUM_PAGES)
    sequences = []
    for slot, prompt in enumerate(prompts):
        needed = pages_for(len(prompt) + longest_draft)
        sequences.append(Drafted(prompt, slot, pages[:needed]))
        pages = pages[needed:]
    while live := [s for s in sequences if s.done < len(s.tokens)]:
        chosen = rng.sample(live, rng.randint(1, len(live)))
        steps = [s.next_step(rng, vocab, longest_draft, is_decode) for s in chosen]
        streams = forward(runner, [segment for segment, _ in steps])
        logits = torch.cat([x for _, x in runner.logits_by_block(streams, range(len(streams)))])
        parts = torch.split(logits, [len(segment.token_ids) for segment, _ in steps])
        for sequence, (segment, stays), part in zip(chosen, steps, parts, strict=True):
            sequence.take(segment, part, stays, runner.max_draft)
    return [torch.cat(s.rows) for s in sequences]


@pytest.mark.parametrize("variant", VARIANTS)
def test_rejected_drafts_change_no_bit(variant: str) -> None:
    precision, level, act = VARIANTS[variant]
    raw, tensors = random_checkpoint(3, precision=precision)
    plain = make_runner(raw, tensors, level=level, act=act)
    drafting = make_runner(raw, tensors, level=level, act=act, pages=NUM_PAGES, max_draft=MAX_DRAFT)
    prompts = [random_ids(n, raw["vocab_size"], seed=n) for n in LENGTHS]
    expected = [logits_of(plain, prompt, [len(prompt)]) for prompt in prompts]
    for seed in range(6):
        for prompt, want, got in zip(
            prompts, expected, run_with_drafts(drafting, prompts, seed), strict=True
        ):
            assert first_difference(want, got) is None, (len(prompt), first_difference(want, got))


@pytest.mark.parametrize("variant", VARIANTS)
def test_captured_steps_of_any_draft_length_give_the_bits_of_direct_ones(variant: str) -> None:
    """Steps of one to three sequences with 1 to 9 tokens each, then of as many as come."""
    precision, level, act = VARIANTS[variant]
    raw, tensors = random_checkpoint(3, precision=precision)
    captured, direct = (
        make_runner(raw, tensors, level=level, act=act, pages=NUM_PAGES, max_draft=8, ops=ops)
        for ops in (OPS, replace(OPS, capture=None))
    )
    prompts = [random_ids(n, raw["vocab_size"], seed=n) for n in (40, 60, 140)]
    for num_tokens in range(1, 10):
        options = {"longest_draft": num_tokens - 1, "is_decode": True}
        got, want = (run_with_drafts(r, prompts, num_tokens, **options) for r in (captured, direct))
        for mine, theirs in zip(got, want, strict=True):
            assert first_difference(theirs, mine) is None, (num_tokens, first_difference(theirs, mine))
    assert captured._graphs is not None and direct._graphs is None
    shapes = {(count, count * num_tokens) for count in (1, 2, 3) for num_tokens in range(1, 10)}
    assert set(captured._graphs.shapes) == shapes
    for seed in range(3):
        got, want = (run_with_drafts(r, prompts, seed, longest_draft=8) for r in (captured, direct))
        assert all(first_difference(a, b) is None for a, b in zip(want, got, strict=True)), seed


@pytest.mark.parametrize("level", ["maths", "published"])
def test_a_draft_may_close_whole_windows(level: Level) -> None:
    raw, tensors = random_checkpoint(6, precision="bf16")
    prompt = random_ids(400, raw["vocab_size"], seed=3)
    expected = logits_of(make_runner(raw, tensors, level=level, act="bf16"), prompt, [len(prompt)])
    runner = make_runner(raw, tensors, level=level, act="bf16", pages=NUM_PAGES, max_draft=150)
    for seed in range(3):
        got = run_with_drafts(runner, [prompt], seed, longest_draft=150)[0]
        assert first_difference(expected, got) is None, seed


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_a_draft_longer_than_the_rings_allow_is_noticed(ratio: int) -> None:
    raw, tensors = random_checkpoint(4, num_hidden_layers=2, compress_ratios=[ratio, ratio, 0])
    prompt = random_ids(271, raw["vocab_size"], seed=1)
    expected = logits_of(make_runner(raw, tensors), prompt, [len(prompt)])
    small = make_runner(raw, tensors, pages=NUM_PAGES, max_draft=1)
    got = run_with_drafts(small, [prompt], 0, longest_draft=9, forward=unchecked)[0]
    assert first_difference(expected, got) is not None
    with pytest.raises(AssertionError, match="fold"):
        run_with_drafts(small, [prompt], 0, longest_draft=9)


@pytest.mark.parametrize(
    ("segment", "fact"),
    [
        (Segment([1] * 129, 0, 0, 0, [0]), "pages for 128 tokens"),
        (Segment([1], -1, 0, 0, [0]), "pages"),
        (Segment([1], 0, 0, 2, [0]), "slot 2 of 2"),
        (Segment([1], 0, 0, -1, [0]), "slot -1"),
        (Segment([1], 0, 0, 0, [4]), "page 4 of 4"),
        (Segment([1], 9, 10, 0, [0]), "fold"),
        (Segment([1], 9, 6, 0, [0]), "fold"),
    ],
)
def test_a_step_that_would_leave_the_cache_is_stopped(segment: Segment, fact: str) -> None:
    raw, tensors = random_checkpoint(6)
    runner = make_runner(raw, tensors, pages=4, slots=2, max_draft=2)
    with pytest.raises(AssertionError, match=fact):
        runner.forward([segment])


def test_room_for_drafts_changes_no_bit_of_a_run_without_them() -> None:
    raw, tensors = random_checkpoint(5)
    prompt = random_ids(271, raw["vocab_size"], seed=2)
    expected = logits_of(make_runner(raw, tensors), prompt, [len(prompt)])
    for max_draft in (1, 127, 128, 200):
        runner = make_runner(raw, tensors, pages=NUM_PAGES, max_draft=max_draft)
        got = run_with_drafts(runner, [prompt], max_draft, longest_draft=0)[0]
        assert first_difference(expected, got) is None, max_draft
