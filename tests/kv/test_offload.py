"""Rows in the offload file are the rows of plain memory, and only a bounded part of them is in memory."""

import ctypes
import errno
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles.random_checkpoint import random_checkpoint
from support.models import make_runner, random_ids
from torch import Tensor

from bittrue.config.formats import ActDtype, Level
from bittrue.config.model import ModelConfig
from bittrue.engine.runner import Runner
from bittrue.errors import ConfigError, KVCorrupted
from bittrue.kv import offload
from bittrue.kv.layout import OFFLOAD_ALIGN, KVLayout, pages_for
from bittrue.kv.ledger import Ledger, StepBounds, memory_ledger
from bittrue.kv.offload import OS_PAGE_BYTES, OffloadFile
from bittrue.kv.pool import allocate
from bittrue.model.batch import Segment

LENGTHS = (700, 391, 260, 900)
NUM_PAGES = 64
MAX_DRAFT = 2


def rss(tensor: Tensor) -> int:
    """Resident bytes of the mapping that ``tensor`` lies in, as /proc/self/smaps has them."""
    address, inside = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(" ", 1)[0]
        if "-" in head:
            begin, end = (int(x, 16) for x in head.split("-"))
            inside = begin <= address < end
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the tensor lies in no mapping")


def layout_of(runner: Runner, level: Level, act: ActDtype) -> KVLayout:
    return KVLayout.of(runner.model.config, level=level, act=act, max_draft=MAX_DRAFT, offload=True)


def offloaded(runner: Runner, level: Level, act: ActDtype, directory: Path) -> tuple[Runner, OffloadFile]:
    """The same model over caches whose CSA rows lie in a file, a tenth of which may stay in memory."""
    layout = layout_of(runner, level, act)
    hot_bytes = NUM_PAGES * layout.offloaded_page_bytes // 10
    store = OffloadFile.create(directory, layout, pages=NUM_PAGES, hot_bytes=hot_bytes)
    caches = allocate(layout, pages=NUM_PAGES, slots=len(LENGTHS), allocator=store.allocator())
    for cache in caches:
        if cache.rows is not None:
            cache.rows.fill_(0xFF)
    return Runner(runner.model, caches), store


def random_steps(prompts: list[list[int]], seed: int) -> Iterator[list[Segment]]:
    """Chunks and decodes of all prompts in a random mix, in scattered pages."""
    rng = random.Random(seed)
    pages = rng.sample(range(NUM_PAGES), NUM_PAGES)
    tables = []
    for prompt in prompts:
        tables.append(tuple(pages[: pages_for(len(prompt))]))
        pages = pages[len(tables[-1]) :]
    done = [0] * len(prompts)
    while live := [i for i, prompt in enumerate(prompts) if done[i] < len(prompt)]:
        segments = []
        for i in rng.sample(live, rng.randint(1, len(live))):
            count = min(len(prompts[i]) - done[i], rng.choice((1, 1, 2, 50, 150)))
            tokens = prompts[i][done[i] : done[i] + count]
            fold = max(0, done[i] - MAX_DRAFT)
            segments.append(Segment(tokens, done[i], fold, i, tables[i]))
            done[i] += count
        yield segments


@pytest.mark.parametrize(
    ("precision", "level", "act"), [("f32", "maths", "f32"), ("fp4", "published", "bf16")]
)
def test_a_tenth_of_the_rows_in_memory_gives_the_same_bits(
    precision: str, level: Level, act: ActDtype, tmp_path: Path
) -> None:
    raw, tensors = random_checkpoint(7, precision=precision)
    plain = make_runner(
        raw, tensors, level=level, act=act, pages=NUM_PAGES, slots=len(LENGTHS), max_draft=MAX_DRAFT
    )
    runner, store = offloaded(plain, level, act, tmp_path)
    rows = next(c.rows for c in runner.caches if c.kind == "csa")
    assert rows is not None
    prompts = [random_ids(n, raw["vocab_size"], seed=n) for n in LENGTHS]
    most = 0
    for segments in random_steps(prompts, seed=1):
        expected = plain.forward(segments).clone()
        assert torch.equal(expected.view(torch.uint8), runner.forward(segments).view(torch.uint8))
        most = max(most, rss(rows))
        store.after_step([segment.page_ids for segment in segments])
        assert rss(rows) == store.resident_bytes() <= store.hot_bytes
    assert most > store.hot_bytes, "nothing ever had to go"
    for one, other in zip(plain.caches, runner.caches, strict=True):
        if one.rows is not None and other.rows is not None:
            assert torch.equal(one.rows, other.rows)


def a_layout(*, offload: bool = True, **overrides: object) -> KVLayout:
    raw, _ = random_checkpoint(1, **overrides)
    return KVLayout.of(ModelConfig.from_dict(raw), level="maths", act="f32", offload=offload)


def a_store(
    directory: Path, *, pages: int = 200, hot_bytes: int = 1 << 20
) -> tuple[OffloadFile, list[Tensor]]:
    """A file, and the rows of its CSA layers: 24 KiB a page."""
    store = OffloadFile.create(directory, a_layout(), pages=pages, hot_bytes=hot_bytes)
    caches = allocate(a_layout(), pages=pages, slots=2, allocator=store.allocator())
    rows = [cache.rows for cache in caches if cache.kind == "csa"]
    return store, [part for part in rows if part is not None]


def number(rows: Sequence[Tensor], pages: Sequence[int], first: int = 0) -> None:
    """Bytes that tell page and layer."""
    for layer, part in enumerate(rows):
        for page in pages:
            part[page] = (first + 7 * page + layer) % 251


def test_rows_survive_being_let_go_while_dirty_and_moves_work_on_them(tmp_path: Path) -> None:
    store, rows = a_store(tmp_path)
    for first in range(0, 200, 20):
        pages = range(first, first + 20)
        number(rows, pages)
        store.after_step([pages])
        assert rss(rows[0]) <= store.hot_bytes
    for page in range(0, 200, 2):
        for part in rows:
            part[page + 1].copy_(part[page])
        store.after_step([(page, page + 1)])
    for layer, part in enumerate(rows):
        for page in range(200):
            assert bool((part[page] == (7 * (page // 2 * 2) + layer) % 251).all()), (layer, page)


def test_pages_of_the_sequences_that_ran_last_stay_longest(tmp_path: Path) -> None:
    store, rows = a_store(tmp_path, hot_bytes=2 << 20)
    size = rows[0][0].nbytes
    old, recent = range(40), range(100, 120)
    number(rows, old)
    store.after_step([old])
    number(rows, recent)
    store.after_step([recent])
    number(rows, range(150, 190))
    store.after_step([recent, range(150, 190)])
    assert size % OS_PAGE_BYTES == 0
    kept = set((store.present_pages() * OS_PAGE_BYTES // size).tolist())
    assert set(recent) <= kept, "a page of a sequence that runs went before those of one that does not"
    assert not set(old) & kept


def test_a_step_without_faults_costs_no_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, rows = a_store(tmp_path, pages=4000, hot_bytes=64 << 20)
    pages = tuple(range(16))
    number(rows, pages)
    store.after_step([pages])
    monkeypatch.setattr(OffloadFile, "trim", lambda self: pytest.fail("measured"))
    for _ in range(20):
        int(rows[0][:16].sum())
        store.after_step([pages])


def test_both_ways_of_asking_the_kernel_agree(tmp_path: Path) -> None:
    store, rows = a_store(tmp_path, pages=2000, hot_bytes=1 << 30)
    generator = random.Random(3)
    for page in generator.sample(range(2000), 300):
        rows[generator.randrange(3)][page, generator.randrange(32)] = 1
    mapping = store.mapping
    read = offload.joined(offload.read_page_map(mapping))
    assert len(read) >= 300
    assert np.array_equal(read, store.present_pages())
    assert len(read) * OS_PAGE_BYTES == rss(rows[0]) == store.resident_bytes()


def test_layers_begin_where_no_fault_reaches_from_another() -> None:
    layout = a_layout()
    offsets = layout.offload_offsets(37)
    assert len(offsets) == 1 + sum(layer.kind == "csa" for layer in layout.layers)
    assert all(offset % OFFLOAD_ALIGN == 0 for offset in offsets)
    size = 37 * layout.layers[1].offloaded_page_bytes
    assert all(b - a >= size for a, b in pairwise(offsets))


def test_offload_buys_more_pages_for_the_same_memory() -> None:
    plain, off = a_layout(offload=False), a_layout()
    assert off.page_bytes + off.offloaded_page_bytes == plain.page_bytes
    assert off.slot_bytes == plain.slot_bytes
    sizes = [layout.fit(8 << 20, max_sequences=4, max_context=1 << 20)[0] for layout in (plain, off)]
    assert sizes[1] > 1.8 * sizes[0]


def test_the_ledger_counts_the_hot_set_and_names_the_file() -> None:
    raw, _ = random_checkpoint(1)
    config = ModelConfig.from_dict(raw)
    bounds = StepBounds(max_step_tokens=8, max_running=2, max_context=999, threads=1)

    def ledger(layout: KVLayout, hot: int) -> Ledger:
        return memory_ledger(
            layout, config, act="f32", pages=100, slots=3, weight_bytes=5, bounds=bounds, offload_hot=hot
        )

    off, plain = ledger(a_layout(), 1 << 20), ledger(a_layout(offload=False), 1 << 20)
    rows = 100 * a_layout().offloaded_page_bytes
    assert off.offload_file_bytes == a_layout().offload_file_bytes(100) >= rows
    assert off.lines["offload_hot"] == 1 << 20 and "offload_hot" not in plain.lines
    assert plain.total - off.total == rows - (1 << 20) and plain.offload_file_bytes == 0
    assert ledger(a_layout(), 1 << 40).lines["offload_hot"] == off.offload_file_bytes


# ---- what can go wrong -----------------------------------------------------------------------------------


def test_a_file_that_does_not_fit_is_refused_at_the_start(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(ConfigError, match="no room") as caught:
            a_store(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.field == "offload_dir" and "--kv-memory" in str(caught.value)
    disk = os.statvfs(tmp_path)
    too_many = disk.f_blocks * disk.f_frsize // a_layout().offloaded_page_bytes + 1
    with pytest.raises(ConfigError, match=r"no room for it \(\d+ are free\)"):
        a_store(tmp_path, pages=too_many)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["missing", "a file", "not mine"])
def test_a_directory_that_cannot_be_written_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    # Root may write anywhere but where nothing can be written.
    directory = Path("/proc/self") if name == "not mine" else tmp_path / name
    with pytest.raises(ConfigError, match="no offload file can be made") as caught:
        a_store(directory)
    assert caught.value.field == "offload_dir" and str(directory) in str(caught.value)


def test_a_model_without_such_rows_is_refused(tmp_path: Path) -> None:
    layout = a_layout(num_hidden_layers=2, compress_ratios=[0, 128, 0])
    with pytest.raises(ConfigError, match="no CSA rows"):
        OffloadFile.create(tmp_path, layout, pages=3, hot_bytes=1 << 20)


def test_a_disk_that_loses_what_was_let_go_is_no_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, rows = a_store(tmp_path)
    number(rows, range(200))
    store.after_step([range(200)])

    def broken(fd: int, start: int, size: int, what: int) -> int:
        ctypes.set_errno(errno.EIO)
        return -1

    monkeypatch.setattr(offload, "sync_file_range", broken)
    number(rows, range(200))
    with pytest.raises(KVCorrupted, match="Input/output error"):
        store.after_step([range(200)])


CHILD = """
    import sys, time
    sys.path[:0] = {path!r}
    from pathlib import Path
    from test_offload import a_store, number
    store, rows = a_store(Path(sys.argv[1]))
    number(rows, range(200))
    store.after_step([range(200)])
    print("ready", flush=True)
    time.sleep(60)
"""


def test_nothing_is_left_when_the_process_is_killed(tmp_path: Path) -> None:
    here = Path(__file__).parent
    code = textwrap.dedent(CHILD).format(path=[str(here), str(here.parent)])
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_closing_lets_everything_go_and_tensors_can_still_be_read(tmp_path: Path) -> None:
    store, rows = a_store(tmp_path)
    number(rows, range(10))
    store.close()
    assert rss(rows[0]) == 0
    assert int(rows[1][3, 0, 0]) == 22
