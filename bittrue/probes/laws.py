"""Checks laws L1 (chunking), L2 (batching) and L8 (threads) on a checkpoint, bit for bit over whole logit
rows."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bittrue.engine.runner import Runner
from bittrue.model.batch import Segment
from bittrue.ops.contracts import PAGE_TOKENS
from bittrue.ops.numeric import first_difference
from bittrue.ops.threads import set_threads, threads_of
from bittrue.probes.result import LawResult


@dataclass(frozen=True, slots=True)
class Prompt:
    """A token sequence and the logits [n, V] of its plain run: alone, in one piece."""

    token_ids: tuple[int, ...]
    expected: Tensor


class LawProbe:
    """Runs token sequences through one runner in different ways and compares the logits of every position.

    The runner must own at least ``num_slots`` free state slots and ``num_pages`` free pages. Pages and
    slots are dealt in random order, so a result that depends on where a row lies in memory is found too.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        num_pages: int,
        num_slots: int,
        seed: int,
    ) -> None:
        self.runner = runner
        self.num_pages = num_pages
        self.num_slots = num_slots
        self.random = random.Random(seed)

    # ---- running sequences -------------------------------------------------------------------------------

    def run(
        self, schedule: Sequence[Sequence[tuple[int, int]]], prompts: Sequence[tuple[int, ...]]
    ) -> list[Tensor]:
        """Runs steps of (prompt index, number of tokens) and returns each prompt's logits [n, V]."""
        pages = self.random.sample(range(self.num_pages), self.num_pages)
        slots = self.random.sample(range(self.num_slots), len(prompts))
        page_ids = []
        for prompt in prompts:
            needed = -(-len(prompt) // PAGE_TOKENS)
            page_ids.append(pages[:needed])
            pages = pages[needed:]
        done = [0] * len(prompts)
        folds = [0] * len(prompts)
        rows: list[list[Tensor]] = [[] for _ in prompts]
        for step in schedule:
            segments = []
            for index, count in step:
                start = done[index]
                tokens = prompts[index][start : start + count]
                segments.append(Segment(tokens, start, folds[index], slots[index], page_ids[index]))
                done[index] += count
                folds[index] = max(folds[index], done[index] - self.runner.max_draft)
            streams = self.runner.forward(segments)
            logits = torch.cat([x for _, x in self.runner.logits_by_block(streams, range(len(streams)))])
            for (index, _), part in zip(step, torch.split(logits, [n for _, n in step]), strict=True):
                rows[index].append(part)
        return [torch.cat(parts) for parts in rows]

    def plain(self, token_ids: Sequence[int]) -> Prompt:
        """The slow path that everything is compared with."""
        tokens = tuple(token_ids)
        return Prompt(tokens, self.run([[(0, len(tokens))]], [tokens])[0])

    def random_prompts(self, lengths: Sequence[int]) -> list[Prompt]:
        vocab = self.runner.model.config.vocab_size
        return [self.plain([self.random.randrange(vocab) for _ in range(n)]) for n in lengths]

    # ---- the laws ----------------------------------------------------------------------------------------

    def chunking(self, prompts: Sequence[Prompt], *, rounds: int) -> Iterator[LawResult]:
        """L1: one-shot prefill = token by token = any random chunking."""
        for prompt in prompts:
            length = len(prompt.token_ids)
            yield self._compare("L1", f"{length} tokens, one by one", [[(0, 1)]] * length, [prompt])
            for _ in range(rounds):
                sizes = self._random_chunks(length)
                steps = [[(0, n)] for n in sizes]
                yield self._compare("L1", f"{length} tokens in {len(sizes)} chunks", steps, [prompt])

    def batching(self, prompts: Sequence[Prompt], *, rounds: int) -> Iterator[LawResult]:
        """L2: alone = in any batch, with any neighbours, in any row, prefills mixed with decodes."""
        for _ in range(rounds):
            chosen = self.random.sample(list(prompts), k=min(len(prompts), self.num_slots))
            steps = self._random_schedule([len(p.token_ids) for p in chosen])
            yield self._compare("L2", f"{len(chosen)} sequences in {len(steps)} steps", steps, chosen)

    def threading(self, prompts: Sequence[Prompt], *, counts: Sequence[int]) -> Iterator[LawResult]:
        """L8: any number of CPU threads."""
        before = threads_of(self.runner.model.ops)
        try:
            for count in counts:
                set_threads(self.runner.model.ops, count)
                for prompt in prompts:
                    length = len(prompt.token_ids)
                    steps = [[(0, n)] for n in self._random_chunks(length)]
                    yield self._compare(
                        "L8", f"{length} tokens on {count} threads", steps, [prompt], {"thread counts": 1}
                    )
        finally:
            set_threads(self.runner.model.ops, before)

    # ---- helpers of the laws -----------------------------------------------------------------------------

    def _compare(
        self,
        law: str,
        variant: str,
        schedule: Sequence[Sequence[tuple[int, int]]],
        prompts: Sequence[Prompt],
        exercised: Mapping[str, int] | None = None,
    ) -> LawResult:
        results = self.run(schedule, [p.token_ids for p in prompts])
        difference = None
        for index, (prompt, got) in enumerate(zip(prompts, results, strict=True)):
            found = first_difference(prompt.expected, got)
            if found is not None and difference is None:
                difference = f"sequence {index}: {found}"
        if exercised is None:
            together = sum(len(step) for step in schedule if len(step) > 1)
            chunks = sum(len(step) for step in schedule) if len(schedule) > 1 else 0
            exercised = {"chunks": chunks} if law == "L1" else {"batched sequences": together}
        return LawResult(law, variant, sum(len(p.token_ids) for p in prompts), difference, exercised)

    def _random_chunks(self, length: int) -> list[int]:
        sizes = []
        while length:
            size = min(length, self.random.choice([1, 2, 3, 5, 7, 31, 64, 127, 128, 129, 200]))
            sizes.append(size)
            length -= size
        return sizes

    def _random_schedule(self, lengths: Sequence[int]) -> list[list[tuple[int, int]]]:
        chunks = [self._random_chunks(n) for n in lengths]
        schedule = []
        while any(chunks):
            ready = [i for i, c in enumerate(chunks) if c]
            step = self.random.sample(ready, k=self.random.randint(1, len(ready)))
            schedule.append([(i, chunks[i].pop(0)) for i in step])
        return schedule
