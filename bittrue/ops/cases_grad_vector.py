"""Cases of the derivatives of embed, rms_norm and the hyper-connections."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bittrue.ops.case import Call, generator
from bittrue.ops.case_grad import GradCase

F32_BYTES = 4
EPS = {"eps": 1e-6, "norm_eps": 1e-6}
# Tokens, streams, features: no token, a lone one, groups of tokens that are not full, tokens of two blocks
# (BLOCK_TOKENS of grad_hyper.cpp), all kinds of numbers of streams, features that fill no vector.
HYPER_SHAPES = ((0, 4, 64), (1, 4, 128), (19, 4, 72), (17, 1, 16), (5, 3, 33), (37, 8, 24), (300, 4, 128))
SUMS = "sums of products in f32, in another order"


def vector_gradient_cases() -> list[GradCase]:
    """Every case of this file's backward ops."""
    groups = (_embed, _norm, _hyper_pre, _hyper_post, _hyper_head)
    return [case for group in groups for case in group()]


def _normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator(seed)) * scale


def _embed() -> Iterator[GradCase]:
    def case(tokens: int, streams: int, dim: int, vocab_size: int) -> GradCase:
        def inputs(seed: int) -> Call:
            # Some ids are not in the table: their rows are nobody's.
            ids = torch.randint(-1, vocab_size + 1, (tokens,), generator=generator(seed))
            return Call((_normal(seed + 1, tokens, streams, dim), ids, vocab_size))

        return GradCase(
            op="embed",
            name=f"T{tokens} M{streams} D{dim} V{vocab_size}",
            make_inputs=inputs,
            relative=1e-6,
            reason="the rows of an id are added in f32",
            bytes=F32_BYTES * (tokens * streams + vocab_size) * dim,
            flops=tokens * streams * dim,
        )

    yield from (case(*sizes) for sizes in ((0, 4, 64, 9), (1, 4, 64, 9), (70, 3, 33, 7), (300, 4, 128, 50)))


def _norm() -> Iterator[GradCase]:
    def case(shape: tuple[int, ...], *, has_weight: bool) -> GradCase:
        def inputs(seed: int) -> Call:
            weight = _normal(seed + 1, shape[-1]) if has_weight else None
            return Call((_normal(seed + 2, *shape), _normal(seed, *shape, scale=3.0), weight, 1e-6))

        size = torch.Size(shape).numel()
        return GradCase(
            op="rms_norm",
            name=f"{list(shape)}, {'a' if has_weight else 'no'} weight",
            make_inputs=inputs,
            relative=4e-6,
            reason=SUMS,
            bytes=3 * F32_BYTES * size,
            flops=8 * size,
        )

    for shape in ((0, 64), (1, 512), (3, 7), (2, 3, 2, 24), (300, 4, 64), (600, 128)):
        yield case(shape, has_weight=True)
        yield case(shape, has_weight=False)


def _hyper_inputs(seed: int, outputs: int, shape: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """streams, fn, base, scale, norm."""
    tokens, m, dim = shape
    return (
        _normal(seed, tokens, m, dim),
        _normal(seed + 1, outputs, m * dim, scale=(m * dim) ** -0.5),
        _normal(seed + 2, outputs),
        torch.rand(1 if outputs == m else 3, generator=generator(seed + 3)) + 0.5,
        _normal(seed + 4, dim),
    )


def _hyper_pre() -> Iterator[GradCase]:
    def case(shape: tuple[int, int, int], iters: int) -> GradCase:
        tokens, m, dim = shape
        outputs = (2 + m) * m

        def inputs(seed: int) -> Call:
            d_outs = (_normal(seed + 5, tokens, dim), _normal(seed + 6, tokens, m))
            d_comb = _normal(seed + 7, tokens, m, m)
            return Call((*d_outs, d_comb, *_hyper_inputs(seed, outputs, shape)), {"iters": iters, **EPS})

        return GradCase(
            op="hc_pre",
            name=f"T{tokens} M{m} D{dim}, {iters} rounds",
            make_inputs=inputs,
            relative=4e-6,
            reason=f"{SUMS}; each Sinkhorn round is undone with its own roundings",
            bytes=F32_BYTES * (tokens * (2 * m + 1) * dim + 2 * outputs * m * dim),
            flops=6 * tokens * outputs * m * dim,
        )

    yield from (case(shape, 20) for shape in HYPER_SHAPES)
    yield case((21, 4, 64), 1)


def _hyper_post() -> Iterator[GradCase]:
    def case(shape: tuple[int, int, int]) -> GradCase:
        tokens, m, dim = shape

        def inputs(seed: int) -> Call:
            y, streams = _normal(seed, tokens, dim), _normal(seed + 1, tokens, m, dim)
            factors = (_normal(seed + 2, tokens, m), _normal(seed + 3, tokens, m, m))
            return Call((_normal(seed + 4, tokens, m, dim), y, streams, *factors))

        return GradCase(
            op="hc_post",
            name=f"T{tokens} M{m} D{dim}",
            make_inputs=inputs,
            relative=1e-6,
            reason=SUMS,
            bytes=F32_BYTES * tokens * (3 * m + 2) * dim,
            flops=4 * tokens * (m + 1) * m * dim,
        )

    yield from (case(shape) for shape in HYPER_SHAPES)


def _hyper_head() -> Iterator[GradCase]:
    def case(shape: tuple[int, int, int]) -> GradCase:
        tokens, m, dim = shape
        return GradCase(
            op="hc_head",
            name=f"T{tokens} M{m} D{dim}",
            make_inputs=lambda seed: Call(
                (_normal(seed + 5, tokens, dim), *_hyper_inputs(seed, m, shape)), EPS
            ),
            relative=4e-6,
            reason=SUMS,
            bytes=F32_BYTES * (tokens * (2 * m + 1) * dim + 2 * m * m * dim),
            flops=6 * tokens * m * m * dim,
        )

    # One stream: the norm takes back every factor, and what is left of its gradient is rounding.
    yield from (case(shape) for shape in HYPER_SHAPES if shape[1] > 1)
