"""A recorded step run again gives the same weights; a changed record, or other weights, do not pass."""

from pathlib import Path

import pytest
from test_rl_loop import STEPS, config, weights_after

from bittrue.cli.main import run as command
from bittrue.errors import CheckpointError
from bittrue.rl.records import Records


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("replayed") / "run"
    weights_after(config(), out)
    every_core = config(run={"threads": 0})  # of whichever machine replays
    (out / "run.json").write_text(every_core.model_dump_json())
    return out


def test_every_step_replays_to_the_same_bytes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = (1, STEPS - 1)  # the one before a checkpoint and the last
    assert command(["replay", str(run), *map(str, chosen)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"step {i}" for i in chosen]
    assert all("same weights" in line for line in lines)


def test_a_step_whose_weights_were_others_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = run / "steps.jsonl"
    before = steps.read_text()
    line = before.splitlines()[1]
    recorded = line.split('"masters_after": "')[1][:32]
    steps.write_text(before.replace(recorded, "0" * 32))
    try:
        assert command(["replay", str(run), "1"]) == 1
        assert "DIFFERENT weights" in capsys.readouterr().out
    finally:
        steps.write_text(before)


def test_a_record_that_was_changed_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = Records(run)
    path = records.path(1)
    before = path.read_bytes()
    try:
        path.write_bytes(before[:-9] + bytes([before[-9] ^ 1]) + before[-8:])
        with pytest.raises(CheckpointError, match="is not what was written"):
            records.read(1)
        path.write_bytes(records.path(0).read_bytes())  # whole, but another step's
        assert command(["replay", str(run), "1"]) == 2
        assert "is not the record the step was computed from" in capsys.readouterr().err
    finally:
        path.write_bytes(before)


def test_a_step_the_run_has_not_and_a_directory_that_is_no_run_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["replay", str(run), "99"]) == 2
    assert f"has no step 99; choose one of 0 to {STEPS - 1}" in capsys.readouterr().err
    assert command(["replay", str(tmp_path), "0"]) == 2
    assert "is no run of reinforcement learning" in capsys.readouterr().err
