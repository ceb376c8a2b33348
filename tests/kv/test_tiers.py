"""The tiers together: what is fetched is what was saved, or nothing, whatever happened in between."""

import io
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from support.blobs import OTHER_SPACE, SPACE, chain, state

from bittrue.errors import NotFlushed
from bittrue.kv.blob import HEADER_BYTES
from bittrue.kv.disk import DiskTier
from bittrue.kv.fetch import Fetch
from bittrue.kv.identity import BlobName
from bittrue.kv.tiers import TierStore
from bittrue.obs.log import Log

LAYOUT = b"layout".ljust(20)


def data_of(name: BlobName, num_bytes: int = 1000) -> bytes:
    """The content that goes with a name: same name, same content."""
    return Random(name.digest).randbytes(num_bytes)


@contextmanager
def tier_store(
    root: Path | None,
    *,
    host_bytes: int = 2**20,
    disk_bytes: int = 2**24,
    queue_bytes: int = 2**24,
    fetch_bytes: int = 2**24,
) -> Iterator[TierStore]:
    log = Log(io.StringIO())
    disk = None if root is None else DiskTier(root, budget_bytes=disk_bytes, layout=LAYOUT, log=log)
    store = TierStore(
        host_bytes=host_bytes, disk=disk, log=log, queue_bytes=queue_bytes, fetch_bytes=fetch_bytes
    )
    yield store
    store.close()


def save(store: TierStore, names: Sequence[BlobName], *, num_bytes: int = 1000) -> None:
    for name in names:
        store.save(SPACE, name, data_of(name, num_bytes))


def fetched(store: TierStore, names: Sequence[BlobName]) -> dict[BlobName, tuple[str, bytes]]:
    fetch = store.fetch(SPACE, names)
    fetch.wait(10)
    return fetch.result


def test_blobs_come_from_memory_at_once() -> None:
    pages = chain(5)
    with tier_store(None) as store:
        save(store, pages)
        fetch = store.fetch(SPACE, pages)
        assert fetch.done
        assert fetch.result == {page: ("host", data_of(page)) for page in pages}
        assert store.counters()["host.hit"] == 5
        assert store.sizes() == {"host": 5000, "disk": 0, "queue": 0, "fetch": 0}


def test_blobs_come_from_disk_after_a_restart_and_then_from_memory(tmp_path: Path) -> None:
    names = [*(pages := chain(20)), state(pages[-1].digest, 50)]
    with tier_store(tmp_path) as store:
        save(store, names)
    with tier_store(tmp_path) as store:
        assert {store.has(SPACE, name) for name in names} == {"disk"}
        assert fetched(store, names) == {name: ("disk", data_of(name)) for name in names}
        assert {store.has(SPACE, name) for name in names} == {"host"}
        assert fetched(store, names) == {name: ("host", data_of(name)) for name in names}
        assert (store.counters()["disk.hit"], store.counters()["host.hit"]) == (21, 21)


def test_without_memory_blobs_on_their_way_to_the_disk_are_found(tmp_path: Path) -> None:
    pages = chain(50)
    hanging = state(pages[-1].digest, 9)
    with tier_store(tmp_path, host_bytes=0) as store:
        save(store, [*pages, hanging], num_bytes=20_000)
        assert all(store.has(SPACE, name) for name in [*pages, hanging])
        assert store.states(SPACE, hanging.parent) == [(9, hanging.digest)]
        found = fetched(store, [*pages, hanging])
        assert {name: data for name, (_, data) in found.items()} == {
            name: data_of(name, 20_000) for name in [*pages, hanging]
        }
        assert store.drain(10)
        assert store.sizes()["queue"] == 0
        assert {store.has(SPACE, name) for name in pages} == {"disk"}


def test_states_of_memory_and_disk_are_listed_together_each_once(tmp_path: Path) -> None:
    with tier_store(tmp_path) as store:
        save(store, [state(SPACE, offset) for offset in (1, 2)])
    with tier_store(tmp_path) as store:
        save(store, [state(SPACE, offset) for offset in (2, 3)])
        names = sorted(store.states(SPACE, SPACE))
        assert names == [(offset, state(SPACE, offset).digest) for offset in (1, 2, 3)]
        assert store.states(OTHER_SPACE, SPACE) == []


def test_a_fetch_ends_at_the_first_missing_page(tmp_path: Path) -> None:
    pages = chain(30)
    names = [*pages, state(pages[-1].digest, 3)]
    with tier_store(tmp_path) as store:
        save(store, names)
    (tmp_path / "v1" / path_of(pages[12])).unlink()
    with tier_store(tmp_path) as store:
        fetch = store.fetch(SPACE, names)
        fetch.wait(10)
        assert list(fetch.result) == pages[:12]
        assert fetch.rest == ()
    with tier_store(None) as store:
        save(store, [*pages[:3], *pages[4:]])
        assert list(fetched(store, pages)) == pages[:3]


def path_of(page: BlobName) -> str:
    place = page.digest.hex()
    return f"{SPACE.hex()}/{place[:2]}/{place}/page-{page.parent.hex()}.kv"


def test_a_missing_state_leaves_the_pages(tmp_path: Path) -> None:
    pages = chain(4)
    with tier_store(tmp_path, host_bytes=0) as store:
        save(store, pages)
        assert store.drain(10)
        assert list(fetched(store, [*pages, state(pages[-1].digest, 3)])) == pages


def test_fetches_share_the_bytes_in_flight_and_get_through_in_parts(tmp_path: Path) -> None:
    pages, size = chain(40), 1000 + HEADER_BYTES
    with tier_store(tmp_path, host_bytes=0, fetch_bytes=10 * size) as store:
        save(store, pages)
        assert store.drain(10)
        first = store.fetch(SPACE, pages)
        first.wait(10)
        assert list(first.result) == pages[:10] and first.rest == tuple(pages[10:])
        assert store.sizes()["fetch"] == 10 * size
        second = store.fetch(SPACE, pages)  # beside it: one, so that it gets on
        second.wait(10)
        assert list(second.result) == pages[:1] and second.rest == tuple(pages[1:])
        first.release()
        del second
        assert store.sizes()["fetch"] == 0
        rest, parts = tuple(pages), []
        while rest:
            fetch = store.fetch(SPACE, rest)
            fetch.wait(10)
            parts.append(len(fetch.result))
            rest = fetch.rest
            del fetch
        assert parts == [10, 10, 10, 10]


def test_a_fetch_given_up_reads_no_further_and_holds_nothing(tmp_path: Path) -> None:
    pages = chain(200)
    with tier_store(tmp_path, host_bytes=0) as store:
        save(store, pages)
        assert store.drain(10)
        fetch = store.fetch(SPACE, pages)
        fetch.release()
        fetch.wait(10)
        assert fetch.result == {} and fetch.rest == ()
        assert fetch.claim() is None
        assert store.sizes()["fetch"] == 0


def test_a_full_queue_drops_what_does_not_fit_and_what_hangs_on_it(tmp_path: Path) -> None:
    pages = chain(60)
    with tier_store(tmp_path, host_bytes=0, queue_bytes=100_000) as store:
        data = bytes(20_000)
        for page in pages:
            store.save(SPACE, page, data)
        assert store.drain(10)
        on_disk = [store.has(SPACE, page) == "disk" for page in pages]
        length = on_disk.index(False) if False in on_disk else 60
        assert length >= 5 and not any(on_disk[length:])  # the beginning, without a gap
        counters = store.counters()
        assert counters["disk.saved"] == length and counters["disk.dropped"] == 60 - length
        assert counters["disk.dropped"] > 0


def test_a_chain_larger_than_the_disk_keeps_its_beginning(tmp_path: Path) -> None:
    pages = chain(30)
    with tier_store(tmp_path, host_bytes=0, disk_bytes=12 * (1000 + HEADER_BYTES)) as store:
        save(store, pages)
        assert store.drain(10)
        assert list(fetched(store, pages)) == pages[:12]


def test_a_device_hit_keeps_the_copies_behind_it(tmp_path: Path) -> None:
    size = 1000 + HEADER_BYTES
    names = [state(SPACE, offset) for offset in range(6)]
    with tier_store(tmp_path, host_bytes=3000, disk_bytes=3 * size) as store:
        save(store, names[:3])
        assert store.drain(10)
        store.touch(SPACE, names[0])
        save(store, names[3:5])
        assert store.drain(10)
        assert [name for name in names if store.has(SPACE, name) == "host"] == [names[0], *names[3:5]]
        assert sorted(path.name[6:9] for path in tmp_path.rglob("*.kv")) == ["000", "003", "004"]


def test_a_flush_leaves_nothing_of_a_namespace_anywhere(tmp_path: Path) -> None:
    pages = chain(40)
    with tier_store(tmp_path) as store:
        save(store, pages[:20])
        store.save(OTHER_SPACE, state(OTHER_SPACE, 1), b"other")
        assert store.drain(10)
        save(store, pages[20:])  # perhaps still waiting for the disk
        removed = store.flush(SPACE)
        assert removed["host"] == 40 and removed["disk"] >= 20
        assert store.drain(10)
        assert not any(store.has(SPACE, page) for page in pages)
        assert len(list(tmp_path.rglob("*.kv"))) == 1
        assert store.has(OTHER_SPACE, state(OTHER_SPACE, 1)) == "host"
        assert store.flush(None) == {"host": 1, "disk": 1}
        assert store.sizes() == {"host": 0, "disk": 0, "queue": 0, "fetch": 0}
        save(store, pages)
        assert store.drain(10)
        assert len(fetched(store, pages)) == 40


class Gate:
    """A system call that waits until it is let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.call = getattr(os, name)
        monkeypatch.setattr(os, name, self)

    def __call__(self, *arguments: object) -> object:
        self.reached.set()
        assert self.opened.wait(10)
        return self.call(*arguments)


def test_a_flush_ends_the_fetches_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = chain(10)
    with tier_store(tmp_path) as store:
        save(store, pages)
    with tier_store(tmp_path) as store:
        gate = Gate(monkeypatch, "pread")
        fetch = store.fetch(SPACE, pages)
        assert gate.reached.wait(10)
        assert store.flush(None)["disk"] == 10
        gate.opened.set()
        fetch.wait(10)
        assert fetch.result == {}
        assert store.sizes() == {"host": 0, "disk": 0, "queue": 0, "fetch": 0}


def test_a_flush_waits_for_the_write_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = chain(2)
    with tier_store(tmp_path) as store:
        gate = Gate(monkeypatch, "write")
        save(store, pages)
        assert gate.reached.wait(10)
        flush = threading.Thread(target=store.flush, args=(None,))
        flush.start()
        flush.join(0.05)
        assert flush.is_alive()
        gate.opened.set()
        flush.join(10)
        assert not any(store.has(SPACE, page) for page in pages)
        assert list(tmp_path.rglob("*.kv")) == []


def test_a_flush_that_leaves_a_file_says_so(tmp_path: Path) -> None:
    (page,) = chain(1)
    with tier_store(tmp_path) as store:
        save(store, [page])
        assert store.drain(10)
        path = tmp_path / "v1" / path_of(page)
        path.unlink()
        path.mkdir()  # what unlink cannot remove
        with pytest.raises(NotFlushed, match=r"1 files .* could not be removed \(0 were\)"):
            store.flush(None)
        assert store.has(SPACE, page) != "host"


def test_closing_ends_fetches_and_writes_what_is_queued(tmp_path: Path) -> None:
    pages = chain(100)
    with tier_store(tmp_path, host_bytes=0) as store:
        save(store, pages)
        assert store.drain(10)
        fetch = store.fetch(SPACE, pages)
    assert fetch.done and list(fetch.result) == pages[: len(fetch.result)]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kv-")]


def test_concurrent_fetches_and_saves_agree(tmp_path: Path) -> None:
    chains = [chain(30, first_token=1000 + index) for index in range(6)]
    budget = 60 * (3000 + HEADER_BYTES)  # a third of them
    with tier_store(tmp_path, host_bytes=40 * 3000, disk_bytes=budget, fetch_bytes=50_000) as store:
        for turn in range(4):
            fetches: list[Fetch] = []
            for pages in chains:
                save(store, pages[: 10 * (turn + 1)], num_bytes=3000)
                fetches.append(store.fetch(SPACE, pages))
            for pages, fetch in zip(chains, fetches, strict=True):
                fetch.wait(10)
                found = fetch.result
                assert list(found) == pages[: len(found)]
                assert all(data == data_of(name, 3000) for name, (_, data) in found.items())
        assert store.drain(10)
        assert store.sizes()["host"] <= 40 * 3000 and store.sizes()["disk"] <= budget


SPACES = (SPACE, OTHER_SPACE)
CHAINS = [chain(6, parent=space, first_token=first) for space in SPACES for first in (1, 2)]


class TiersAgainstADict(RuleBasedStateMachine):
    """Saves, fetches, restarts, flushes and damage in any order: a blob is what was saved, or missing."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.saved: dict[tuple[bytes, BlobName], bytes] = {}
        self.open(3000)

    def open(self, host_bytes: int) -> None:
        self.log = Log(io.StringIO())
        disk = DiskTier(self.folder.name, budget_bytes=9000, layout=LAYOUT, log=self.log)
        self.store = TierStore(host_bytes=host_bytes, disk=disk, log=self.log, fetch_bytes=2500)

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    @rule(which=st.integers(0, 3), length=st.integers(1, 6), offset=st.none() | st.integers(0, 127))
    def save(self, which: int, length: int, offset: int | None) -> None:
        space, pages = SPACES[which // 2], CHAINS[which][:length]
        for name in [*pages, *([] if offset is None else [state(pages[-1].digest, offset)])]:
            self.saved[space, name] = data_of(name, 300 + name.digest[0])
            self.store.save(space, name, self.saved[space, name])

    @rule(which=st.integers(0, 3), skipped=st.integers(0, 5), offset=st.none() | st.integers(0, 127))
    def fetch(self, which: int, skipped: int, offset: int | None) -> None:
        space, pages = SPACES[which // 2], CHAINS[which][skipped:]
        states = dict(self.store.states(space, pages[-1].digest))
        assert all(state(pages[-1].digest, at).digest == digest for at, digest in states.items())
        names = [*pages, *([] if offset is None else [state(pages[-1].digest, offset)])]
        fetch = self.store.fetch(space, names)
        fetch.wait(10)
        found = fetch.result
        for name, (tier, data) in found.items():
            assert tier in ("host", "disk") and data == self.saved[space, name]
        count = sum(name.kind == "page" for name in found)
        assert list(found)[:count] == pages[:count]
        assert count == len(pages) or len(found) == count
        fetch.release()

    @rule()
    def everything_saved_last_without_pressure_is_there(self) -> None:
        """A chain that fits is found whole right after it was saved."""
        pages = CHAINS[0][:3]
        self.store.flush(None)
        for name in pages:
            self.saved[SPACE, name] = data_of(name, 300 + name.digest[0])
            self.store.save(SPACE, name, self.saved[SPACE, name])
        assert all(self.store.has(SPACE, name) for name in pages)
        assert self.store.drain(10)
        assert all(self.store.has(SPACE, name) for name in pages)

    @rule(host_bytes=st.sampled_from([0, 1500, 10_000]))
    def restart(self, host_bytes: int) -> None:
        self.store.close()
        self.open(host_bytes)

    @rule(pick=st.integers(0, 10**6), at=st.integers(0, 10**6), how=st.sampled_from(["flip", "cut", "go"]))
    def damage(self, pick: int, at: int, how: str) -> None:
        assert self.store.drain(10)
        paths = sorted(Path(self.folder.name, "v1").rglob("*.kv"))
        if not paths:
            return
        path = paths[pick % len(paths)]
        file = bytearray(path.read_bytes())
        if how == "go":
            path.unlink()
        elif how == "cut":
            path.write_bytes(file[: at % (len(file) + 1)])
        elif file:
            file[at % len(file)] ^= 1 << at % 8
            path.write_bytes(file)

    @rule(space=st.sampled_from([None, *SPACES]))
    def flush(self, space: bytes | None) -> None:
        self.store.flush(space)
        for which, pages in enumerate(CHAINS):
            if space in (None, SPACES[which // 2]):
                assert not any(self.store.has(SPACES[which // 2], page) for page in pages)

    @rule()
    def settle(self) -> None:
        assert self.store.drain(10)
        assert self.store.sizes()["host"] <= 10_000 and self.store.sizes()["fetch"] == 0


def test_what_is_fetched_is_what_was_saved_or_nothing() -> None:
    run_state_machine_as_test(
        TiersAgainstADict, settings=settings(max_examples=25, stateful_step_count=30, deadline=None)
    )


def test_the_calling_thread_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    pages = chain(64)
    data = os.urandom(2**20)
    with tier_store(tmp_path, host_bytes=2**28, disk_bytes=2**28, queue_bytes=2**28) as store:
        started = time.perf_counter()
        for page in pages:
            store.save(SPACE, page, data)
        saved_s = time.perf_counter() - started
        is_queued = store.sizes()["queue"] > 0
        assert store.drain(30)
        drained_s = time.perf_counter() - started
    assert is_queued and saved_s < drained_s / 4
