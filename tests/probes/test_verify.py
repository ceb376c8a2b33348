"""`bittrue verify` holds on sound checkpoints, breaks on faulty engines, admits what it did not exercise."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from support.small import small_checkpoint

from bittrue.cli import verify as verb
from bittrue.engine import assembly
from bittrue.engine.engine import Engine
from bittrue.errors import UsageError
from bittrue.model.presets import make_checkpoint
from bittrue.ops.contracts import OpTable, Weight
from bittrue.ops.dispatch import select
from bittrue.probes.result import LAWS, LawResult, overall, summary
from bittrue.probes.verify import Options, law_numbers, probe_lengths, selection_length, verify_laws


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


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("verify") / "small")


def run_verb(
    model: Path, capsys: pytest.CaptureFixture[str], **options: object
) -> tuple[int, dict[str, dict[str, object]], dict[str, object]]:
    """(exit code, the rows by law, the whole document)."""
    code = verb.verify(model, json=True, rounds=1, **options)  # type: ignore[arg-type]
    document = json.loads(capsys.readouterr().out)
    return code, {row["law"]: row for row in document["laws"]}, document


@pytest.mark.parametrize("laws", [("L1", "L6", "L8"), pytest.param(tuple(LAWS), marks=pytest.mark.slow)])
def test_laws_hold_and_were_exercised(
    small: Path, capsys: pytest.CaptureFixture[str], laws: tuple[str, ...]
) -> None:
    code, rows, document = run_verb(small, capsys, max_tokens=330, laws=",".join(laws))
    assert (code, document["verdict"]) == (0, "holds")
    assert tuple(rows) == laws
    for law, row in rows.items():
        assert row["verdict"] == "holds" and row["positions"] > 0, law  # type: ignore[operator]
        assert set(LAWS[law].needs) <= set(row["exercised"]), law  # type: ignore[call-overload]


def test_what_was_not_exercised_is_inconclusive(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows, document = run_verb(small, capsys, max_tokens=20, laws="L1,L3")
    assert (code, document["verdict"]) == (3, "inconclusive")
    assert rows["L1"]["verdict"] == "holds"
    assert rows["L3"]["verdict"] == "inconclusive"
    assert "resumed, recompute" in rows["L3"]["missing"]  # type: ignore[operator]


def test_the_verb_fails_on_a_reduction_that_depends_on_the_batch(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "select", lambda *args, **options: split_by_shape(select(*args, **options)))
    code, rows, document = run_verb(small, capsys, max_tokens=70, laws="L1,L2")
    assert (code, document["verdict"]) == (1, "broken")
    assert all(row["verdict"] == "broken" for row in rows.values())
    assert "value at" in rows["L1"]["first_difference"]  # type: ignore[operator]


def test_the_table_names_what_was_exercised_and_what_was_not() -> None:
    results = [
        LawResult("L1", "a", 5, None, {"chunks": 3}),
        LawResult("L2", "b", 5, "value at [0]", {"batched sequences": 2}),
        LawResult("L7", "c", 5, None, {"kills": 0}),
    ]
    rows = summary(results)
    assert [row.verdict for row in rows] == ["holds", "broken", "inconclusive"]
    assert rows[1].first_difference == "b: value at [0]"
    assert rows[2].missing == ("kills",)
    assert overall(rows) == "broken" and overall([rows[0], rows[2]]) == "inconclusive"
    assert overall(rows[:1]) == "holds" and overall([]) == "inconclusive"
    table = verb.result_table(rows)
    assert table.row_count == 3


def test_laws_are_chosen_by_number(small: Path) -> None:
    assert law_numbers("l5, L3") == ("L3", "L5")
    for text in ("L9", "", "L3,prefix"):
        with pytest.raises(ValueError, match="is no law"):
            law_numbers(text)
    with pytest.raises(UsageError, match="--laws L9"):
        verb.verify(small, laws="L9")


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
    engine = Engine(model, kv_memory="256MiB", max_running=16, prefix_cache=False, log_level="error")
    laws = tuple(LAWS) if preset == "tiny" else ("L1", "L2", "L8")
    results = list(verify_laws(engine, Options(max_tokens=1000, rounds=1, laws=laws)))
    assert [row.verdict for row in summary(results)] == ["holds"] * len(laws), results
