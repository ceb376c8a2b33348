"""A captured sequence of ops gives the bits of the direct calls, on whatever its inputs hold by then."""

import dataclasses

import pytest
import torch
from torch import Tensor

from bittrue.ops.contracts import OpTable, Weight
from bittrue.ops.cpu.capture import Workspace
from bittrue.ops.dispatch import select
from bittrue.ops.numeric import first_difference

OPS = select("cpu")


def some_ops(x: Tensor, norm: Tensor, matrix: Weight, ops: OpTable) -> tuple[Tensor, Tensor]:
    y = ops.linear(ops.rms_norm(x, norm, 1e-6), matrix, out_dtype=torch.float32)
    return y, ops.log_softmax(y.view(-1, 8))


def inputs() -> tuple[Tensor, Tensor, Weight]:
    generator = torch.Generator().manual_seed(0)
    matrix = Weight(torch.randn(24, 40, generator=generator), None, "f32")
    return torch.randn(5, 40, generator=generator), torch.rand(40, generator=generator), matrix


def test_replay_gives_the_bits_of_the_direct_calls_for_every_new_input() -> None:
    x, norm, matrix = inputs()
    assert OPS.capture is not None
    captured = OPS.capture(lambda ops: some_ops(x, norm, matrix, ops))
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        for got, want in zip(captured.replay(), some_ops(x, norm, matrix, OPS), strict=True):
            assert first_difference(got, want) is None


def test_two_captured_functions_share_memory_and_do_not_disturb_each_other() -> None:
    x, norm, matrix = inputs()
    assert OPS.capture is not None
    first = OPS.capture(lambda ops: some_ops(x, norm, matrix, ops))
    second = OPS.capture(lambda ops: ops.rms_norm(ops.rms_norm(x, norm, 1e-6), None, 1e-6))
    want = some_ops(x, norm, matrix, OPS)
    for _ in range(2):
        assert first_difference(first.replay()[1], want[1]) is None
        assert (
            first_difference(second.replay(), OPS.rms_norm(OPS.rms_norm(x, norm, 1e-6), None, 1e-6)) is None
        )


def test_captured_functions_that_feed_each_other_in_turns_need_inputs_of_their_own_memory() -> None:
    """As a step and its drafts: the results of one are overwritten by the next, its inputs are not."""
    x, norm, _ = inputs()
    assert OPS.capture is not None
    own = torch.empty_like(x)

    def forth(ops: OpTable) -> Tensor:
        return ops.rms_norm(ops.rms_norm(x, norm, 1e-6), norm, 1e-2)

    def back(ops: OpTable) -> Tensor:
        return ops.rms_norm(ops.rms_norm(ops.rms_norm(own, norm, 1.0), None, 1e-6), norm, 1.0)

    there, again = OPS.capture(forth), OPS.capture(back)
    overwritten = False
    for seed in range(4):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        result = there.replay()
        own.copy_(result)
        want = forth(OPS)
        assert first_difference(own, want) is None
        assert first_difference(again.replay(), back(OPS)) is None
        assert first_difference(own, want) is None
        overwritten |= first_difference(result, want) is not None
    assert overwritten, "results were left alone: let callers rely on it, and say so"


def test_arithmetic_outside_the_ops_is_refused_not_left_out() -> None:
    x, norm, _ = inputs()
    assert OPS.capture is not None
    with pytest.raises(RuntimeError, match="torch's mul"):
        OPS.capture(lambda ops: ops.rms_norm(x, norm, 1e-6) * 2)


def test_table_with_an_exchanged_op_does_not_capture_the_original() -> None:
    with pytest.raises(ValueError, match="with_ops"):
        dataclasses.replace(OPS, rms_norm=lambda x, weight, eps: x)
    assert OPS.with_ops(rms_norm=lambda x, weight, eps: x).capture is None


def test_workspace_gives_aligned_memory_that_does_not_overlap_until_rewound() -> None:
    workspace = Workspace()
    shapes = [(3,), (1 << 18,), (1 << 20, 3), (0,), (7, 5)]
    first = [workspace.take(shape, torch.float32) for shape in shapes]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in first if t.nbytes)
    assert all(start % 64 == 0 for start, _ in spans)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    held = workspace.num_bytes
    workspace.rewind()
    second = [workspace.take(shape, torch.float32) for shape in shapes]
    assert [t.data_ptr() for t in second] == [t.data_ptr() for t in first]
    assert workspace.num_bytes == held


def test_captures_that_grow_row_by_row_share_the_memory_of_the_largest() -> None:
    """As sequences join one by one: in blocks just large enough, each step would need another."""
    workspace, vocab, most = Workspace(), 129_280, 32
    for rows in range(1, most + 1):
        workspace.rewind()
        workspace.take((rows, vocab), torch.float32)
    assert workspace.num_bytes < 5 * most * vocab * 4


def test_memory_of_a_dropped_tensor_is_given_again_but_not_that_of_a_viewed_one() -> None:
    x, norm, _ = inputs()
    places: list[int] = []

    def chain(ops: OpTable) -> Tensor:
        kept = ops.rms_norm(x, norm, 1e-6).view(-1)
        y = ops.rms_norm(x, None, 1e-6)
        for _ in range(20):
            y = ops.rms_norm(y, norm, 1e-6)
            places.append(y.data_ptr())
        return kept

    assert OPS.capture is not None
    kept = OPS.capture(chain).replay()
    assert len(set(places)) == 2  # the input of a call and its output, in turn
    assert kept.data_ptr() not in places
    assert first_difference(kept, OPS.rms_norm(x, norm, 1e-6).view(-1)) is None


def test_timed_replay_names_every_call_and_gives_the_same_bits() -> None:
    x, norm, matrix = inputs()
    assert OPS.capture is not None
    captured = OPS.capture(lambda ops: some_ops(x, norm, matrix, ops))
    times = captured.time()
    assert [name for name, _ in times] == ["rms_norm", "linear", "log_softmax"]
    assert all(0 < seconds < 1 for _, seconds in times)
    want = some_ops(x, norm, matrix, OPS)
    assert all(first_difference(g, w) is None for g, w in zip(captured.result, want, strict=True))
