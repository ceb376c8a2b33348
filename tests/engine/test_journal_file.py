"""The journal on disk: what survives a process, torn and flipped bytes, a bounded size, full disks."""

import io
import os
import random
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bittrue.engine import journal as journal_module
from bittrue.engine.journal import Journal, KeptResponse, OpenResponse
from bittrue.engine.journal_file import MAGIC, SEGMENT_BYTES, framed, read_segment
from bittrue.engine.journal_records import Origin
from bittrue.engine.types import Request, SamplingParams, TokenEvent
from bittrue.errors import ConfigError
from bittrue.obs.log import Log
from bittrue.obs.metrics import Metrics


def origin(name: str, owner: str = "") -> Origin:
    return Origin(name, f"x-{name}", owner, "/v1/completions", 1_700_000_000)


def open_response(journal: Journal, name: str, num_sequences: int = 1, owner: str = "") -> None:
    requests = [
        Request(request_id=f"{name}/{i}", prompt=(1, 2), params=SamplingParams(seed=i))
        for i in range(num_sequences)
    ]
    journal.open(requests, origin(name, owner))


def tell(journal: Journal, name: str, *ids: int, finish: bool = False) -> None:
    journal.record(TokenEvent(request_id=name, token_ids=ids, finish_reason="stop" if finish else None))
    journal.flush()


def tokens_of(journal: Journal, name: str) -> list[list[int]]:
    found = journal.find(name, "")
    assert isinstance(found, OpenResponse)
    return [entry.tokens for entry in found.entries]


@contextmanager
def opened(directory: Path, **named: object) -> Iterator[Journal]:
    journal = Journal(directory=str(directory), keep_s=100, **named)  # type: ignore[arg-type]
    try:
        yield journal
    finally:
        journal.shut()


def crashed(directory: Path) -> Path:
    """A copy of the directory as a process that is killed now leaves it."""
    copy = directory.parent / f"{directory.name}-{random.random()}"
    copy.mkdir()
    for path in directory.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_a_killed_process_loses_nothing_that_was_told(tmp_path: Path) -> None:
    with opened(tmp_path / "j") as journal:
        open_response(journal, "a", 2)
        tell(journal, "a/0", 5, 6)
        tell(journal, "a/1", 7, finish=True)
        tell(journal, "a/0", 8)
        open_response(journal, "b")
        tell(journal, "b/0", 9, finish=True)
        journal.keep("b", 200, b'{"whole": 1}')
        left = crashed(tmp_path / "j")
    with opened(left) as again:
        assert tokens_of(again, "a") == [[5, 6, 8], [7]]
        (interrupted,) = again.interrupted()
        assert [entry.finish_reason for entry in interrupted.entries] == [None, "stop"]
        assert interrupted.entries[1].request.params.seed == 1
        for name in ("b", "x-b"):
            kept = again.find(name, "")
            assert isinstance(kept, KeptResponse)
            assert (kept.status, kept.body) == (200, b'{"whole": 1}')
        assert again.find("c", "") is None
        again.keep("a", 410, b"partial")
        twice = crashed(left)
    with opened(twice) as last:
        assert last.interrupted() == []
        assert [last.find(name, "").body for name in "ab"] == [b"partial", b'{"whole": 1}']  # type: ignore[union-attr]


def test_any_cut_of_the_file_loses_only_what_was_behind_it(tmp_path: Path) -> None:
    with opened(tmp_path / "j") as journal:
        open_response(journal, "a")
        for token in range(5):
            tell(journal, "a/0", token)
        (path,) = (tmp_path / "j").iterdir()
        data = path.read_bytes()
    seen = set()
    bodies, _ = read_segment(data)
    for cut in range(len(MAGIC), len(data)):
        got, num_bad = read_segment(data[:cut])
        assert got == bodies[: len(got)]
        assert num_bad + len(MAGIC) + sum(len(framed(body)) for body in got) == cut
    for cut in {*range(0, len(data), 11), *range(len(data) - 60, len(data), 2)}:
        directory = tmp_path / f"cut-{cut}"
        directory.mkdir()
        (directory / path.name).write_bytes(data[:cut])
        with opened(directory) as again:
            found = again.find("a", "")
            tokens = None if found is None else tuple(tokens_of(again, "a")[0])
            assert tokens is None or tokens == tuple(range(len(tokens)))
            seen.add(tokens)
            open_response(again, "later")  # and it goes on
            tell(again, "later/0", 3)
            left = crashed(directory)
        with opened(left) as last:
            assert tokens_of(last, "later") == [[3]]
    assert seen == {None, *(tuple(range(n)) for n in range(5))}


def test_a_flipped_byte_ends_its_segment_and_nothing_wrong_is_read() -> None:
    bodies = [bytes([i]) * (i + 1) for i in range(20)]
    data = MAGIC + b"".join(framed(body) for body in bodies)
    assert read_segment(data) == (bodies, 0)
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 0x10
        got, num_bad = read_segment(bytes(flipped))
        assert got == bodies[: len(got)]
        assert len(got) < len(bodies) and num_bad > 0
    zeros = data + bytes(4096)  # what a power cut may leave of a file that was growing
    assert read_segment(zeros) == (bodies, 4096)


def test_owners_see_their_own_only(tmp_path: Path) -> None:
    with opened(tmp_path / "j") as journal:
        for owner in ("k1", "k2"):
            open_response(journal, f"r-{owner}", owner=owner)
            journal.keep(f"r-{owner}", 200, owner.encode())
        assert journal.find("r-k1", "k2") is None
        assert journal.find("r-k1", "") is None
        assert journal.find("x-r-k1", "k2") is None
        assert journal.find("x-r-k1", "k1").body == b"k1"  # type: ignore[union-attr]


def test_what_has_expired_is_gone_from_memory_and_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path / "j") as journal:
        open_response(journal, "a")
        journal.keep("a", 200, b"secret body")
        now = time.time()
        monkeypatch.setattr(journal_module.time, "time", lambda: now + 99)
        journal.keep_house()
        assert journal.find("a", "") is not None
        monkeypatch.setattr(journal_module.time, "time", lambda: now + 101)
        assert journal.find("a", "") is None
        assert journal.find("x-a", "") is None
        journal.keep_house()
        data = b"".join(path.read_bytes() for path in (tmp_path / "j").iterdir())
        assert b"secret" not in data
        open_response(journal, "b")
        tell(journal, "b/0", 4)
        left = crashed(tmp_path / "j")
    with opened(left) as again:
        assert tokens_of(again, "b") == [[4]]


def test_kept_bodies_have_a_bound_and_the_oldest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "KEPT_BYTES", 1000)
    journal = Journal(keep_s=100)
    for number in range(30):
        open_response(journal, f"r{number}")
        journal.keep(f"r{number}", 200, bytes(99))
    assert [number for number in range(30) if journal.find(f"r{number}", "") is not None] == list(
        range(20, 30)
    )


@pytest.mark.parametrize("size", [100, 40_000])
def test_the_directory_stays_bounded_and_whole_while_streams_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 2000)
    monkeypatch.setattr(journal_module, "KEPT_BYTES", 50_000)
    rng = random.Random(size)
    with opened(tmp_path / "j") as journal:
        open_response(journal, "long")
        expected: list[int] = []
        most = 0
        for number in range(300):
            open_response(journal, f"r{number}")
            for token in range(rng.randrange(8)):
                tell(journal, f"r{number}/0", token)
                expected.append(token)
                tell(journal, "long/0", token)
            journal.keep(f"r{number}", 200, bytes(rng.randrange(size)))
            most = max(most, sum(path.stat().st_size for path in (tmp_path / "j").iterdir()))
        live = journal._live_bytes
        left = crashed(tmp_path / "j")
    assert most <= 2 * (50_000 + 5 * len(expected) * 3) + 5 * 2000 + size
    assert live > 0
    with opened(left) as again:
        assert tokens_of(again, "long") == [expected]
        assert again.find("r299", "") is not None
        assert [response.origin.response_id for response in again.interrupted()] == ["long"]


@contextmanager
def files_at_most(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to let files grow further, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_and_counted_and_the_journal_goes_on_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "_RETRY_S", 0.0)
    out, metrics = io.StringIO(), Metrics()
    with opened(tmp_path / "j", log=Log(out), metrics=metrics) as journal:
        open_response(journal, "a")
        tell(journal, "a/0", 5)
        with files_at_most(700):
            for token in range(50):
                tell(journal, "a/0", token)
            held = {path.name: path.read_bytes() for path in (tmp_path / "j").iterdir()}
            open_response(journal, "b")
            journal.keep("b", 200, b"body")
            journal.keep_house()
            assert tokens_of(journal, "a") == [[5, *range(50)]]
            assert journal.find("b", "") is not None
        partial = tmp_path / "partial"
        partial.mkdir()
        for name, data in held.items():
            (partial / name).write_bytes(data)
        assert out.getvalue().count(" ERROR   journal_failed ") >= 1
        assert "File too large" in out.getvalue()
        assert (metrics.registry.get_sample_value("bittrue_journal_errors_total") or 0) >= 1
        journal.keep_house()
        assert " journal_restored " in out.getvalue()
        tell(journal, "a/0", 77)
        left = crashed(tmp_path / "j")
    with opened(partial) as again:  # what had been written before the disk was full is whole
        tokens = tokens_of(again, "a")[0]
        assert 1 < len(tokens) < 51 and tokens == [5, *range(50)][: len(tokens)]
    with opened(left) as again:
        assert tokens_of(again, "a") == [[5, *range(50), 77]]
        assert again.find("b", "").body == b"body"  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["file", "no place", "full", "in use", "unknown records"])
def test_a_directory_that_cannot_be_used_is_a_config_error(tmp_path: Path, kind: str) -> None:
    directory = tmp_path / "j"
    with pytest.raises(ConfigError, match="journal_dir: ") as caught:
        if kind == "file":
            directory.write_text("")
            Journal(directory=str(directory), keep_s=1)
        elif kind == "no place":
            Journal(directory="/proc/self/journal", keep_s=1)
        elif kind == "full":
            with files_at_most(4):
                Journal(directory=str(directory), keep_s=1)
        elif kind == "in use":
            with opened(directory):
                Journal(directory=str(directory), keep_s=1)
        else:
            directory.mkdir()
            (directory / "00000001.journal").write_bytes(MAGIC + framed(b"\x91\xa4what"))
            Journal(directory=str(directory), keep_s=1)
    assert caught.value.field == "journal_dir"
    assert not [path for path in tmp_path.glob("j/*") if path.stat().st_size == 0]


def test_nothing_is_kept_where_nothing_is_to_be_kept(tmp_path: Path) -> None:
    journal = Journal(directory=str(tmp_path / "j"), keep_s=0)
    open_response(journal, "a")
    tell(journal, "a/0", 5)
    journal.keep("a", 200, b"body")
    assert journal.find("a", "") is None
    journal.shut()
    assert all(path.read_bytes() == MAGIC for path in (tmp_path / "j").iterdir())


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    with opened(tmp_path / "j"):
        assert (tmp_path / "j").stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / "j").iterdir()} == {0o600}
        assert os.listdir(tmp_path / "j") == ["00000001.journal"]
        assert SEGMENT_BYTES == 4 << 20
