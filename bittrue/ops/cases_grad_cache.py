"""Cases of the derivatives of attention and the index scores."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bittrue.ops.case import Call, generator
from bittrue.ops.case_grad import GradCase
from bittrue.ops.cases_cache import step_of
from bittrue.ops.contracts import CSA_RATIO, HCA_RATIO, Batch, LayerKind

# Lengths of the documents of a step.
SHORT = (70, 1, 64, 3, 0, 130)
LONG = (330,)
LONGEST = (1100,)  # groups of several blocks
NONE = ()
STEPS: dict[str, tuple[int, ...]] = {"short": SHORT, "long": LONG, "longest": LONGEST, "nothing": NONE}


def cache_gradient_cases() -> list[GradCase]:
    """Every case of this file's backward ops."""
    return [*_attends(), *_scores()]


def documents(lengths: Sequence[int], seed: int = 0) -> Batch:
    """The batch of a step of whole documents."""
    return step_of([(0, length) for length in lengths], seed)


def num_entries(lengths: Sequence[int], ratio: int) -> int:
    return sum(length // ratio for length in lengths)


def picks(lengths: Sequence[int], k: int, seed: int) -> Tensor:
    """ids [T, k] i32: up to k visible entries of every query, ascending, then -1; each seventh takes none."""
    random, ids = generator(seed), torch.full((sum(lengths), k), -1, dtype=torch.int32)
    t = 0
    for length in lengths:
        for position in range(length):
            some = torch.randperm((position + 1) // CSA_RATIO, generator=random)[:k].sort().values
            if t % 7 != 3:
                ids[t, : some.numel()] = some
            t += 1
    return ids


def _normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator(seed)) * scale


def attention_inputs(
    seed: int, kind: LayerKind, lengths: Sequence[int], heads: int, c: int, window: int, k: int
) -> Call:
    """Inputs of the backward of attention, the logits about as large as a trained layer's."""
    batch, num_tokens = documents(lengths, seed), sum(lengths)
    ratio = HCA_RATIO if kind == "hca" else CSA_RATIO
    entries = None if kind == "window" else _normal(seed + 1, num_entries(lengths, ratio), c)
    q, d_out = (_normal(seed + i, num_tokens, heads, c) for i in (2, 3))
    ids = picks(lengths, k, seed) if kind == "csa" else None
    args = (d_out, q, _normal(seed + 4, num_tokens, c), entries, ids, _normal(seed + 5, heads), batch)
    return Call(args, {"window": window, "scale": 2.0 * c**-0.5})


def _attends() -> Iterator[GradCase]:
    # heads, c, window, k: k of 300 takes all visible entries, k of 6 few of many
    settings = ((4, 64, 128, 300), (4, 64, 128, 6), (3, 32, 5, 20), (6, 40, 100, 9))
    kinds: tuple[LayerKind, ...] = ("window", "hca", "csa")
    for name, lengths in STEPS.items():
        for kind in kinds:
            for heads, c, window, k in ((1, 16, 30, 5),) if lengths is LONGEST else settings:
                if kind != "csa" and k == 6:
                    continue  # as the one before it

                def inputs(
                    seed: int,
                    kind: LayerKind = kind,
                    lengths: tuple[int, ...] = lengths,
                    sizes: tuple[int, int, int, int] = (heads, c, window, k),
                ) -> Call:
                    return attention_inputs(seed, kind, lengths, *sizes)

                pairs = sum(min(t + 1, window) for length in lengths for t in range(length))
                yield GradCase(
                    op="attention",
                    name=f"{kind} {name} N{heads} c{c} window {window} k{k}",
                    make_inputs=inputs,
                    relative=2e-6,
                    reason="f32 sums of some hundred terms in another order, an f32 exp within 2 ulp",
                    bytes=sum(lengths) * c * 4 * (3 * heads + 2),
                    flops=10 * pairs * heads * c,
                )


def score_inputs(seed: int, lengths: Sequence[int], heads: int, c: int, k: int) -> Call:
    """(q, head_weights, keys, ids, batch) of the index scores."""
    num_tokens = sum(lengths)
    q, weights = _normal(seed + 1, num_tokens, heads, c), _normal(seed + 2, num_tokens, heads)
    keys = _normal(seed + 3, num_entries(lengths, CSA_RATIO), c)
    return Call((q, weights, keys, picks(lengths, k, seed), documents(lengths, seed)))


def _scores() -> Iterator[GradCase]:
    settings = ((4, 32, 300), (4, 32, 6), (3, 40, 20), (9, 128, 30))  # heads, c, k
    for op in ("index_scores", "index_scores_backward"):
        for name, lengths in STEPS.items():
            for heads, c, k in ((1, 16, 5),) if lengths is LONGEST else settings:

                def inputs(
                    seed: int,
                    op: str = op,
                    lengths: tuple[int, ...] = lengths,
                    sizes: tuple[int, int, int] = (heads, c, k),
                ) -> Call:
                    call = score_inputs(seed, lengths, *sizes)
                    if op == "index_scores":
                        return call
                    return Call((_normal(seed + 4, sum(lengths), sizes[2]), *call.args))

                pairs = sum(min(k, (t + 1) // CSA_RATIO) for length in lengths for t in range(length))
                yield GradCase(
                    op=op,
                    name=f"{name} H{heads} c{c} k{k}",
                    make_inputs=inputs,
                    relative=2e-6,
                    reason="f32 sums of some hundred terms in another order",
                    bytes=sum(lengths) * c * 4 * heads,
                    flops=(2 if op == "index_scores" else 6) * pairs * heads * c,
                )
