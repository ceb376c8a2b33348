"""Laws L1, L2 and L8 as properties: random chunkings, batches, rows and threads change no bit of any
logit."""

import pytest
import torch
from oracles.random_checkpoint import random_checkpoint
from support.models import make_runner

from bittrue.ops.contracts import OpTable, Weight
from bittrue.ops.dispatch import select
from bittrue.probes.laws import LawProbe
from bittrue.probes.result import LawResult

# Straddle the CSA ratio, the window, one and two pages, and where index top-k (16 rows = 64 tokens) starts
# to bite.
LENGTHS = (1, 2, 3, 7, 66, 127, 128, 129, 200, 257, 300)
LEVELS = {
    "maths-f32": ("f32", "maths", "f32"),
    "maths-bf16": ("bf16", "maths", "bf16"),
    "published-f32": ("f32", "published", "bf16"),
    "published-bf16": ("bf16", "published", "bf16"),
    "published-fp8": ("fp8", "published", "bf16"),
    "published-fp4": ("fp4", "published", "bf16"),
}
MINIMUM_POSITIONS = 20_000


def probe_of(variant: str, ops: OpTable | None = None, seed: int = 0) -> LawProbe:
    precision, level, act = LEVELS[variant]
    raw, tensors = random_checkpoint(7, precision=precision)
    runner = make_runner(raw, tensors, level=level, act=act, ops=ops, pages=24, slots=12)
    return LawProbe(runner, num_pages=24, num_slots=12, seed=seed)


def run_all(probe: LawProbe) -> list[LawResult]:
    prompts = probe.random_prompts(LENGTHS)
    results = list(probe.chunking(prompts, rounds=1))
    results += probe.batching(prompts, rounds=2)
    results += probe.threading(prompts[3:], counts=(2, 3))
    return results


@pytest.mark.parametrize("variant", LEVELS)
def test_no_bit_depends_on_chunks_batches_rows_or_threads(variant: str) -> None:
    results = run_all(probe_of(variant))
    broken = [r for r in results if not r.holds]
    assert not broken, broken[0]
    compared = sum(r.num_positions for r in results)
    assert compared * len(LEVELS) >= MINIMUM_POSITIONS, compared


def test_a_batch_dependent_reduction_is_caught() -> None:
    honest = select("cpu", threads=1)

    def by_shape(
        x: torch.Tensor, weight: Weight, *, quantize: bool = False, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        # What a library does: a lone row takes another path than a row of a batch.
        if x.shape[0] == 1:
            return honest.linear(x, weight, quantize=quantize, out_dtype=out_dtype)
        return (x.float() @ weight.data.float().T).to(out_dtype or x.dtype)

    probe = probe_of("maths-f32", honest.with_ops(linear=by_shape))
    prompts = probe.random_prompts((40, 130))
    assert any(not r.holds for r in probe.chunking(prompts, rounds=1))
    assert any(not r.holds for r in probe.batching(prompts, rounds=2))


def test_an_empty_comparison_does_not_count_as_holding() -> None:
    assert not LawResult("L1", "nothing", 0, None).holds
