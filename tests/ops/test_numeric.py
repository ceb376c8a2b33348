"""Comparison of tensors: what counts as equal, and which difference is named."""

import torch

from bittrue.ops.numeric import bitwise_equal, cosine, first_difference, max_ulp


def test_equal_tensors_have_no_difference() -> None:
    x = torch.tensor([[1.0, -0.0], [torch.nan, torch.inf]])
    assert bitwise_equal(x, x.clone()) is None
    assert bitwise_equal(torch.empty(0, 3), torch.empty(0, 3)) is None


def test_one_flipped_bit_is_found_and_named() -> None:
    x = torch.arange(12.0).view(3, 4) + 1
    y = x.clone()
    y.view(torch.int32)[1, 2] ^= 1
    y.view(torch.int32)[2, 0] ^= 1
    difference = bitwise_equal(x, y)
    assert difference is not None
    assert (difference.kind, difference.coordinate) == ("value", (1, 2))
    assert (difference.count, difference.total) == (2, 12)
    assert "[1, 2]" in str(difference) and difference.left == "7.0"


def test_zeros_of_two_signs_differ_in_bits_but_not_in_value() -> None:
    plus, minus = torch.tensor([0.0]), torch.tensor([-0.0])
    assert bitwise_equal(plus, minus) is not None
    assert first_difference(plus, minus, torch.zeros(1)) is None


def test_nan_and_infinity_are_compared_before_values() -> None:
    x, y = torch.tensor([1.0, torch.nan, 3.0]), torch.tensor([2.0, 5.0, 3.0])
    nan = first_difference(x, y, torch.full((3,), 10.0))
    assert nan is not None and (nan.kind, nan.coordinate) == ("nan", (1,))
    x, y = torch.tensor([1.0, torch.inf]), torch.tensor([2.0, -torch.inf])
    infinite = first_difference(x, y, torch.tensor(1e30))
    assert infinite is not None and (infinite.kind, infinite.coordinate) == ("inf", (1,))


def test_any_nan_equals_any_nan() -> None:
    x = torch.tensor([0x7FC00000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert bitwise_equal(x, x.flip(0)) is None


def test_allowed_error_is_inclusive_and_per_element() -> None:
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.5])
    assert first_difference(x, y, torch.tensor([0.5, 0.5])) is None
    difference = first_difference(x, y, torch.tensor([0.5, 0.4]))
    assert difference is not None and difference.coordinate == (1,)


def test_shape_and_dtype_come_first_and_integers_are_exact() -> None:
    shape = bitwise_equal(torch.zeros(2, 3), torch.zeros(3, 2))
    assert shape is not None and str(shape) == "shape [2, 3] against [3, 2]"
    dtype = bitwise_equal(torch.zeros(2), torch.zeros(2).bfloat16())
    assert dtype is not None and dtype.kind == "dtype"
    ids = first_difference(torch.tensor([1, 2]), torch.tensor([1, 3]), torch.tensor(5.0))
    assert ids is not None and ids.coordinate == (1,)


def test_scalars_can_be_compared() -> None:
    difference = bitwise_equal(torch.tensor(1.0), torch.tensor(2.0))
    assert difference is not None and difference.coordinate == ()


def test_ulp_counts_representable_values_across_zero() -> None:
    one = torch.tensor([1.0])
    assert max_ulp(one, torch.nextafter(one, torch.tensor([2.0]))) == 1
    assert max_ulp(torch.tensor([1e-45]), torch.tensor([-1e-45])) == 2
    assert max_ulp(torch.tensor([1.0]).bfloat16(), torch.tensor([1.0078125]).bfloat16()) == 1
    assert max_ulp(torch.empty(0), torch.empty(0)) == 0


def test_cosine_of_parallel_opposite_and_zero_tensors() -> None:
    x = torch.tensor([1.0, 2.0])
    assert abs(cosine(x, 3 * x) - 1) < 1e-12
    assert abs(cosine(x, -x) + 1) < 1e-12
    assert cosine(torch.zeros(2), torch.zeros(2)) == 1.0
    assert cosine(torch.zeros(2), x) == 0.0
