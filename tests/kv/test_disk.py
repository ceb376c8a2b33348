"""The disk tier: its files are as documented, and whatever happens to them, a read gives what was written or
nothing."""

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import pytest
from support.blobs import OTHER_SPACE, SPACE, chain, state

from bittrue.kv.blob import HEADER_BYTES, BlobFormat, Fault
from bittrue.kv.disk import OLD_TEMP_S, DiskTier
from bittrue.kv.identity import BlobName
from bittrue.obs.log import Log

LAYOUT = b"layout".ljust(20)
DATA = bytes(range(256)) * 2
REPOSITORY = Path(__file__).parents[2]
PAGE_OF_FORMAT = REPOSITORY / "docs" / "kv-disk-format.md"


@contextmanager
def disk_tier(
    root: Path, *, budget_bytes: int = 2**20, layout: bytes = LAYOUT, story: io.StringIO | None = None
) -> Iterator[DiskTier]:
    tier = DiskTier(root, budget_bytes=budget_bytes, layout=layout, log=Log(story or io.StringIO()))
    assert tier.wait_scanned(10)
    yield tier
    tier.close()


def files(root: Path) -> list[Path]:
    return sorted((root / "v1").rglob("*.kv"))


def count(tier: DiskTier) -> dict[str, int]:
    """The counters that are not zero, without "disk."."""
    return {name.removeprefix("disk."): number for name, number in tier.counters.items() if number}


# The format.


def documented_fields() -> dict[str, tuple[int, int]]:
    """Field -> (offset, bytes), as the page's table says."""
    rows = re.findall(r"^\| (\d+) \| *(\d*) \| ([a-z ]+) \|", PAGE_OF_FORMAT.read_text("utf-8"), re.MULTILINE)
    return {name: (int(offset), int(length or 0)) for offset, length, name in rows}


def test_a_file_is_what_the_page_of_the_format_says(tmp_path: Path) -> None:
    name = state(chain(1)[0].digest, 77)
    with disk_tier(tmp_path) as tier:
        assert tier.write(SPACE, name, DATA)
    (path,) = files(tmp_path)
    file = path.read_bytes()
    fields = {name: file[at : at + size] for name, (at, size) in documented_fields().items()}
    numbers = {name: int.from_bytes(value, "little") for name, value in fields.items()}
    assert fields["magic"] == bytes.fromhex("89 42 54 4b 56 0d 0a 1a")
    assert [numbers[field] for field in ("format version", "kind", "reserved", "offset")] == [1, 2, 0, 77]
    assert numbers["header length"] == documented_fields()["payload"][0] == HEADER_BYTES
    assert numbers["payload length"] == len(DATA)
    assert [fields[field] for field in ("namespace", "layout")] == [SPACE, LAYOUT]
    assert [fields[field] for field in ("parent", "digest")] == [name.parent, name.digest]
    payload = file[documented_fields()["payload"][0] :]
    covered = file[: documented_fields()["header checksum"][0]]
    assert payload == DATA
    assert fields["payload checksum"] == blake2b(payload, digest_size=16, person=b"bittrue-blob").digest()
    assert fields["header checksum"] == blake2b(covered, digest_size=16, person=b"bittrue-blob").digest()
    place = name.parent.hex()
    assert path == tmp_path / "v1" / SPACE.hex() / place[:2] / place / f"state-077-{name.digest.hex()}.kv"


def test_documented_fields_cover_the_header_without_gap() -> None:
    at = 0
    for offset, length in documented_fields().values():
        assert offset == at
        at += length
    assert at == HEADER_BYTES


def test_a_page_lies_at_its_own_place_and_names_its_parent(tmp_path: Path) -> None:
    first, second = chain(2)
    with disk_tier(tmp_path) as tier:
        tier.write(SPACE, second, DATA)
    place = second.digest.hex()
    (path,) = files(tmp_path)
    assert path == tmp_path / "v1" / SPACE.hex() / place[:2] / place / f"page-{first.digest.hex()}.kv"


@pytest.mark.parametrize("name", [chain(1)[0], state(SPACE, 0), state(SPACE, 127)])
@pytest.mark.parametrize("payload", [b"", b"x", DATA])
def test_encoded_bytes_decode_to_the_payload(name: BlobName, payload: bytes) -> None:
    form = BlobFormat(LAYOUT)
    assert form.decode(SPACE, name, form.encode(SPACE, name, payload)) == payload


def test_every_flipped_bit_and_every_truncation_is_noticed() -> None:
    form, name = BlobFormat(LAYOUT), chain(1)[0]
    file = form.encode(SPACE, name, b"few bytes")
    for at in range(len(file)):
        for bit in range(8):
            flipped = file[:at] + bytes([file[at] ^ 1 << bit]) + file[at + 1 :]
            fault = form.decode(SPACE, name, flipped)
            assert fault is (Fault.STALE if at in (8, 9) else Fault.CORRUPT), f"bit {bit} of byte {at}"
        assert form.decode(SPACE, name, file[:at]) is Fault.TRUNCATED
    assert form.decode(SPACE, name, file + b"\0") is Fault.CORRUPT


def test_a_sound_file_of_something_else_says_what_it_is() -> None:
    form, name = BlobFormat(LAYOUT), chain(1)[0]
    file = form.encode(SPACE, name, DATA)
    assert form.decode(OTHER_SPACE, name, file) is Fault.FOREIGN
    assert BlobFormat(b"other".ljust(20)).decode(SPACE, name, file) is Fault.FOREIGN
    for other in (
        BlobName("state", name.parent, name.offset, name.digest),
        BlobName("page", name.digest, name.offset, name.digest),
        BlobName("page", name.parent, 127, name.digest),
        BlobName("page", name.parent, name.offset, name.parent),
    ):
        assert form.decode(SPACE, other, file) is Fault.WRONG_NAME


# Damage on disk.


def test_every_flipped_byte_on_disk_is_a_clean_miss_and_the_file_goes(tmp_path: Path) -> None:
    name = chain(1)[0]
    story = io.StringIO()
    with disk_tier(tmp_path, story=story) as tier:
        tier.write(SPACE, name, b"few bytes")
        (path,) = files(tmp_path)
        sound = path.read_bytes()
        stale = 0
        for at in range(len(sound)):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(sound[:at] + bytes([sound[at] ^ 0xFF]) + sound[at + 1 :])
            assert tier.read(SPACE, name) is None, f"byte {at}"
            assert not tier.has(SPACE, name)
            stale += path.exists()
        assert stale == 2  # the format version: not ours to remove
        assert count(tier) == {"saved": 1, "corrupt": len(sound) - 2, "stale": 2}
    assert story.getvalue().count("disk_cache_rejected") == 1  # the counters have the others


def test_a_file_cut_at_any_length_is_a_clean_miss(tmp_path: Path) -> None:
    name = chain(1)[0]
    with disk_tier(tmp_path) as tier:
        tier.write(SPACE, name, b"few bytes")
        (path,) = files(tmp_path)
        sound = path.read_bytes()
        for length in range(len(sound)):
            path.write_bytes(sound[:length])
            assert tier.read(SPACE, name) is None and not path.exists(), f"{length} bytes"
        path.write_bytes(sound)
        assert tier.read(SPACE, name) == b"few bytes"


def test_a_damaged_blob_is_saved_anew(tmp_path: Path) -> None:
    name = chain(1)[0]
    with disk_tier(tmp_path) as tier:
        tier.write(SPACE, name, DATA)
        files(tmp_path)[0].write_bytes(b"nothing")
        assert tier.read(SPACE, name) is None
        assert tier.write(SPACE, name, DATA)
        assert tier.read(SPACE, name) == DATA


def test_a_file_of_another_layout_is_left_until_saved_anew(tmp_path: Path) -> None:
    name = chain(1)[0]
    with disk_tier(tmp_path, layout=b"other".ljust(20)) as tier:
        tier.write(SPACE, name, b"theirs")
    with disk_tier(tmp_path) as tier:
        assert tier.has(SPACE, name)
        assert tier.read(SPACE, name) is None
        assert not tier.has(SPACE, name) and len(files(tmp_path)) == 1
        assert tier.write(SPACE, name, b"mine  ")
        assert tier.has(SPACE, name)
        assert tier.read(SPACE, name) == b"mine  "
        assert count(tier) == {"foreign": 1, "saved": 1, "hit": 1}


def test_a_state_that_cannot_be_read_is_not_listed(tmp_path: Path) -> None:
    mine, theirs = state(SPACE, 3), state(SPACE, 4)
    with disk_tier(tmp_path, layout=b"other".ljust(20)) as tier:
        tier.write(SPACE, theirs, DATA)
    with disk_tier(tmp_path) as tier:
        tier.write(SPACE, mine, DATA)
        assert len(tier.states(SPACE, SPACE)) == 2
        assert tier.read(SPACE, theirs) is None
        assert tier.states(SPACE, SPACE) == [(3, mine.digest)]


def test_another_model_in_the_directory_is_never_read_and_shares_the_budget(tmp_path: Path) -> None:
    pages = chain(3, parent=OTHER_SPACE)
    with disk_tier(tmp_path) as tier:
        for page in pages:
            tier.write(OTHER_SPACE, page, DATA)
    with disk_tier(tmp_path, budget_bytes=4 * (HEADER_BYTES + len(DATA))) as tier:
        assert not any(tier.has(SPACE, page) for page in pages)
        for page in chain(3):
            assert tier.write(SPACE, page, DATA)
        assert [tier.has(OTHER_SPACE, page) for page in pages] == [True, False, False]
        assert tier.num_bytes == 4 * (HEADER_BYTES + len(DATA))


def test_what_is_no_file_is_a_miss(tmp_path: Path) -> None:
    link, pipe, folder = (state(SPACE, offset) for offset in (1, 2, 3))
    with disk_tier(tmp_path) as tier:
        for name in (link, pipe, folder):
            tier.write(SPACE, name, DATA)
        paths = files(tmp_path)
        for path in paths:
            path.rename(path.with_suffix(".away"))
        paths[0].symlink_to(paths[0].with_suffix(".away"))
        os.mkfifo(paths[1])
        paths[2].mkdir()
        assert [tier.read(SPACE, name) for name in (link, pipe, folder)] == [None] * 3
        assert len(tier.states(SPACE, SPACE)) <= 2  # the folder is still there, and told apart by reading


def test_names_that_are_no_blobs_are_left_alone(tmp_path: Path) -> None:
    with disk_tier(tmp_path) as tier:
        tier.write(SPACE, state(SPACE, 3), DATA)
        place = files(tmp_path)[0].parent
        odd = "state-1x3-" + "z" * 40 + ".kv"
        for name in ("notes.txt", "state-003-short.kv", odd, "page-.kv"):
            (place / name).write_text("mine")
        (tmp_path / "v1" / "README").write_text("mine")
        assert [offset for offset, _ in tier.states(SPACE, SPACE)] == [3]
        assert tier.flush(None) == (1, [])
    assert sorted(path.name for path in place.iterdir()) == sorted(
        ["notes.txt", "state-003-short.kv", odd, "page-.kv"]
    )


# One directory over time, and for several.


def test_a_restart_finds_everything_before_it_has_scanned(tmp_path: Path) -> None:
    pages = chain(20)
    with disk_tier(tmp_path) as tier:
        for page in pages:
            assert tier.write(SPACE, page, DATA)
        tier.write(SPACE, state(pages[4].digest, 9), DATA)
    tier = DiskTier(tmp_path, budget_bytes=2**20, layout=LAYOUT, log=Log(io.StringIO()))
    assert all(tier.has(SPACE, page) for page in pages)
    assert tier.states(SPACE, pages[4].digest) == [(9, state(pages[4].digest, 9).digest)]
    assert tier.read(SPACE, pages[7]) == DATA
    tier.close()


def test_the_order_of_use_survives_a_restart(tmp_path: Path) -> None:
    names = [state(SPACE, offset) for offset in range(4)]
    with disk_tier(tmp_path) as tier:
        for name in names:
            tier.write(SPACE, name, DATA)
        for age, path in enumerate(files(tmp_path)):  # state-000 is the newest
            os.utime(path, (time.time() - 1000 - age,) * 2)
        assert tier.read(SPACE, names[3]) == DATA
    with disk_tier(tmp_path, budget_bytes=3 * (HEADER_BYTES + len(DATA))) as tier:
        assert [tier.has(SPACE, name) for name in names] == [True, True, False, True]
        tier.write(SPACE, state(SPACE, 100), DATA)
        assert [tier.has(SPACE, name) for name in names] == [True, False, False, True]
        assert len(files(tmp_path)) == 3
        assert count(tier) == {"evicted": 2, "saved": 1}


def test_old_temporary_files_are_swept_at_the_start(tmp_path: Path) -> None:
    with disk_tier(tmp_path):
        pass
    old, fresh = tmp_path / "v1/tmp/1-1-aa.part", tmp_path / "v1/tmp/2-1-bb.part"
    old.write_bytes(b"half")
    fresh.write_bytes(b"half")
    os.utime(old, (time.time() - OLD_TEMP_S - 1,) * 2)
    with disk_tier(tmp_path):
        assert (old.exists(), fresh.exists()) == (False, True)


def test_two_tiers_on_one_directory_see_each_others_files(tmp_path: Path) -> None:
    pages = chain(4)
    with disk_tier(tmp_path) as one, disk_tier(tmp_path) as two:
        for page in pages[:2]:
            assert one.write(SPACE, page, DATA)
        assert [two.read(SPACE, page) for page in pages[:2]] == [DATA] * 2
        for page in pages:  # the first two are there already
            assert two.write(SPACE, page, DATA)
        assert count(two)["saved"] == 2
        assert one.read(SPACE, pages[3]) == DATA
        assert one.flush(None) == (4, [])
        assert two.has(SPACE, pages[3])  # as far as it knows
        assert two.read(SPACE, pages[3]) is None
        assert not two.has(SPACE, pages[3])
        assert count(two)["miss"] == 1


def test_a_directory_emptied_while_in_use_is_filled_again(tmp_path: Path) -> None:
    with disk_tier(tmp_path) as tier:
        tier.write(SPACE, chain(1)[0], DATA)
        subprocess.run(["rm", "-r", tmp_path / "v1"], check=True)
        assert tier.read(SPACE, chain(1)[0]) is None
        assert tier.write(SPACE, chain(1)[0], DATA)
        assert tier.read(SPACE, chain(1)[0]) == DATA


def test_a_flush_of_one_namespace_leaves_the_others(tmp_path: Path) -> None:
    with disk_tier(tmp_path) as tier:
        for page in chain(3):
            tier.write(SPACE, page, DATA)
        tier.write(OTHER_SPACE, state(OTHER_SPACE, 1), DATA)
        assert tier.flush(SPACE) == (3, [])
        assert tier.num_bytes == HEADER_BYTES + len(DATA)
        assert tier.read(OTHER_SPACE, state(OTHER_SPACE, 1)) == DATA


KILLED_WRITERS = """
import os, random, signal, sys, time
from support.blobs import SPACE, chain
from bittrue.kv.disk import DiskTier
from bittrue.obs.log import Log

root, seed = sys.argv[1], random.Random(7)
pages = chain(400)
for round in range(12):
    child = os.fork()
    if child == 0:
        tier = DiskTier(root, budget_bytes=2**27, layout=b"L" * 20, log=Log(open(os.devnull, "w")))
        for page in pages[round % 3 :]:
            tier.write(SPACE, page, page.digest * 5000)
        os._exit(0)
    time.sleep(seed.uniform(0.002, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_writers_killed_at_any_moment_leave_only_whole_files(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_WRITERS, str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/tests"})
    names = chain(400)
    with disk_tier(tmp_path, budget_bytes=2**27, layout=b"L" * 20) as tier:
        found = [name for name in names if tier.has(SPACE, name)]
        assert len(found) == len(files(tmp_path)) > 20
        assert all(tier.read(SPACE, name) == name.digest * 5000 for name in found)
        assert count(tier) == {"hit": len(found)}
        assert tier.write(SPACE, names[0], names[0].digest * 5000)
