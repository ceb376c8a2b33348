import json
import os
from pathlib import Path

import pytest
import torch
from support.small_run import no_room
from torch import Tensor

from bittrue.errors import CheckpointError, UsageError
from bittrue.train.checkpoint import (
    FACTS_FILE,
    TENSORS_FILE,
    Checkpoints,
    check_same,
    run_directory,
    write_file,
)

TENSORS = {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b.c": torch.tensor(7)}


def store(directory: Path, *, every: int = 10, keep: int = 2) -> Checkpoints:
    return Checkpoints(directory, every=every, keep=keep)


def filled(directory: Path, *steps: int) -> Checkpoints:
    checkpoints = store(directory)
    for step in steps:
        checkpoints.save(step, TENSORS, {"x": step})
    return checkpoints


def no_warning(fact: str) -> None:
    raise AssertionError(fact)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    path = store(tmp_path).save(120, TENSORS, {"note": ["x", 0.1]})
    assert names(tmp_path) == ["step-000120"]
    assert names(path) == [FACTS_FILE, TENSORS_FILE]
    found = store(tmp_path).newest(warn=no_warning)
    assert found is not None
    assert (found.step, found.path, found.facts["note"]) == (120, path, ["x", 0.1])
    assert {name: (t.dtype, t.tolist()) for name, t in found.tensors.items()} == {
        name: (t.dtype, t.tolist()) for name, t in TENSORS.items()
    }
    assert list(found.part("b")) == ["c"]


def test_there_may_be_none(tmp_path: Path) -> None:
    assert store(tmp_path).newest(warn=no_warning) is None


def test_the_newest_due_ones_stay_and_any_newer_one(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, 0, 10, 13, 20, 25)
    assert checkpoints.steps() == [10, 20, 25]
    checkpoints.save(30, TENSORS, {})
    assert checkpoints.steps() == [20, 30]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: flip(path / TENSORS_FILE, -1), "state.safetensors: its bytes are not those"),
        (lambda path: flip(path / TENSORS_FILE, 20), "state.safetensors: "),
        (lambda path: cut(path / TENSORS_FILE), "truncated"),
        (lambda path: cut(path / FACTS_FILE), "state.json: is not whole"),
        (lambda path: (path / FACTS_FILE).write_bytes(b"\xff\xfe"), "state.json: is not whole"),
        (lambda path: (path / FACTS_FILE).unlink(), "state.json: cannot be read"),
        (lambda path: (path / TENSORS_FILE).unlink(), "state.safetensors: cannot be read"),
        (
            lambda path: (path / FACTS_FILE).write_text((path / FACTS_FILE).read_text().replace("20", "21")),
            "state.json: its content is not what was written",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(
    tmp_path: Path, harm, message: str
) -> None:  # type: ignore[no-untyped-def]
    checkpoints = filled(tmp_path, 10, 20)
    harm(tmp_path / "step-000020")
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(20)
    told: list[str] = []
    found = checkpoints.newest(warn=told.append)
    assert found is not None and found.step == 10
    assert len(told) == 1 and "step-000020" in told[0] and "step-000010 is used instead" in told[0]


def test_where_none_is_whole_the_run_does_not_begin_anew(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, 10, 20)
    for step in (10, 20):
        flip(tmp_path / f"step-0000{step}" / TENSORS_FILE, -1)
    with pytest.raises(CheckpointError, match="holds 2 checkpoints and none can be read"):
        checkpoints.newest(warn=lambda fact: None)


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, 10, 20)
    flip(tmp_path / "step-000020" / TENSORS_FILE, -1)
    checkpoints.save(20, TENSORS, {"again": True})
    assert checkpoints.load(20).facts["again"] is True
    assert names(tmp_path) == ["step-000010", "step-000020"]


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, 10)
    big = {"a": torch.zeros(4096)}
    with no_room(8192), pytest.raises(CheckpointError) as caught:
        checkpoints.save(20, big, {})
    message = str(caught.value)
    assert "cannot write the checkpoint" in message and "step-000020" in message
    assert f"the last good checkpoint is {tmp_path / 'step-000010'}" in message
    assert names(tmp_path) == ["step-000010"]  # and nothing half written
    assert checkpoints.load(10).facts["x"] == 10


def test_a_full_disk_does_not_harm_the_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, 10)
    with no_room(8192), pytest.raises(CheckpointError):
        checkpoints.save(10, {"a": torch.zeros(4096)}, {})
    assert checkpoints.load(10).tensors["a"].shape == (2, 3)


def test_what_a_kill_left_is_cleaned(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, 10)
    for name in (".new-step-000020", ".old-step-000010"):
        (tmp_path / name).mkdir()
        (tmp_path / name / TENSORS_FILE).write_bytes(b"half")
    (tmp_path / ".lock").touch()
    checkpoints.clean()
    assert names(tmp_path) == [".lock", "step-000010"]


def test_later_checkpoints_go_when_their_course_is_given_up(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, 10, 20, 23)
    checkpoints.drop_after(10)
    assert checkpoints.steps() == [10]


def test_a_field_that_differs_is_named(tmp_path: Path) -> None:
    check_same(tmp_path, {"a": 1}, {"a": 1}, what="model", remedy="no")
    with pytest.raises(CheckpointError, match="another run file: optim.lr was 0.1, now it is 0.2; go away"):
        check_same(
            tmp_path, {"a": 1, "optim.lr": 0.1}, {"a": 1, "optim.lr": 0.2}, what="run file", remedy="go away"
        )
    with pytest.raises(CheckpointError, match="b was nothing, now it is 2"):
        check_same(tmp_path, {}, {"b": 2}, what="model", remedy="go away")


def test_one_process_at_a_time_trains_in_a_directory(tmp_path: Path) -> None:
    with run_directory(tmp_path / "run"), pytest.raises(UsageError, match="another process trains"):
        with run_directory(tmp_path / "run"):
            raise AssertionError("held twice")
    with run_directory(tmp_path / "run"):
        pass
    with pytest.raises(UsageError, match="cannot write /proc/none"), run_directory(Path("/proc/none")):
        raise AssertionError("nobody can write there")


def test_a_small_file_is_replaced_whole_or_not(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_file(path, "first")
    with no_room(1024), pytest.raises(CheckpointError, match="cannot write"):
        write_file(path, "x" * 4096)
    assert path.read_text() == "first"
    assert names(tmp_path) == ["run.json"]


def test_the_facts_are_json_that_a_person_can_read(tmp_path: Path) -> None:
    path = store(tmp_path).save(1, TENSORS, {"identity": {"optim.lr": 0.1}})
    facts = json.loads((path / FACTS_FILE).read_text())
    assert facts["identity"] == {"optim.lr": 0.1}
    assert os.path.getsize(path / TENSORS_FILE) > 0


def test_tensors_that_are_trained_can_be_saved(tmp_path: Path) -> None:
    leaf: Tensor = torch.ones(3, requires_grad=True)
    store(tmp_path).save(1, {"leaf": leaf}, {})
    assert store(tmp_path).load(1).tensors["leaf"].tolist() == [1.0, 1.0, 1.0]
