"""The indexer's choice: the exact best entries of each query, ties to the smaller id, whatever the batch."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cache_steps import (
    Part,
    f32_format,
    for_each_thread_count,
    garbage,
    gather,
    ops_under_test,
    page_tables,
    quarter_turns,
    step,
)
from torch import Tensor

from bittrue.config.formats import RowFormat
from bittrue.ops.contracts import Batch
from bittrue.ops.ref.quant import hadamard, pack_rows, quant_fp4, unpack_rows
from bittrue.ops.ref.rope import rope

CI, HEADS, ROPE = 64, 8, 16
FORMATS = {"f32": f32_format(CI), "bf16": RowFormat("bf16", CI), "fp4": RowFormat("fp4", CI)}


def key_pages(keys: Sequence[Tensor], tables: Tensor, fmt: RowFormat) -> Tensor:
    """Pages holding keys[q] [n, ci] of each sequence; 0xFF everywhere else, NaN in most formats."""
    pages = garbage(tables.numel(), 32, fmt.bytes, dtype=torch.uint8)
    for q, own in enumerate(keys):
        for i, row in enumerate(pack_rows(own, fmt)):
            pages[int(tables[q, i // 32]), i % 32] = row
    return pages


def small_integers(*shape: int, seed: int) -> Tensor:
    """Values -2..2: sums are exact, so scores tie often and every order of addition agrees."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def chosen_by_definition(q: Tensor, weights: Tensor, keys: Tensor, position: int, k: int) -> list[int]:
    """q [Hi, ci], weights [Hi], keys [n, ci]: ids by (score descending, id ascending), padded with -1."""
    visible = (position + 1) // 4
    scores = (weights.double()[:, None] * torch.relu(q.double() @ keys[:visible].double().T)).sum(0).tolist()
    best = sorted(range(visible), key=lambda i: (-scores[i], i))[:k]
    return sorted(best) + [-1] * (k - len(best))


def run(
    ops: dict[str, Callable[..., Any]],
    q: Sequence[Tensor],
    weights: Sequence[Tensor],
    pages: Tensor,
    tables: Tensor,
    parts: Sequence[Part],
    fmt: RowFormat,
    k: int,
) -> Tensor:
    return choose(ops, gather(q, parts), gather(weights, parts), step(parts, tables), pages, fmt, k)


def choose(
    ops: dict[str, Callable[..., Any]],
    q: Tensor,
    weights: Tensor,
    batch: Batch,
    pages: Tensor,
    fmt: RowFormat,
    k: int,
) -> Tensor:
    """The op for queries that reach the keys as ``q``: turned back, and transformed where the op does."""
    angles = quarter_turns(batch.positions, ROPE)
    if fmt.kind == "fp4":
        q = hadamard(q)  # its own inverse
    q = rope(q, *angles, True)
    return ops["index_topk"](q, weights * 4, batch, pages, fmt, *angles, k=k, weight_scale=0.25)


@pytest.mark.parametrize("ops", ops_under_test())
@pytest.mark.parametrize("name", ["f32", "bf16", "fp4"])
@pytest.mark.parametrize("k", [1, 6, 24, 64])
def test_picks_are_the_largest_scores_with_ties_to_the_smaller_id(ops, name, k):
    fmt, length = FORMATS[name], 263
    keys, tables = small_integers(length // 4, CI, seed=1), page_tables(1, 3)
    q, weights = small_integers(length, HEADS, CI, seed=2), small_integers(length, HEADS, seed=3)
    pages = key_pages([keys], tables, fmt)
    assert torch.equal(unpack_rows(pack_rows(keys, fmt), fmt), keys)
    found = run(ops, [q], [weights], pages, tables, [Part(0, 0, length)], fmt, k)
    assert found.dtype == torch.int32
    ties = 0
    for t in range(length):
        assert found[t].tolist() == chosen_by_definition(q[t], weights[t], keys, t, k)
        scores = (weights[t, :, None] * torch.relu(q[t] @ keys[: (t + 1) // 4].T)).sum(0)
        ties += int(scores.unique().numel() < scores.numel())
    assert ties > length // 2


@pytest.mark.parametrize("ops", ops_under_test())
def test_all_zero_scores_and_both_zeros_choose_the_first_entries(ops):
    fmt, tables = FORMATS["f32"], page_tables(1, 1)
    keys = torch.ones(32, CI)
    keys[::3] = 0.0
    pages = key_pages([keys], tables, fmt)
    q = -torch.ones(1, HEADS, CI)
    for sign in (1.0, -1.0):  # relu gives 0 everywhere; a negative head weight turns it into -0
        weights = torch.full((1, HEADS), sign)
        found = choose(ops, q, weights, step([Part(0, 127, 128)], tables), pages, fmt, 5)
        assert found.tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("ops", ops_under_test())
def test_an_entry_is_visible_from_its_last_token_on(ops):
    fmt, tables = FORMATS["f32"], page_tables(1, 2)
    pages = key_pages([torch.ones(64, CI)], tables, fmt)
    q, weights = torch.ones(256, HEADS, CI), torch.ones(256, HEADS)
    for t in (0, 2, 3, 4, 6, 7, 127, 130, 131, 254, 255):
        batch = step([Part(0, t, t + 1)], tables)
        found = choose(ops, q[t : t + 1], weights[t : t + 1], batch, pages, fmt, 64)
        num = (t + 1) // 4
        assert found.tolist() == [[*range(num), *[-1] * (64 - num)]]


@pytest.mark.parametrize("ops", ops_under_test())
@pytest.mark.parametrize("name", ["f32", "bf16", "fp4"])
def test_the_choice_of_a_token_does_not_depend_on_its_step(ops, name):
    fmt, k, lengths = FORMATS[name], 9, (260, 199, 131)
    generator = torch.Generator().manual_seed(4)
    tables = page_tables(3, 3)
    act = torch.float32 if name == "f32" else torch.bfloat16
    keys = [torch.randn(length // 4, CI, generator=generator).to(act) for length in lengths]
    q = [torch.randn(length, HEADS, CI, generator=generator).to(act) for length in lengths]
    if name == "fp4":
        q = [quant_fp4(x, 32) for x in q]
    weights = [torch.randn(length, HEADS, generator=generator) for length in lengths]
    pages = key_pages(keys, tables, fmt)
    alone = [run(ops, q, weights, pages, tables, [Part(s, 0, n)], fmt, k) for s, n in enumerate(lengths)]
    for parts in (
        [Part(2, 0, 131), Part(0, 0, 260), Part(1, 0, 199)],
        [Part(1, 37, 41), Part(0, 255, 256), Part(2, 100, 131)],
        *([Part(0, t, t + 1)] for t in (35, 36, 129, 259)),
    ):
        found = run(ops, q, weights, pages, tables, parts, fmt, k)
        assert torch.equal(found, gather(alone, parts))


@pytest.mark.parametrize("parts", [[Part(0, 16_383, 16_384)], [Part(0, 16_300, 16_340)]])
def test_threads_do_not_change_the_choice(parts):
    """One token splits its keys over the threads, many are split between them."""
    fmt, tables, generator = FORMATS["fp4"], page_tables(1, 128), torch.Generator().manual_seed(6)
    pages = key_pages([torch.randn(4096, CI, generator=generator)], tables, fmt)
    count = parts[0].end - parts[0].start
    q = quant_fp4(torch.randn(count, HEADS, CI, generator=generator), 32)
    args = (q, torch.randn(count, HEADS, generator=generator), step(parts, tables), pages, fmt, 100)
    one, *others = for_each_thread_count(lambda ops: choose(ops, *args))
    assert all(torch.equal(other, one) for other in others)


@pytest.mark.parametrize("ops", ops_under_test())
def test_no_tokens_no_choice(ops):
    fmt, tables = FORMATS["f32"], page_tables(1, 1)
    pages = key_pages([torch.ones(32, CI)], tables, fmt)
    found = choose(ops, torch.ones(0, HEADS, CI), torch.ones(0, HEADS), step([], tables), pages, fmt, 4)
    assert found.shape == (0, 4)
