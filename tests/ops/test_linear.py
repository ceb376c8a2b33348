"""Matrix products: exact decoding of every byte, the documented lanes, rows that never see others."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bittrue.ops.cases_matrix import FORMATS, matrix_cases, random_weight
from bittrue.ops.check import check_case
from bittrue.ops.contracts import Weight
from bittrue.ops.cpu.library import available_isas, load_kernels
from bittrue.ops.cpu.matrix import dequantizer
from bittrue.ops.dispatch import select
from bittrue.ops.numeric import bitwise_equal
from bittrue.ops.ref.linear import dequantize, linear
from bittrue.ops.threads import set_threads

CPU = [select("cpu", isa=isa) for isa in available_isas()]
BEST = CPU[-1]
DEQUANTIZERS = [dequantize, *(dequantizer(load_kernels(isa)) for isa in available_isas())]


def use_threads(threads: int) -> None:
    set_threads(BEST, threads)


def scales(*exponents: int) -> Tensor:
    return torch.tensor([e + 127 for e in exponents], dtype=torch.uint8).view(torch.float8_e8m0fnu)


def e4m3(byte: int) -> float:
    """The value of one E4M3 byte, from the definition of the format."""
    sign, exponent, fraction = -1 if byte & 128 else 1, byte >> 3 & 15, byte & 7
    if exponent == 0:
        return sign * fraction * 2.0**-9
    return sign * (1 + fraction / 8) * 2.0 ** (exponent - 7)


@pytest.mark.parametrize("op", ["linear", "linears", "grouped_linear"])
def test_every_case_holds_on_every_implementation(op: str) -> None:
    for case in matrix_cases():
        if case.op == op:
            for result in check_case(case, select("reference"), CPU, use_threads):
                assert result.is_ok, f"{result.case}, {result.impl}: {result.detail}"


@pytest.mark.parametrize("decode", DEQUANTIZERS)
def test_all_fp8_bytes_decode_exactly(decode: Callable[[Weight], Tensor]) -> None:
    finite = [b for b in range(256) if b & 127 != 127]
    data = torch.tensor([finite], dtype=torch.uint8).view(torch.float8_e4m3fn)
    got = decode(Weight(data, scales(0, 0).view(1, 2), "fp8"))
    assert got[0].tolist() == [e4m3(b) for b in finite]
    assert math.copysign(1, got[0, finite.index(128)]) == -1  # the byte 0x80 is minus zero


@pytest.mark.parametrize("decode", DEQUANTIZERS)
def test_all_fp4_bytes_decode_exactly_low_nibble_first(decode: Callable[[Weight], Tensor]) -> None:
    data = torch.arange(256, dtype=torch.uint8).view(torch.int8).view(1, 256)
    got = decode(Weight(data, scales(*([0] * 16)).view(1, 16), "fp4"))
    sizes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    nibble = [*sizes, *(-s for s in sizes)]
    want = torch.tensor([[nibble[b & 15], nibble[b >> 4]] for b in range(256)]).view(1, 512)
    assert bitwise_equal(got, want) is None


@pytest.mark.parametrize("decode", DEQUANTIZERS)
@pytest.mark.parametrize("form", ["fp8", "fp4"])
def test_all_scale_bytes_decode_exactly(decode: Callable[[Weight], Tensor], form: str) -> None:
    group = 128 if form == "fp8" else 32
    scale = torch.arange(255, dtype=torch.uint8).view(1, 255).view(torch.float8_e8m0fnu)
    if form == "fp8":
        data = torch.full((1, group * 255), 0.75).to(torch.float8_e4m3fn)
    else:
        data = torch.full((1, group * 255 // 2), 0x33, dtype=torch.int8)  # two times 1.5
    got = decode(Weight(data, scale, form))  # type: ignore[arg-type]
    value = 0.75 if form == "fp8" else 1.5
    want = torch.tensor([value * 2.0 ** (b - 127) for b in range(255)], dtype=torch.float64)
    assert torch.equal(got.double(), want.repeat_interleave(group).view(1, -1))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(130, 260), (7, 34), (129, 1024)])
def test_kernels_decode_as_the_reference(form: str, shape: tuple[int, int]) -> None:
    weight = random_weight(form, *shape, torch.Generator().manual_seed(4))  # type: ignore[arg-type]
    for decode in DEQUANTIZERS[1:]:
        assert bitwise_equal(decode(weight), dequantize(weight)) is None


def test_the_sum_is_sixteen_fused_lanes_and_a_tree() -> None:
    """The definition in float64, where a product of f32 is exact (and these sums round as in one step)."""
    source = torch.Generator().manual_seed(5)
    x, w = torch.randn(1, 100, generator=source), torch.randn(1, 100, generator=source)
    lanes = torch.zeros(16)
    for k in range(0, 112, 16):
        for lane in range(16):
            if k + lane < 100:
                exact = x[0, k + lane].double() * w[0, k + lane].double() + lanes[lane].double()
                lanes[lane] = exact.float()
    for s in (8, 4, 2, 1):
        lanes = lanes[:s] + lanes[s : 2 * s]
    for table in CPU:
        assert bitwise_equal(table.linear(x, Weight(w, None, "f32"))[0], lanes) is None


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("act", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_every_batch_size(form: str, act: torch.dtype) -> None:
    source = torch.Generator().manual_seed(6)
    weight = random_weight(form, 150, 192, source)  # type: ignore[arg-type]
    x = torch.randn(600, 192, generator=source).to(act)  # more rows than one pass takes
    use_threads(2)
    full = BEST.linear(x, weight)
    for n in (1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 17, 33):
        assert bitwise_equal(BEST.linear(x[:n].contiguous(), weight), full[:n]) is None
        assert bitwise_equal(BEST.linear(x[-n:].contiguous(), weight), full[-n:]) is None


@pytest.mark.parametrize("form", FORMATS)
def test_stored_formats_give_the_bits_of_their_decoded_matrix(form: str) -> None:
    source = torch.Generator().manual_seed(7)
    weight = random_weight(form, 140, 200, source)  # type: ignore[arg-type]
    plain = Weight(dequantize(weight), None, "f32")
    for rows in (1, 3, 9, 40):
        x = torch.randn(rows, 200, generator=source)
        for table in CPU:
            assert bitwise_equal(table.linear(x, weight), table.linear(x, plain)) is None


@pytest.mark.parametrize("form", ["fp8", "fp4"])
@pytest.mark.parametrize("rows", [1, 9, 40])
def test_extreme_scales_give_the_bits_of_the_decoded_matrix(form: str, rows: int) -> None:
    """Scale bytes 0 and 254 and their neighbours: subnormal weights, infinite ones, and no product that
    overflows on the way to a finite one."""
    source = torch.Generator().manual_seed(16)
    weight = random_weight(form, 130, 512, source)  # type: ignore[arg-type]
    assert weight.scale is not None
    extremes = torch.tensor([0, 1, 2, 245, 246, 247, 248, 253, 254], dtype=torch.uint8)
    count = weight.scale.numel()
    picked = extremes[torch.randint(0, 9, (count,), generator=source)].view(weight.scale.shape)
    weight = Weight(weight.data, picked.view(torch.float8_e8m0fnu), weight.format)
    x = torch.randn(rows, 512, generator=source) * 2.0**-20
    plain = Weight(dequantize(weight), None, "f32")
    for table in CPU:
        got, want = table.linear(x, weight), table.linear(x, plain)
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.parametrize("table", [select("reference"), *CPU])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rows", [1, 6, 20])
def test_quantised_input_is_that_of_quant_fp8_for_quantised_weights_only(table, form: str, rows: int) -> None:
    source = torch.Generator().manual_seed(13)
    weight = random_weight(form, 30, 200, source)  # type: ignore[arg-type]
    x = torch.randn(rows, 200, generator=source).bfloat16()
    got = table.linear(x, weight, quantize=True)
    x8 = table.quant_fp8(x, 128)
    assert bitwise_equal(got, table.linear(x8 if form in ("fp8", "fp4") else x, weight)) is None
    assert (bitwise_equal(got, table.linear(x, weight)) is not None) == (form in ("fp8", "fp4"))


@pytest.mark.parametrize("table", CPU)
@pytest.mark.parametrize("rows", [1, 8, 21])
def test_many_products_of_one_input_are_the_single_products(table, rows: int) -> None:
    source = torch.Generator().manual_seed(14)
    x = torch.randn(rows, 320, generator=source).bfloat16()
    wide = torch.float32
    parts = [
        ("fp8", 130, True, None),
        ("fp4", 60, True, None),
        ("fp4", 5, False, wide),
        ("f32", 24, False, wide),
    ]
    parts += [("bf16", 77, True, None), ("fp8", 9, False, None)]
    weights = tuple(random_weight(form, size, 320, source) for form, size, _, _ in parts)  # type: ignore[arg-type]
    quantize, dtypes = tuple(p[2] for p in parts), tuple(p[3] for p in parts)
    got = table.linears(x, weights, quantize=quantize, out_dtypes=dtypes)
    for out, weight, is_quantized, dtype in zip(got, weights, quantize, dtypes, strict=True):
        want = table.linear(x, weight, quantize=is_quantized, out_dtype=dtype)
        assert bitwise_equal(out, want) is None


def test_captured_products_read_the_rows_of_each_replay() -> None:
    source = torch.Generator().manual_seed(15)
    weights = tuple(random_weight(form, 40, 96, source) for form in FORMATS)
    call = {"quantize": (True,) * 4, "out_dtypes": (None,) * 4}
    x = torch.zeros(3, 96)
    assert BEST.capture is not None
    captured = BEST.capture(lambda ops: ops.linears(x, weights, **call))
    x.copy_(torch.randn(3, 96, generator=source))
    for got, want in zip(captured.replay(), BEST.linears(x, weights, **call), strict=True):
        assert bitwise_equal(got, want) is None


def test_groups_give_the_bits_of_separate_products() -> None:
    source = torch.Generator().manual_seed(8)
    weight = random_weight("f32", 3 * 20, 48, source)
    x = torch.randn(6, 3, 48, generator=source)
    got = BEST.grouped_linear(x, weight)
    for g in range(3):
        part = Weight(weight.data[g * 20 : (g + 1) * 20].contiguous(), None, "f32")
        assert bitwise_equal(got[:, g].contiguous(), BEST.linear(x[:, g].contiguous(), part)) is None


def test_a_wide_output_is_not_rounded_to_the_activation_dtype() -> None:
    source = torch.Generator().manual_seed(9)
    weight = random_weight("bf16", 30, 64, source)
    x = torch.randn(5, 64, generator=source).bfloat16()
    wide = BEST.linear(x, weight, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert bitwise_equal(wide.bfloat16(), BEST.linear(x, weight)) is None
    assert bitwise_equal(wide, wide.bfloat16().float()) is not None


@pytest.mark.parametrize("table", CPU)
def test_nan_and_infinity_stay_in_their_row(table) -> None:
    weight = random_weight("f32", 20, 64, torch.Generator().manual_seed(10))
    x = torch.ones(6, 64)
    clean = table.linear(x, weight)
    x[2, 3], x[4, 5] = torch.nan, torch.inf
    got = table.linear(x, weight)
    assert got[2].isnan().all() and (got[4].isinf() | got[4].isnan()).all()
    assert bitwise_equal(got[[0, 1, 3, 5]], clean[[0, 1, 3, 5]]) is None


def test_wrong_arguments_are_refused_with_the_name_of_the_op() -> None:
    weight = random_weight("fp8", 20, 64, torch.Generator().manual_seed(11))
    with pytest.raises(ValueError, match="linear: weight takes 64 features, but the input has 60"):
        BEST.linear(torch.zeros(2, 60), weight)
    with pytest.raises(ValueError, match="linear: x must be float32 or bfloat16"):
        BEST.linear(torch.zeros(2, 64, dtype=torch.float64), weight)
    with pytest.raises(ValueError, match="linear: x must be contiguous"):
        BEST.linear(torch.zeros(64, 2).t(), weight)
    with pytest.raises(ValueError, match=r"weight.scale must have shape \[1, 1\]"):
        BEST.linear(torch.zeros(2, 64), Weight(weight.data, scales(0, 0).view(1, 2), "fp8"))
    with pytest.raises(ValueError, match="grouped_linear: 20 weight rows do not divide into 3 groups"):
        BEST.grouped_linear(torch.zeros(2, 3, 64), weight)
    with pytest.raises(ValueError, match=r"linears: weights\[1\] takes 60 features, but the input has 64"):
        narrow = Weight(torch.zeros(4, 60), None, "f32")
        BEST.linears(torch.zeros(2, 64), (weight, narrow), quantize=(False,) * 2, out_dtypes=(None,) * 2)


def test_reference_is_the_plain_product() -> None:
    source = torch.Generator().manual_seed(12)
    x, w = torch.randn(3, 50, generator=source), torch.randn(4, 50, generator=source)
    want = x.double() @ w.double().t()
    assert (linear(x, Weight(w, None, "f32")).double() - want).abs().max() < 1e-5
