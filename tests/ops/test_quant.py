"""Quantisation: exact scales, rounding and bytes, against tables built here from the formats' definitions."""

import bisect
import math
from fractions import Fraction

import pytest
import torch

from bittrue.config.formats import RowFormat
from bittrue.ops.cpu.library import load_kernels
from bittrue.ops.cpu.vector import vector_ops

KV = RowFormat("fp8", 512, 64)
KEY = RowFormat("fp4", 128)


def e4m3_value(byte: int) -> float:
    """E4M3 (no infinities, one NaN per sign): sign, 4 exponent bits of bias 7, 3 mantissa bits."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return math.nan
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if byte & 128 else size


E4M3 = [e4m3_value(b) for b in range(127)]  # ascending, the index is the code
FP4_FLOOR = 6 * 2.0**-126
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def nearest_even(value: float, table: list[float]) -> float:
    """The nearest entry, of two equally near the one with the even code; the sign kept, also on zero."""
    code = bisect.bisect_right(table, abs(value)) - 1  # the entry below
    if code + 1 < len(table):
        middle = (table[code] + table[code + 1]) / 2  # exact in float64
        code += abs(value) > middle or (abs(value) == middle and code % 2 == 1)
    return math.copysign(table[code], value)


def least_power(amax: float, largest: int) -> Fraction:
    """The smallest power of two s with largest * s >= amax, by search."""
    exponent = -140
    while Fraction(largest) * Fraction(2) ** exponent < Fraction(amax):
        exponent += 1
    return Fraction(2) ** exponent


def quantised(values: list[float], floor: float, table: list[float]) -> list[float]:
    floor = torch.tensor(floor).item()
    scale = float(least_power(max(floor, *(abs(v) for v in values)), int(table[-1])))
    return [nearest_even(v / scale, table) * scale for v in values]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, zeros of different sign told apart."""
    return a.dtype == b.dtype and torch.equal(a, b) and torch.equal(torch.signbit(a), torch.signbit(b))


def neighbours(value: float) -> list[float]:
    below, above = torch.nextafter(torch.tensor([value, value]), torch.tensor([0.0, 1e38])).tolist()
    return [below, value, above]


def test_e4m3_bytes_have_their_value(ops):
    codes = torch.arange(256, dtype=torch.uint8)
    rows = torch.zeros(4, KV.bytes, dtype=torch.uint8)
    rows[:, :64] = codes.reshape(4, 64)
    rows[:, 576:583] = 127  # scale 1
    got = ops.unpack_rows(rows, KV)[:, :64].flatten()
    for byte in range(256):
        want = e4m3_value(byte)
        assert math.isnan(got[byte].item()) if math.isnan(want) else got[byte].item() == want
    assert torch.signbit(got[128]) and not torch.signbit(got[0])


def test_e4m3_rounds_to_nearest_even(ops):
    """Every value, every midpoint and the floats beside it; 448 in each group holds the scale at 1."""
    values = list(E4M3)
    for low, high in zip(E4M3, E4M3[1:], strict=False):
        values += neighbours((low + high) / 2)
    values += [-v for v in values]
    values += [0.0] * (-len(values) % 7)
    groups = torch.tensor(values).reshape(-1, 7)
    groups = torch.cat((groups, torch.full((groups.shape[0], 1), 448.0)), dim=1)
    want = [[nearest_even(v, E4M3) for v in row] for row in groups.tolist()]
    assert same_bits(ops.quant_fp8(groups, 8), torch.tensor(want))


@pytest.mark.parametrize(
    ("value", "want"),
    [(0.0, 0), (0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5.0, 4), (6.0, 6)],
)
def test_e2m1_ties_go_to_the_even_code(ops, value, want):
    for candidate in neighbours(value) if value else [0.0]:
        got = ops.quant_fp4(torch.tensor([[candidate, -candidate, 4.5]]), 4)[0]
        exact = nearest_even(candidate, E2M1)
        if candidate <= 6:
            assert got[:2].tolist() == [exact, -exact]
        if candidate == value:
            assert exact == want


@pytest.mark.parametrize("exponent", [-100, -30, -22, -3, 0, 1, 7, 60, 100])
@pytest.mark.parametrize(
    ("quant", "floor", "table"), [("quant_fp8", 1e-4, E4M3), ("quant_fp4", FP4_FLOOR, E2M1)]
)
def test_the_scale_exponent_is_rounded_up(ops, quant, floor, table, exponent):
    """At powers of two and largest * 2^k and the floats beside them: a rounded or logged exponent differs."""
    for amax in neighbours(2.0**exponent) + neighbours(table[-1] * 2.0**exponent):
        # The fifth is an odd subnormal of E4M3, which a scale twice as large cannot hold.
        row = [amax, -amax, amax / 3, amax * 0.7, amax * 3 * 2.0**-9 / 448, -amax / 17, 0.0, -0.0]
        row = torch.tensor(row).tolist()
        got = getattr(ops, quant)(torch.tensor([row]), 8)
        assert same_bits(got, torch.tensor([quantised(row, floor, table)]))


def test_small_groups_use_the_floor(ops):
    tiny = torch.tensor([[1e-5, -3e-5, 9e-5, 0.0]])
    want = torch.tensor([quantised(tiny[0].tolist(), 1e-4, E4M3)])
    assert same_bits(ops.quant_fp8(tiny, 4), want)
    assert same_bits(ops.quant_fp8(torch.zeros(2, 128), 128), torch.zeros(2, 128))
    assert ops.pack_rows(torch.zeros(1, 512), KV)[0, 576] == 127 - 22  # 1e-4 / 448 lies just under 2^-22
    least = torch.tensor([[2.0**-149, 2.0**-127, -(2.0**-126), 3 * 2.0**-126]])
    assert same_bits(ops.quant_fp4(least, 4), torch.tensor([quantised(least[0].tolist(), FP4_FLOOR, E2M1)]))
    assert ops.pack_rows(torch.zeros(1, 128), KEY)[0, 64] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "group"), [(7, 8), (48, 64), (100, 32), (128, 128), (129, 128), (448, 64)])
def test_random_rows_match_the_tables(ops, dim, group, dtype):
    x = torch.randn(2, dim, generator=torch.Generator().manual_seed(dim))
    x = (x * torch.logspace(-3, 3, dim)).to(dtype)
    parts = [(row, start) for row in range(2) for start in range(0, dim, group)]
    for quant, floor, table in ((ops.quant_fp8, 1e-4, E4M3), (ops.quant_fp4, FP4_FLOOR, E2M1)):
        got = quant(x, group)
        assert got.dtype == dtype and got.shape == x.shape
        for row, start in parts:
            part = x[row, start : start + group].float().tolist()
            want = torch.tensor(quantised(part, floor, table))
            assert same_bits(got[row, start : start + group].float(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantising_twice_changes_nothing(ops, dtype):
    x = (torch.randn(64, 128, generator=torch.Generator().manual_seed(5)) * 9).to(dtype)
    for quant, group in ((ops.quant_fp8, 128), (ops.quant_fp8, 64), (ops.quant_fp4, 32)):
        once = quant(x, group)
        assert same_bits(quant(once, group), once)


@pytest.mark.parametrize("n", [1, 2, 16, 32, 128, 512])
def test_hadamard_is_sylvesters_matrix(ops, n):
    matrix = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)]) / n**0.5
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(n))
    assert torch.allclose(ops.hadamard(x).double(), x.double() @ matrix.double(), atol=1e-6)
    assert torch.allclose(ops.hadamard(ops.hadamard(x)), x, atol=1e-6)
    assert torch.equal(ops.hadamard(x.bfloat16()), ops.hadamard(x.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("fmt", [KV, RowFormat("fp8", 64, 16), RowFormat("fp8", 160, 22)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_fp8_row_holds_its_quantised_vector(ops, fmt, dtype):
    x = (torch.randn(5, fmt.dim, generator=torch.Generator().manual_seed(6)) * 5).to(dtype)
    rows, plain = ops.pack_rows(x, fmt), fmt.dim - fmt.rope_dim
    assert rows.shape == (5, fmt.bytes) and rows.dtype == torch.uint8
    rope = x[:, plain:].bfloat16().contiguous()
    assert torch.equal(rows[:, plain : fmt.dim + fmt.rope_dim], rope.view(torch.uint8))
    assert (rows[:, fmt.dim + fmt.rope_dim + fmt.num_scales :] == 0).all()
    want = (ops.quant_fp8(x[:, :plain].contiguous(), 64).float(), rope.float())
    assert same_bits(ops.unpack_rows(rows, fmt), torch.cat(want, dim=1))


def test_a_kv_row_takes_584_bytes_and_a_key_68():
    assert (KV.bytes, KEY.bytes) == (584, 68)


def test_an_fp4_row_keeps_even_elements_in_the_low_nibble(ops):
    x = torch.zeros(1, 128)
    x[0, :4] = torch.tensor([6.0, -1.0, 0.5, 3.0])
    x[0, 32:34] = torch.tensor([-24.0, 4.0])
    row = ops.pack_rows(x, KEY)[0].tolist()
    assert row[:2] == [0xA7, 0x51] and row[16] == 0x2F
    assert row[64:] == [127, 129, 1, 1]


@pytest.mark.parametrize("dim", [32, 128, 80])
def test_an_fp4_row_holds_its_quantised_vector(ops, dim):
    x = torch.randn(5, dim, generator=torch.Generator().manual_seed(7))
    fmt = RowFormat("fp4", dim)
    assert same_bits(ops.unpack_rows(ops.pack_rows(x, fmt), fmt), ops.quant_fp4(x, 32))


def test_every_scale_byte_is_its_power(ops):
    keys = torch.zeros(255, 68, dtype=torch.uint8)
    keys[:, 0], keys[:, 64] = 0x2A, torch.arange(255, dtype=torch.uint8)  # -1 then 1
    got = ops.unpack_rows(keys, KEY)
    for byte in range(255):
        assert got[byte, :2].tolist() == [-(2.0 ** (byte - 127)), 2.0 ** (byte - 127)]


@pytest.mark.parametrize("kind", ["f32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_rows_hold_their_values(ops, kind, dtype):
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(8)).to(dtype)
    fmt = RowFormat(kind, 40)
    stored = x if kind == "f32" else x.bfloat16()
    assert torch.equal(ops.unpack_rows(ops.pack_rows(x, fmt), fmt), stored.float())


@pytest.mark.parametrize("fmt", [KV, KEY, RowFormat("f32", 24), RowFormat("bf16", 24)])
def test_rows_do_not_depend_on_each_other(ops, fmt):
    x = torch.randn(17, fmt.dim, generator=torch.Generator().manual_seed(9))
    rows = ops.pack_rows(x, fmt)
    assert torch.equal(rows, torch.cat([ops.pack_rows(row[None].clone(), fmt) for row in x]))
    paged = ops.unpack_rows(rows[:16].reshape(4, 4, -1), fmt)
    assert torch.equal(paged.flatten(0, 1), ops.unpack_rows(rows[:16].clone(), fmt))
    assert ops.pack_rows(x[:0], fmt).shape == (0, fmt.bytes)
    assert ops.unpack_rows(rows[:0], fmt).shape == (0, fmt.dim)


@pytest.mark.parametrize("fmt", [KV, KEY, RowFormat("f32", 24), RowFormat("bf16", 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_dtype", [torch.float32, torch.bfloat16])
def test_kv_rows_have_the_bytes_of_norm_rope_and_packing(ops, fmt, dtype, norm_dtype):
    generator = torch.Generator().manual_seed(10)
    kv = torch.randn(9, fmt.dim, generator=generator).to(dtype)
    norm = torch.randn(fmt.dim, generator=generator).to(norm_dtype)
    half = (fmt.rope_dim or 16) // 2
    cos, sin = torch.randn(9, half, generator=generator), torch.randn(9, half, generator=generator)
    turned = ops.rope(ops.rms_norm(kv, norm, 1e-6)[:, None], cos, sin, False)[:, 0].contiguous()
    assert torch.equal(ops.kv_rows(kv, norm, cos, sin, 1e-6, fmt), ops.pack_rows(turned, fmt))


def test_what_a_kernel_cannot_read_is_refused():
    ops = vector_ops(load_kernels())
    x = torch.zeros(4, 128)
    refused = {
        "hadamard: the last axis must be a power of two, not 96": lambda: ops["hadamard"](torch.zeros(4, 96)),
        r"quant_fp8: x must be float32 or bfloat16, not float16": lambda: ops["quant_fp8"](x.half(), 128),
        r"quant_fp8: x must be contiguous": lambda: ops["quant_fp8"](x.t(), 128),
        r"quant_fp4: group must be at least 1": lambda: ops["quant_fp4"](x, 0),
        r"pack_rows: x must have shape \[\*, 512\]": lambda: ops["pack_rows"](x, KV),
        r"unpack_rows: rows must have shape \[\*, 68\]": lambda: ops["unpack_rows"](x.byte(), KEY),
        r"hc_head: 1 to 8 streams, not 9": lambda: ops["hc_head"](
            torch.zeros(1, 9, 16),
            torch.zeros(9, 144),
            torch.zeros(9),
            torch.zeros(1),
            torch.ones(16),
            eps=0.0,
            norm_eps=1e-6,
        ),
        r"embed: token_ids must be int64": lambda: ops["embed"](torch.zeros(2), x, 4, torch.float32),
        r"kv_rows: 256 features to rotate, but kv has 128": lambda: ops["kv_rows"](
            x, torch.ones(128), x, x, 1e-6, KEY
        ),
        r"argmax: logits must have at least one column": lambda: ops["argmax"](torch.zeros(3, 0)),
        r"rms_norm: weight must have shape \[128\]": lambda: ops["rms_norm"](x, torch.ones(64), 1e-6),
        r"rope: 256 features to rotate, but x has 128": lambda: ops["rope"](
            x[:, None].contiguous(), x, x.clone(), False
        ),
        r"gumbel: positions must have shape \[2\]": lambda: ops["gumbel"](
            torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 8
        ),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()
