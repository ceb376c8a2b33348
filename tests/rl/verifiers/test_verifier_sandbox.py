import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bittrue.errors import VerifierUnavailable
from bittrue.rl.verifiers.limits import Limits
from bittrue.rl.verifiers.pool import Pool
from bittrue.rl.verifiers.sandbox import CHOICES, IsolationKind, end, find_isolation, start

SANDBOXES: tuple[IsolationKind, ...] = tuple(kind for kind in CHOICES if kind != "limits")


def printed(program: str, kind: IsolationKind, limits: Limits | None = None, **options: object) -> object:
    """What a program prints as JSON in an isolation."""
    command = [sys.executable, "-I", "-S", "-B", "-c", program]
    process = start(command, kind, limits or Limits(), **options)  # type: ignore[arg-type]
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        end(process)
    return json.loads(output) if output else process.returncode


@pytest.fixture(params=SANDBOXES)
def kind(request: pytest.FixtureRequest) -> IsolationKind:
    chosen: IsolationKind = request.param
    try:
        find_isolation(choose=chosen, require_sandbox=True)
    except VerifierUnavailable as error:
        pytest.skip(str(error))
    return chosen


def test_limits_alone_are_no_sandbox_and_say_so() -> None:
    found = find_isolation(choose="limits")
    assert not found.is_sandbox
    assert found.describe() == "limits: limits on time, memory and file size"
    with pytest.raises(VerifierUnavailable, match="user namespaces"):
        find_isolation(choose="limits", require_sandbox=True)
    with pytest.raises(VerifierUnavailable, match="no sandbox for verifiers on this machine"):
        Pool(isolation="limits", require_sandbox=True)


def test_the_strongest_that_works_is_taken_and_the_rest_is_explained() -> None:
    found = find_isolation()
    refused = [text.split(":")[0] for text in found.refused]
    assert [*refused, found.kind] == list(CHOICES[: len(refused) + 1])


@pytest.mark.skipif(shutil.which("bwrap") is not None, reason="bwrap is installed")
def test_what_is_missing_is_named() -> None:
    with pytest.raises(VerifierUnavailable, match="bwrap is not installed"):
        find_isolation(choose="bwrap")


def test_a_sandbox_is_what_a_program_in_it_observes(kind: IsolationKind) -> None:
    found = find_isolation(choose=kind)
    assert {"no network", "read-only root", "private processes", "private /tmp"} <= set(found.facts)
    assert all(fact in found.describe() for fact in found.facts)


def test_only_what_is_shown_is_there(kind: IsolationKind, tmp_path: Path) -> None:
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown" / "x").write_text("1")
    (tmp_path / "hidden").write_text("1")
    looked = [str(tmp_path / "shown" / "x"), str(tmp_path / "hidden"), __file__, "/etc/passwd", "/root/.ssh"]
    program = f"import json, os; print(json.dumps([os.path.exists(p) for p in {looked!r}]))"
    seen = printed(program, kind, extra=(str(tmp_path / "shown"),))
    assert seen == [True, False, False, False, False]


def test_a_program_has_no_rights_and_cannot_get_any(kind: IsolationKind) -> None:
    program = """
import ctypes, json, os
libc = ctypes.CDLL(None, use_errno=True)
done = [os.getuid() == 0]
for path in ("/", "/usr", "/tmp/../etc"):
    done.append(libc.mount(b"none", path.encode(), None, ctypes.c_ulong(4096 | 32), None) == 0)
done.append(libc.umount2(b"/usr", 2) == 0)
for path in ("/x", "/usr/x", os.__file__):
    try:
        open(path, "a").close()
        done.append(path)
    except OSError:
        done.append(False)
print(json.dumps(done))
"""
    assert printed(program, kind) == [False] * 8


def test_a_program_cannot_see_or_signal_others(kind: IsolationKind) -> None:
    program = """
import json, os
found = [int(name) for name in os.listdir("/proc") if name.isdigit()]
print(json.dumps([os.getpid() < 8, max(found) < 8, sorted(os.environ)]))
"""
    mine, others, environment = printed(program, kind)  # type: ignore[misc]
    assert mine and others
    assert set(environment) <= {
        "PATH", "LANG", "HOME", "PYTHONPATH", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS", "PWD", "LC_CTYPE",
    }  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
def test_memory_and_files_are_bounded(choice: IsolationKind, tmp_path: Path) -> None:
    program = """
import json
done = []
try:
    bytearray(2**29)
except MemoryError:
    done.append("memory")
try:
    with open("x", "wb") as file:
        file.write(bytes(2**21))
except OSError:
    done.append("file")
print(json.dumps(done))
"""
    limits = Limits(memory_bytes=2**28, directory_bytes=2**20)
    try:
        find_isolation(choose=choice)
    except VerifierUnavailable as error:
        pytest.skip(str(error))
    # Python ignores the signal of a file that grows too large, so that writing fails instead.
    assert printed(program, choice, limits, directory=str(tmp_path)) == ["memory", "file"]


def test_processes_are_counted_where_it_is_said(kind: IsolationKind) -> None:
    if "counted processes" not in find_isolation(choose=kind).facts:
        pytest.skip("this kind does not count the processes of this user")
    program = """
import json, os, time
count = 0
try:
    while count < 64:
        if os.fork() == 0:
            time.sleep(60)
        count += 1
except BlockingIOError:
    print(json.dumps(count))
"""
    found = printed(program, kind, Limits(processes=5))
    assert isinstance(found, int) and 5 <= found < 12


def test_what_cannot_start_says_so(kind: IsolationKind) -> None:
    with pytest.raises(VerifierUnavailable, match="no-such-program"):
        start(["/no-such-program"], kind, Limits())


def test_killing_the_launcher_kills_what_it_launched(kind: IsolationKind) -> None:
    command = [sys.executable, "-I", "-S", "-B", "-c", "import time; print(1, flush=True); time.sleep(600)"]
    process = start(command, kind, Limits())
    assert process.stdout is not None
    assert process.stdout.readline() == b"1\n"
    process.kill()
    assert process.stdout.read() == b""  # ends when the last holder of the pipe does
    assert process.wait() == -9
    end(process)


def test_the_launcher_needs_only_the_standard_library() -> None:
    program = (
        "import sys, runpy; sys.modules['bittrue'] = None; runpy.run_path(sys.argv[1], run_name='other');"
        "print(sorted(n for n in sys.modules if n.split('.')[0] in ('numpy', 'torch', 'msgspec')))"
    )
    from_here = Path(__file__).parents[3] / "bittrue" / "rl" / "verifiers"
    for name in ("launcher.py", "harness.py"):
        command = [sys.executable, "-I", "-S", "-c", program, str(from_here / name)]
        assert subprocess.check_output(command, text=True) == "[]\n"
