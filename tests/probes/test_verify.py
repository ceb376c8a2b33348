"""`bittrue verify` passes on every preset, and fails when a reduction depends on the batch."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bittrue.cli import verify as verb
from bittrue.engine import assembly
from bittrue.engine.engine import Engine
from bittrue.model.presets import make_checkpoint
from bittrue.ops.contracts import OpTable, Weight
from bittrue.ops.dispatch import select
from bittrue.probes.verify import probe_lengths, selection_length, verify_laws

LAWS = {"L1 chunking", "L2 batching", "L8 threads"}


def split_by_shape(honest: OpTable) -> OpTable:
    """A linear layer that sums in two halves when it has more than one row: a split chosen by shape."""

    def linear(
        x: torch.Tensor, weight: Weight, *, quantize: bool = False, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        if x.shape[0] == 1 or weight.format in ("fp8", "fp4"):
            return honest.linear(x, weight, quantize=quantize, out_dtype=out_dtype)
        half = x.shape[1] // 2
        parts = [
            honest.linear(
                x[:, part].contiguous(),
                dataclasses.replace(weight, data=weight.data[:, part].contiguous()),
                out_dtype=torch.float32,
            )
            for part in (slice(0, half), slice(half, None))
        ]
        return (parts[0] + parts[1]).to(out_dtype or x.dtype)

    return honest.with_ops(linear=linear)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("tiny", 0, "bf16", tmp_path_factory.mktemp("verify") / "tiny")


def run_verb(
    model: Path, capsys: pytest.CaptureFixture[str], **options: object
) -> tuple[int, dict[str, object]]:
    code = verb.verify(model, json=True, rounds=1, **options)  # type: ignore[arg-type]
    return code, json.loads(capsys.readouterr().out)


def test_the_verb_passes_on_a_sound_checkpoint(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = run_verb(tiny, capsys, max_tokens=70)
    assert code == 0 and document["holds"] is True
    rows = document["results"]
    assert {row["law"] for row in rows} == LAWS  # type: ignore[index,union-attr]
    assert all(row["num_positions"] > 0 and row["first_difference"] is None for row in rows)  # type: ignore


def test_the_verb_fails_on_a_reduction_that_depends_on_the_batch(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "select", lambda *args, **options: split_by_shape(select(*args, **options)))
    code, document = run_verb(tiny, capsys, max_tokens=70)
    assert code == 1 and document["holds"] is False
    broken = [row for row in document["results"] if row["first_difference"] is not None]  # type: ignore
    assert {"L1 chunking", "L2 batching"} <= {row["law"] for row in broken}
    assert all("value at" in row["first_difference"] or "token" in row["first_difference"] for row in broken)


def test_the_longest_prompt_makes_the_index_choose(tiny: Path) -> None:
    engine = Engine(tiny, kv_memory="32MiB", threads=1)
    longest = max(probe_lengths(engine, max_tokens=2400))
    assert longest == selection_length(engine) > 4 * engine.config.index_topk
    assert max(probe_lengths(engine, max_tokens=100)) == 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "precision"),
    [("tiny", "f32"), ("tiny", "fp8"), ("tiny", "fp4"), ("t256", "bf16"), ("t512h", "fp4"), ("s1024", "fp4")],
)
def test_every_preset_passes(preset: str, precision: str, tmp_path: Path) -> None:
    model = make_checkpoint(preset, 1, precision, tmp_path / preset)  # type: ignore[arg-type]
    engine = Engine(model, kv_memory="256MiB", max_running=16)
    results = list(verify_laws(engine, max_tokens=700, rounds=1, seed=0, threads=(1, 2)))
    assert {r.law for r in results} == LAWS
    assert [r for r in results if not r.holds] == []
