"""Event files for TensorBoard hold each step of metrics.jsonl once, under the same names."""

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from bittrue.errors import BackendUnavailable, CheckpointError
from bittrue.rl.tensorboard import TensorBoardWriter
from tests.support.rl_runs import metrics_of, write_lines


def events_of(path: Path) -> list[Any]:
    """Every event of a file: records of length, its checksum, bytes and theirs, little-endian."""
    data, found, place = path.read_bytes(), [], 0
    while place < len(data):
        head = data[place : place + 8]
        (size,) = struct.unpack("<Q", head)
        body = data[place + 12 : place + 12 + size]
        assert struct.unpack("<I", data[place + 8 : place + 12])[0] == masked_crc32c(head)
        assert struct.unpack("<I", data[place + 12 + size : place + 16 + size])[0] == masked_crc32c(body)
        found.append(Event.FromString(body))
        place += 16 + size
    return found


def scalars_of(directory: Path) -> list[tuple[int, dict[str, float]]]:
    """Step and scalars, in the order TensorBoard reads them; all purged that it would purge."""
    found: list[tuple[int, dict[str, float]]] = []
    for path in sorted(directory.iterdir()):
        for event in events_of(path):
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                found = [each for each in found if each[0] < event.step]
            if event.HasField("summary"):
                found.append((event.step, {v.tag: v.simple_value for v in event.summary.value}))
    return found


def scalars(step: int) -> dict[str, float]:
    values = metrics_of(step) | {"reward/pass@4": 0.5}
    del values["step"]
    return values


def test_steps_are_written_under_the_names_of_the_metrics(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path / "tb", metrics=tmp_path / "none.jsonl") as writer:
        for step in range(3):
            writer.append(step, scalars(step))
    found = scalars_of(tmp_path / "tb")
    assert [step for step, _ in found] == [0, 1, 2]
    for step, values in found:
        assert values == pytest.approx(scalars(step))


def test_a_step_is_there_before_the_writer_is_closed(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path / "tb", metrics=tmp_path / "none.jsonl")
    writer.append(0, {"reward/mean": 0.5})
    assert scalars_of(tmp_path / "tb") == [(0, {"reward/mean": 0.5})]
    writer.close()


def test_a_resumed_run_writes_no_step_twice(tmp_path: Path) -> None:
    metrics, directory = tmp_path / "metrics.jsonl", tmp_path / "tb"
    with TensorBoardWriter(directory, metrics=metrics) as writer:
        for step in range(5):
            writer.append(step, {"reward/mean": float(step)})
    write_lines(metrics, [{"step": step, "reward/mean": float(step)} for step in range(3)])  # cut
    with TensorBoardWriter(directory, metrics=metrics) as writer:
        for step in (3, 4, 5):
            writer.append(step, {"reward/mean": step + 0.5})
    assert scalars_of(directory) == [
        (step, {"reward/mean": step if step < 3 else step + 0.5}) for step in range(6)
    ]


def test_a_reader_that_watches_forgets_what_it_has_read(tmp_path: Path) -> None:
    """What it read of the old file, then all of the new one: the new one begins anew and sorts behind."""
    metrics, directory = tmp_path / "metrics.jsonl", tmp_path / "tb"
    names = []
    for _ in range(3):
        TensorBoardWriter(directory, metrics=metrics).close()
        *empty, path = sorted(directory.iterdir())  # a reader stands in the last one it has read
        assert [old.name for old in empty] == names[-1:]
        assert all(old.stat().st_size == 0 for old in empty)
        names.append(path.name)
        version, start = events_of(path)
        assert version.file_version == "brain.Event:2"
        assert start.session_log.status == SessionLog.START and start.step == 0
    assert names == sorted(set(names))


def test_events_are_made_again_from_the_metrics_alone(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    write_lines(metrics, [metrics_of(step) for step in range(4)])
    with metrics.open("a") as file:
        file.write('{"step": 4, "rew')  # a kill
    TensorBoardWriter(tmp_path / "tb", metrics=metrics).close()
    found = scalars_of(tmp_path / "tb")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()[:4]]
    assert [{"step": step} | values for step, values in found] == [pytest.approx(line) for line in lines]


def test_files_of_others_stay(tmp_path: Path) -> None:
    other = tmp_path / "tb" / "events.out.tfevents.1.somebody"
    other.parent.mkdir()
    other.write_bytes(b"theirs")
    TensorBoardWriter(other.parent, metrics=tmp_path / "none.jsonl").close()
    assert other.read_bytes() == b"theirs" and len(list(other.parent.iterdir())) == 2


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path / "tb", metrics=tmp_path / "none.jsonl") as writer:
        writer.append(0, {"parity/k3": float("nan"), "reward/mean": 1.0})
    assert scalars_of(tmp_path / "tb") == [(0, {"reward/mean": 1.0})]


def test_without_the_library_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(BackendUnavailable, match=r"pip install bittrue\[tensorboard\]"):
        TensorBoardWriter(tmp_path / "tb", metrics=tmp_path / "none.jsonl")
    assert not (tmp_path / "tb").exists()


def test_a_directory_that_cannot_be_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "tb").write_text("a file")
    with pytest.raises(CheckpointError, match=f"to {tmp_path / 'tb'}: File exists"):
        TensorBoardWriter(tmp_path / "tb", metrics=tmp_path / "none.jsonl")
