"""`bittrue verify`: the laws that a checkpoint must obey on this machine, checked through the engine that
serves it."""

import random
from collections.abc import Iterator, Sequence

from bittrue.engine.engine import Engine
from bittrue.engine.types import Request, SamplingParams
from bittrue.ops.contracts import CSA_RATIO
from bittrue.probes.laws import LawProbe, LawResult

# Either side of the compression ratios, the window and a page.
SHORT_LENGTHS = (1, 2, 3, 5, 8, 127, 128, 129, 257)
MIXED_REQUESTS = 8


def selection_length(engine: Engine) -> int:
    """Tokens after which the index leaves rows out: before that, its order is never exercised."""
    return CSA_RATIO * engine.config.index_topk + 67


def probe_lengths(engine: Engine, *, max_tokens: int) -> tuple[int, ...]:
    """Prompt lengths to check, at most ``max_tokens`` each; the longest makes the index choose where it
    can."""
    longest = min(selection_length(engine), max_tokens, engine.max_context)
    return tuple(sorted({min(n, longest) for n in SHORT_LENGTHS} | {longest}))


def verify_laws(
    engine: Engine, *, max_tokens: int, rounds: int, seed: int, threads: Sequence[int]
) -> Iterator[LawResult]:
    """Checks L1, L2 and L8 and yields each result as it is known. The engine must be idle.

    ``max_tokens`` bounds the longest prompt, ``rounds`` the random variants of each law.
    """
    parts = engine.parts
    probe = LawProbe(parts.runner, num_pages=parts.num_pages, num_slots=parts.num_slots, seed=seed)
    prompts = probe.random_prompts(probe_lengths(engine, max_tokens=max_tokens))
    yield from probe.chunking(prompts, rounds=rounds)
    yield from probe.batching(prompts, rounds=rounds)
    yield sampled_alone_and_together(engine, seed=seed)
    yield from probe.threading(prompts, counts=threads)


def sampled_alone_and_together(engine: Engine, *, seed: int) -> LawResult:
    """L2 through the scheduler: requests sampled one after the other = all at once, tokens and
    log-probabilities."""
    draw = random.Random(seed)
    vocab = engine.config.vocab_size
    prompts = [
        tuple(draw.randrange(vocab) for _ in range(draw.choice([1, 3, 40, 130])))
        for _ in range(MIXED_REQUESTS)
    ]
    params = [
        SamplingParams(
            max_tokens=24,
            seed=i,
            temperature=[0.0, 0.7, 1.3][i % 3],
            top_p=[1.0, 0.9][i % 2],
            logprobs=0,
            ignore_eos=True,
        )
        for i in range(MIXED_REQUESTS)
    ]
    alone = [_tokens(engine, [prompt], [param])[0] for prompt, param in zip(prompts, params, strict=True)]
    together = _tokens(engine, prompts, params)
    difference = None
    for i, (one, other) in enumerate(zip(alone, together, strict=True)):
        at = next((j for j, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        if at is not None and difference is None:
            difference = f"request {i}, generated token {at}: {one[at]} alone, {other[at]} together"
    return LawResult("L2 batching", f"{MIXED_REQUESTS} sampled requests", sum(map(len, together)), difference)


def _tokens(
    engine: Engine, prompts: Sequence[tuple[int, ...]], params: Sequence[SamplingParams]
) -> list[list[tuple[int, float]]]:
    """(token id, log-probability) of everything generated, per request."""
    names = [f"verify-{i}" for i in range(len(prompts))]
    for name, prompt, param in zip(names, prompts, params, strict=True):
        engine.add(Request(request_id=name, prompt=prompt, params=param))
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
    while engine.has_work():
        for event in engine.step():
            found[event.request_id] += [(entry.token_id, entry.logprob) for entry in event.logprobs]
    return [found[name] for name in names]
