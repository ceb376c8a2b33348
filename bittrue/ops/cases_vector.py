"""Cases of the vector ops: norm, rope, quantisation, packed rows, hyper-connections, sampling."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bittrue.config.formats import ACT_GROUP, FP4_GROUP, KV_GROUP, RowFormat
from bittrue.ops.case import EXACT, Call, Case, Tolerance, generator, rows_alone, take_args

TOKENS = (0, 1, 3, 17)
MANY = 70  # rows of a hidden size that wake the second thread
F32, BF16 = torch.float32, torch.bfloat16
SHORT = {F32: "f32", BF16: "bf16"}
BYTES = {F32: 4, BF16: 2}
ROW_FORMATS = (
    RowFormat("fp8", 512, 64),
    RowFormat("fp8", 64, 16),
    RowFormat("fp8", 160, 20),
    RowFormat("fp4", 128),
    RowFormat("fp4", 48),
    RowFormat("f32", 40),
    RowFormat("bf16", 40),
)

F32_ULP, BF16_ULP = 2.0**-23, 2.0**-7
NORM = {
    F32: Tolerance(4 * F32_ULP, 0.0, "the squares of a row are added in another order"),
    BF16: Tolerance(BF16_ULP, 0.0, "f32 values a few ulp apart may round to neighbours in bf16"),
}
MIXED_AND_NORMED = {
    F32: Tolerance(8 * F32_ULP, 2.0**-18, "dot products and squares of a row added in another order"),
    BF16: Tolerance(2 * BF16_ULP, 2.0**-18, "neighbours in bf16 before the norm and again after it"),
}
ELEMENTARY = Tolerance(F32_ULP, 0.0, "float64 functions of two libraries may round to neighbours in f32")
LOG_SOFTMAX = Tolerance(F32_ULP, 4 * F32_ULP, "a sum in another order, an f32 exp and log within 2 ulp")


def vector_cases() -> list[Case]:
    """Every case of the vector ops."""
    groups = (_embed, _norm, _rope, _quant, _rows, _kv_rows, _hyper_pre, _hyper_post, _hyper_head, _sampling)
    return [case for group in groups for case in group()]


def _normal(seed: int, *shape: int, dtype: torch.dtype = F32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=generator(seed)) * scale).to(dtype)


def _wide(seed: int, tokens: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Rows of sizes 1e-6 to 1e4, one of them zero: groups meet the floor and many scales."""
    x = _normal(seed, tokens, dim) * torch.logspace(-6, 4, max(tokens, 1))[:tokens, None]
    if tokens > 2:
        x[1] = 0.0
    return x.to(dtype)


def _embed() -> Iterator[Case]:
    def case(tokens: int, streams: int, dim: int, table: torch.dtype, act: torch.dtype) -> Case:
        def inputs(seed: int) -> Call:
            ids = torch.randint(-2, 52, (tokens,), generator=generator(seed))  # some are not in the table
            return Call((ids, _normal(seed + 1, 50, dim, dtype=table), streams, act))

        return Case(
            op="embed",
            name=f"T{tokens} M{streams} D{dim} {SHORT[table]} to {SHORT[act]}",
            make_inputs=inputs,
            tolerance=EXACT,
            invariance=rows_alone(take_args(0)),
            bytes=tokens * dim * (BYTES[table] + streams * BYTES[act]),
        )

    for table in (F32, BF16):
        for act in (F32, BF16):
            yield from (case(tokens, 4, 64, table, act) for tokens in TOKENS)
            yield case(5, 3, 33, table, act)
    yield case(MANY, 4, 1024, BF16, BF16)


def _norm() -> Iterator[Case]:
    def case(shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype | None) -> Case:
        def inputs(seed: int) -> Call:
            weight = None
            if weight_dtype is not None:
                weight = _normal(seed + 1, shape[-1], dtype=weight_dtype)
            return Call((_normal(seed, *shape, dtype=dtype, scale=3.0), weight, 1e-6))

        size = torch.Size(shape).numel()
        weight_name = "no" if weight_dtype is None else SHORT[weight_dtype]
        return Case(
            op="rms_norm",
            name=f"{list(shape)} {SHORT[dtype]}, {weight_name} weight",
            make_inputs=inputs,
            tolerance=NORM[dtype],
            invariance=rows_alone(take_args(0)),
            bytes=2 * size * BYTES[dtype],
            flops=4 * size,
        )

    for dtype in (F32, BF16):
        for tokens in TOKENS:
            yield case((tokens, 512), dtype, BF16)
            yield case((tokens, 4, 64), dtype, None)
        for dim in (1, 7, 40, 4096):
            yield case((3, dim), dtype, F32)
        yield case((2, 3, 2, 24), dtype, F32)
    yield case((MANY, 2048), BF16, BF16)


def _positions(seed: int, tokens: int) -> Tensor:
    """Positions up to 2^20, 0 among them."""
    positions = torch.randint(0, 2**20, (tokens,), generator=generator(seed), dtype=torch.int32)
    positions[:1] = 0
    return positions


def _inv_freq(rope_dim: int) -> Tensor:
    return (160_000.0 ** (-torch.arange(0, rope_dim, 2, dtype=torch.float64) / rope_dim)).float()


def _rope() -> Iterator[Case]:
    def angles(tokens: int, rope_dim: int) -> Case:
        return Case(
            op="rope_angles",
            name=f"T{tokens} R{rope_dim}",
            make_inputs=lambda seed: Call((_positions(seed, tokens), _inv_freq(rope_dim))),
            tolerance=ELEMENTARY,
            invariance=rows_alone(take_args(0)),
            bytes=tokens * 4 * (1 + rope_dim),
            flops=tokens * rope_dim * 20,
        )

    def turn(tokens: int, heads: int, dim: int, rope_dim: int, dtype: torch.dtype, inverse: bool) -> Case:
        def inputs(seed: int) -> Call:
            radians = _positions(seed, tokens)[:, None].double() * _inv_freq(rope_dim).double()
            x = _normal(seed, tokens, heads, dim, dtype=dtype)
            return Call((x, radians.cos().float(), radians.sin().float(), inverse))

        return Case(
            op="rope",
            name=f"T{tokens} N{heads} {dim}/{rope_dim} {SHORT[dtype]}{' inverse' * inverse}",
            make_inputs=inputs,
            tolerance=EXACT,
            invariance=rows_alone(take_args(0, 1, 2)),
            bytes=tokens * (2 * heads * dim * BYTES[dtype] + 4 * rope_dim),
            flops=tokens * heads * rope_dim * 3,
        )

    for tokens in TOKENS:
        yield angles(tokens, 64)
    yield angles(3, 6)
    for dtype in (F32, BF16):
        for inverse in (False, True):
            for tokens in TOKENS:
                yield turn(tokens, 4, 512, 64, dtype, inverse)
            yield turn(17, 3, 64, 16, dtype, inverse)
            yield turn(3, 2, 70, 6, dtype, inverse)
    yield turn(MANY, 4, 512, 64, BF16, False)


def _quant() -> Iterator[Case]:
    def case(op: str, tokens: int, dim: int, dtype: torch.dtype, *options: int) -> Case:
        return Case(
            op=op,
            name=f"T{tokens} D{dim} {SHORT[dtype]}" + "".join(f", groups of {group}" for group in options),
            make_inputs=lambda seed: Call((_wide(seed, tokens, dim, dtype), *options)),
            tolerance=EXACT,
            invariance=rows_alone(take_args(0)),
            bytes=2 * tokens * dim * BYTES[dtype],
            flops=4 * tokens * dim,
        )

    for dtype in (F32, BF16):
        for tokens in TOKENS:
            yield case("quant_fp8", tokens, 512, dtype, ACT_GROUP)
            yield case("quant_fp8", tokens, 448, dtype, KV_GROUP)
            yield case("quant_fp4", tokens, 128, dtype, FP4_GROUP)
            yield case("hadamard", tokens, 128, dtype)
        for dim in (1, 7, 48, 200, 4096):
            yield case("quant_fp8", 3, dim, dtype, ACT_GROUP)
            yield case("quant_fp4", 3, dim, dtype, FP4_GROUP)
        for n in (1, 2, 4, 8, 16, 32, 512):
            yield case("hadamard", 3, n, dtype)
    yield case("quant_fp8", MANY, 2048, BF16, ACT_GROUP)
    yield case("quant_fp4", MANY, 2048, BF16, FP4_GROUP)
    yield case("hadamard", MANY, 2048, BF16)


def _rows() -> Iterator[Case]:
    def pack(tokens: int, fmt: RowFormat, dtype: torch.dtype) -> Case:
        return Case(
            op="pack_rows",
            name=f"T{tokens} {fmt.kind} {fmt.dim}/{fmt.rope_dim} from {SHORT[dtype]}",
            make_inputs=lambda seed: Call((_wide(seed, tokens, fmt.dim, dtype), fmt)),
            tolerance=EXACT,
            invariance=rows_alone(take_args(0)),
            bytes=tokens * (fmt.bytes + BYTES[dtype] * fmt.dim),
            flops=4 * tokens * fmt.dim,
        )

    def unpack(tokens: int, fmt: RowFormat) -> Case:
        def inputs(seed: int) -> Call:
            # A scale byte of 255 is a NaN and no row holds it.
            shape = (tokens, fmt.bytes)
            return Call((torch.randint(0, 255, shape, generator=generator(seed), dtype=torch.uint8), fmt))

        return Case(
            op="unpack_rows",
            name=f"T{tokens} {fmt.kind} {fmt.dim}/{fmt.rope_dim}",
            make_inputs=inputs,
            tolerance=EXACT,
            invariance=rows_alone(take_args(0)),
            bytes=tokens * (fmt.bytes + 4 * fmt.dim),
        )

    for fmt in ROW_FORMATS:
        for tokens in TOKENS:
            yield unpack(tokens, fmt)
            yield pack(tokens, fmt, F32)
            yield pack(tokens, fmt, BF16)
    yield unpack(4 * MANY, ROW_FORMATS[0])
    yield pack(4 * MANY, ROW_FORMATS[0], BF16)


def _kv_rows() -> Iterator[Case]:
    def case(tokens: int, fmt: RowFormat, dtype: torch.dtype, norm: torch.dtype) -> Case:
        rotated = fmt.rope_dim or 8

        def inputs(seed: int) -> Call:
            # The norm of a row with few bits is exact, so that no code can fall to its neighbour.
            kv = torch.randint(0, 2, (tokens, fmt.dim), generator=generator(seed)) * 2.0 - 1.0
            weight = _normal(seed + 1, fmt.dim, dtype=norm, scale=30.0)
            radians = _positions(seed, tokens)[:, None].double() * _inv_freq(rotated).double()
            return Call((kv.to(dtype), weight, radians.cos().float(), radians.sin().float(), 0.0, fmt))

        return Case(
            op="kv_rows",
            name=f"T{tokens} {fmt.kind} {fmt.dim}/{rotated} from {SHORT[dtype]}, {SHORT[norm]} norm",
            make_inputs=inputs,
            tolerance=EXACT,
            invariance=rows_alone(take_args(0, 2, 3)),
            bytes=tokens * (fmt.bytes + BYTES[dtype] * fmt.dim),
            flops=10 * tokens * fmt.dim,
        )

    for fmt in ROW_FORMATS:
        for dtype in (F32, BF16):
            yield from (case(tokens, fmt, dtype, BF16) for tokens in TOKENS)
            yield case(3, fmt, dtype, F32)
    yield case(4 * MANY, ROW_FORMATS[0], BF16, BF16)


HyperShape = tuple[int, int, int]  # tokens, streams, features
HYPER_SHAPES: list[HyperShape] = [(t, 4, 64) for t in TOKENS]
HYPER_SHAPES += [(5, 4, 100), (3, 2, 33), (6, 3, 16), (7, 4, 4096)]
EPS = {"eps": 1e-6, "norm_eps": 1e-6}
NORM_DTYPE = (BF16, F32)  # by whether the width is odd


def _streams(seed: int, shape: HyperShape, dtype: torch.dtype) -> Tensor:
    return _normal(seed, *shape, dtype=dtype, scale=2.0)


def _hyper_weights(seed: int, outputs: int, shape: HyperShape, num_scales: int) -> tuple[Tensor, ...]:
    """fn, base and scale of a size that spreads the sigmoids, and the norm's weight."""
    width = shape[1] * shape[2]
    fn = _normal(seed + 1, outputs, width) / torch.tensor(float(width)).sqrt()
    scale = torch.rand(num_scales, generator=generator(seed + 3)) + 0.5
    return fn, _normal(seed + 2, outputs), scale, _normal(seed + 4, shape[2], dtype=NORM_DTYPE[shape[2] % 2])


def _stream_sizes(call: Call) -> Tensor:
    """[T, D]: the sum of the streams' sizes, of which a mix is a part, normalised as the mix is."""
    streams: Tensor = call.args[0]
    norm: Tensor = call.args[4]
    sizes = streams.double().abs().sum(1)
    return sizes / sizes.square().mean(-1, keepdim=True).sqrt() * norm.double().abs()


def _hyper_pre() -> Iterator[Case]:
    def magnitude(call: Call) -> tuple[Tensor, ...]:
        one = torch.ones(())
        return _stream_sizes(call), 2 * one, one

    def case(shape: HyperShape, dtype: torch.dtype, iters: int) -> Case:
        tokens, m, dim = shape
        outputs = (2 + m) * m

        def inputs(seed: int) -> Call:
            weights = _hyper_weights(seed, outputs, shape, 3)
            return Call((_streams(seed, shape, dtype), *weights), {"iters": iters, **EPS})

        return Case(
            op="hc_pre",
            name=f"T{tokens} M{m} D{dim} {SHORT[dtype]}, {iters} rounds",
            make_inputs=inputs,
            tolerance=MIXED_AND_NORMED[dtype],
            magnitude=magnitude,
            invariance=rows_alone(take_args(0)),
            bytes=tokens * (m + 1) * dim * BYTES[dtype] + 4 * outputs * m * dim,
            flops=2 * tokens * (outputs + 2) * m * dim,
        )

    for dtype in (F32, BF16):
        yield from (case(shape, dtype, 20) for shape in HYPER_SHAPES)
        yield case((3, 4, 64), dtype, 1)


def _hyper_head() -> Iterator[Case]:
    def case(shape: HyperShape, dtype: torch.dtype) -> Case:
        tokens, m, dim = shape

        def inputs(seed: int) -> Call:
            return Call((_streams(seed, shape, dtype), *_hyper_weights(seed, m, shape, 1)), EPS)

        return Case(
            op="hc_head",
            name=f"T{tokens} M{m} D{dim} {SHORT[dtype]}",
            make_inputs=inputs,
            tolerance=MIXED_AND_NORMED[dtype],
            magnitude=lambda call: (_stream_sizes(call),),
            invariance=rows_alone(take_args(0)),
            bytes=tokens * (m + 1) * dim * BYTES[dtype] + 4 * m * m * dim,
            flops=2 * tokens * (m + 2) * m * dim,
        )

    for dtype in (F32, BF16):
        yield from (case(shape, dtype) for shape in HYPER_SHAPES)


def _hyper_post() -> Iterator[Case]:
    def case(shape: HyperShape, dtype: torch.dtype) -> Case:
        tokens, m, dim = shape

        def inputs(seed: int) -> Call:
            y, streams = _normal(seed + 1, tokens, dim, dtype=dtype), _streams(seed, shape, dtype)
            return Call((y, streams, _normal(seed + 2, tokens, m), _normal(seed + 3, tokens, m, m)))

        return Case(
            op="hc_post",
            name=f"T{tokens} M{m} D{dim} {SHORT[dtype]}",
            make_inputs=inputs,
            tolerance=EXACT,
            invariance=rows_alone(take_args(0, 1, 2, 3)),
            bytes=tokens * (2 * m + 1) * dim * BYTES[dtype],
            flops=2 * tokens * (m + 1) * m * dim,
        )

    for dtype in (F32, BF16):
        yield from (case(shape, dtype) for shape in HYPER_SHAPES)


def _normalisers(call: Call) -> tuple[Tensor, ...]:
    """[R, 1]: 1 + |log of the sum of exponentials|, whose rounding is in every result of the row."""
    logits: Tensor = call.args[0]
    return (1.0 + logits.double().logsumexp(-1, keepdim=True).abs(),)


def _sampling() -> Iterator[Case]:
    def log_softmax(rows: int, vocab: int) -> Case:
        return Case(
            op="log_softmax",
            name=f"R{rows} V{vocab}",
            make_inputs=lambda seed: Call((_normal(seed, rows, vocab, scale=6.0),)),
            tolerance=LOG_SOFTMAX,
            magnitude=_normalisers,
            invariance=rows_alone(take_args(0)),
            bytes=8 * rows * vocab,
            flops=20 * rows * vocab,
        )

    def gumbel(rows: int, vocab: int) -> Case:
        def inputs(seed: int) -> Call:
            source = generator(seed)
            seeds = torch.randint(0, 2**63 - 1, (rows,), generator=source)
            return Call((seeds, torch.randint(0, 2**31, (rows,), generator=source), vocab))

        return Case(
            op="gumbel",
            name=f"R{rows} V{vocab}",
            make_inputs=inputs,
            tolerance=ELEMENTARY,
            invariance=rows_alone(take_args(0, 1)),
            bytes=4 * rows * vocab,
            flops=60 * rows * vocab,
        )

    def argmax(rows: int, vocab: int) -> Case:
        def inputs(seed: int) -> Call:
            # Many equal values; every third row ends with a NaN, which is then the largest.
            logits = torch.randint(-9, 10, (rows, vocab), generator=generator(seed)).float()
            logits[2::3, -1] = torch.nan
            return Call((logits,))

        return Case(
            op="argmax",
            name=f"R{rows} V{vocab}",
            make_inputs=inputs,
            tolerance=EXACT,
            invariance=rows_alone(take_args(0)),
            bytes=4 * rows * vocab,
        )

    make: Callable[[int, int], Case]
    for make in (argmax, log_softmax, gumbel):
        yield from (make(rows, 1031) for rows in TOKENS)
        yield from (make(3, vocab) for vocab in (1, 16, 4099))
        yield make(6, 9001)
        yield make(2, 129_280)
