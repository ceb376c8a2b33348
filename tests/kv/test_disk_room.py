"""The disk tier on disks that are full, small, read-only, failing or not ours."""

import errno
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from support.blobs import SPACE, chain

from bittrue.errors import ConfigError
from bittrue.kv import disk_room
from bittrue.kv.blob import HEADER_BYTES
from bittrue.kv.disk import DiskTier
from bittrue.obs.log import Log

REPOSITORY = Path(__file__).parents[2]
LAYOUT = b"layout".ljust(20)
DATA = bytes(1000)

# A child in a mount namespace of its own, with a real file system of one megabyte at ``root``.
PRELUDE = """
import io, json, os, subprocess, sys, time
from support.blobs import SPACE, chain, state
from bittrue.errors import BittrueError
from bittrue.kv.disk import DiskTier
from bittrue.kv.tiers import TierStore
from bittrue.obs.log import Log

root, story = sys.argv[1], io.StringIO()

def opened(budget=10 * 2**30):
    tier = DiskTier(root, budget_bytes=budget, layout=b"L" * 20, log=Log(story))
    assert tier.wait_scanned(10)
    return tier

def files():
    return sum(name.endswith(".kv") for _, _, names in os.walk(root) for name in names)

def free():
    disk = os.statvfs(root)
    return disk.f_bavail * disk.f_frsize

def tell(**facts):
    print(json.dumps({**facts, "story": story.getvalue()}))
"""


def on_a_small_disk(root: Path, script: str, *, options: str = "size=1m") -> dict[str, Any]:
    """Runs ``script`` with a tmpfs at ``root``, of 1 MiB; what it tells. Skips where users cannot mount."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("the system gives users no mount namespace of their own (unshare --user --mount)")
    mount = f'mount -t tmpfs -o {options},mode=755 tmpfs "{root}" && exec "$0" "$@"'
    command = [*unshare, "sh", "-c", mount, sys.executable, "-c", PRELUDE + script, str(root)]
    env = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/tests"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_a_budget_larger_than_the_disk_is_what_the_disk_has(tmp_path: Path) -> None:
    told = on_a_small_disk(
        tmp_path,
        """
tier = opened()
names = [state(SPACE, offset) for offset in range(100)]
for name in names:
    tier.write(SPACE, name, bytes(30000))
assert tier.read(SPACE, names[-1]) == bytes(30000)
tell(counters=tier.counters, free=free(), files=files(), first=tier.has(SPACE, names[0]))
""",
    )
    assert told["counters"]["disk.saved"] == 100 and told["counters"]["disk.write_failed"] == 0
    assert told["counters"]["disk.evicted"] == 100 - told["files"] > 50
    assert 40_000 < told["free"] < 120_000  # a twentieth is left for others
    assert not told["first"]
    assert told["story"].count("disk_cache_limited") == 1


def test_the_cache_gives_way_when_others_fill_the_disk(tmp_path: Path) -> None:
    told = on_a_small_disk(
        tmp_path,
        """
tier = opened()
names = [state(SPACE, offset) for offset in range(20)]
for name in names[:10]:
    assert tier.write(SPACE, name, bytes(30000))
others = os.open(root + "/others", os.O_WRONLY | os.O_CREAT)
try:
    while True:
        os.write(others, bytes(4096))
except OSError:
    full = free()
for name in names[10:]:
    assert tier.write(SPACE, name, bytes(30000))
tell(counters=tier.counters, full=full, free=free(), others=os.fstat(others).st_size, bytes=tier.num_bytes)
""",
    )
    assert told["full"] == 0 and told["free"] > 20_000
    assert told["counters"]["disk.write_failed"] == 0 and told["counters"]["disk.saved"] == 20
    assert told["bytes"] < 10 * 30_000 < told["others"]


def test_no_space_left_stops_writing_for_a_while_not_reading(tmp_path: Path) -> None:
    # Out of inodes: like a quota, it does not show in the free bytes.
    told = on_a_small_disk(
        tmp_path,
        """
tier = opened()
names = [state(SPACE, offset) for offset in range(100)]
saved = []
for name in names:
    if tier.write(SPACE, name, bytes(1000)):
        saved.append(name)
at_first = dict(tier.counters)
assert all(tier.read(SPACE, name) == bytes(1000) for name in saved)
left = os.listdir(root + "/v1/tmp")
time.sleep(1.1)
assert tier.write(SPACE, names[-1], bytes(1000)) and tier.write(SPACE, names[-2], bytes(1000))
tell(saved=len(saved), at_first=at_first, left=left, after=tier.counters, files=files(), free=free())
""",
        options="size=1m,nr_inodes=20",
    )
    assert 5 < told["saved"] < 20 and told["free"] > 500_000
    assert (told["at_first"]["disk.write_failed"], told["at_first"]["disk.evicted"]) == (1, 0)
    assert told["at_first"]["disk.dropped"] == 99 - told["saved"]
    assert told["left"] == []
    # From then on the oldest goes for the newest.
    assert told["after"]["disk.write_failed"] == 1 and told["after"]["disk.evicted"] == 2
    assert told["files"] == told["saved"]
    assert told["story"].count("disk_cache_write_failed") == 1
    assert told["story"].count("disk_cache_writes_again") == 1


def test_a_disk_that_becomes_read_only_is_read_and_not_flushed(tmp_path: Path) -> None:
    told = on_a_small_disk(
        tmp_path,
        """
pages = chain(6)
tier = opened()
store = TierStore(host_bytes=0, disk=tier, log=Log(story))
for page in pages[:3]:
    store.save(SPACE, page, bytes(1000))
assert store.drain(10)
subprocess.run(["mount", "-o", "remount,ro", root], check=True)
for page in pages[3:]:
    store.save(SPACE, page, bytes(1000))
assert store.drain(10)
fetch = store.fetch(SPACE, pages)
fetch.wait(10)
try:
    error = store.flush(None)
except BittrueError as raised:
    error = f"{type(raised).__name__}: {raised}"
counters = store.counters()
store.close()
again = opened()
tell(counters=counters, fetched=len(fetch.result), error=error, files=files(),
     after=again.read(SPACE, pages[2]) == bytes(1000), kept=again.num_bytes)
""",
    )
    assert told["fetched"] == 3
    assert told["error"].startswith("NotFlushed: 3 files") and "Read-only" in told["error"]
    assert told["files"] == 3 and told["after"] and told["kept"] == 3 * (1000 + HEADER_BYTES)
    assert told["counters"]["disk.write_failed"] == 1 and told["counters"]["disk.dropped"] == 2


def test_a_read_only_disk_without_a_cache_is_refused_at_the_start(tmp_path: Path) -> None:
    told = on_a_small_disk(
        tmp_path,
        """
subprocess.run(["mount", "-o", "remount,ro", root], check=True)
try:
    error = opened()
except BittrueError as raised:
    error = f"{type(raised).__name__}: {raised}"
tell(error=error)
""",
    )
    assert told["error"].startswith("ConfigError: the cache directory")
    assert "Read-only" in told["error"] and "--cache-dir" in told["error"]


AS_NOBODY = """
import io, json, os, sys
from support.blobs import SPACE, chain
from bittrue.errors import ConfigError
from bittrue.kv.disk import DiskTier
from bittrue.obs.log import Log

def attempt(root):
    try:
        tier = DiskTier(root, budget_bytes=2**20, layout=b"L" * 20, log=Log(io.StringIO()))
    except ConfigError as error:
        return str(error)
    read, wrote = tier.read(SPACE, chain(1)[0]), tier.write(SPACE, chain(2)[1], bytes(9))
    tier.close()
    return [read is not None, wrote]

top = sys.argv[1]
os.chmod(top, 0o755)
roots = {name: os.path.join(top, name) for name in ("full", "empty", "secret", "open", "theirs")}
for root in roots.values():
    os.mkdir(root)
tier = DiskTier(roots["full"], budget_bytes=2**20, layout=b"L" * 20, log=Log(io.StringIO()))
assert tier.write(SPACE, chain(1)[0], bytes(9))
tier.close()
for folder, _, _ in os.walk(roots["full"]):
    os.chmod(folder, 0o555)
for name, mode in {"empty": 0o555, "secret": 0, "open": 0o777}.items():
    os.chmod(roots[name], mode)
is_root = os.geteuid() == 0
if is_root:  # modes do not bind root, and nobody else can give a directory away
    os.chown(roots["theirs"], 12345, 12345)
    os.setuid(65534)
print(json.dumps({name: attempt(root) for name, root in roots.items() if is_root or name != "theirs"}))
"""


def test_directories_that_modes_and_owners_keep_from_us() -> None:
    env = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/tests"}
    with tempfile.TemporaryDirectory() as top:  # which others may enter, unlike pytest's
        command = [sys.executable, "-c", AS_NOBODY, top]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["full"] == [True, False]  # read, not written
    assert "cannot be written: Permission denied, and holds no cache" in told["empty"]
    assert "cannot be read: Permission denied" in told["secret"]
    assert "can be written by everybody (mode 777)" in told["open"]
    if os.geteuid() == 0:
        assert "belongs to user 12345, and this is user 65534" in told["theirs"]


@pytest.mark.parametrize("below", ["", "/below"])
def test_a_directory_that_is_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "cache").write_text("mine")
    with pytest.raises(
        ConfigError, match="is a file, or lies below one; name a directory of your own"
    ) as found:
        DiskTier(f"{tmp_path}/cache{below}", budget_bytes=1, layout=LAYOUT, log=Log(io.StringIO()))
    assert found.value.field == "cache_dir"
    assert (tmp_path / "cache").read_text() == "mine"


def test_a_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "a/b", budget_bytes=1, layout=LAYOUT, log=Log(io.StringIO()))
    tier.close()
    assert (tmp_path / "a/b").stat().st_mode & 0o777 == 0o700


def test_what_hangs_on_a_page_that_was_not_written_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = chain(2)
    tier = DiskTier(tmp_path, budget_bytes=2**20, layout=LAYOUT, log=Log(io.StringIO()))
    with monkeypatch.context() as patch:
        patch.setattr(disk_room, "_FIRST_PAUSE_S", 0.0)
        with monkeypatch.context() as disk:
            disk.setattr(os, "write", no_write)
            assert not tier.write(SPACE, first, DATA)
        assert not tier.write(SPACE, second, DATA)  # it could be, but not be reached
        assert tier.write(SPACE, first, DATA)
        assert tier.write(SPACE, second, DATA)
    tier.close()


def no_write(fd: int, data: bytes) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_pauses_double_until_a_write_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    story, page = io.StringIO(), chain(1)[0]
    tier = DiskTier(tmp_path, budget_bytes=2**20, layout=LAYOUT, log=Log(story))
    assert tier.wait_scanned(10)
    now = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(disk_room.time, "monotonic", lambda: now)
        real = os.write
        patch.setattr(os, "write", no_write)
        for pause_s in (1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300):
            assert not tier.write(SPACE, page, DATA)  # fails
            now += pause_s - 0.01
            assert not tier.write(SPACE, page, DATA)  # not tried
            now += 0.02
        patch.setattr(os, "write", real)
        assert tier.write(SPACE, page, DATA)
        assert tier.read(SPACE, page) == DATA
    tier.close()
    assert (tier.counters["disk.write_failed"], tier.counters["disk.dropped"]) == (11, 11)
    assert story.getvalue().count("disk_cache_write_failed") == 1
    assert story.getvalue().count("Input/output error") == 1
