"""Which isolation this machine allows, measured, and how a program is started in it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

import msgspec

from bittrue.errors import VerifierUnavailable
from bittrue.rl.verifiers import launcher
from bittrue.rl.verifiers.limits import Limits

IsolationKind = Literal["namespaces", "bwrap", "limits"]
CHOICES: tuple[IsolationKind, ...] = ("namespaces", "bwrap", "limits")

_SYSTEM = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/alternatives", "/etc/ld.so.cache",
    "/etc/localtime",
)  # fmt: skip
_NETWORK = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/ssl", "/etc/services")
_OWN_PROCESSES = 4  # the namespace's first process, a worker and the one that judges, and one to spare
_PACKAGE_ROOT = Path(__file__).parents[3]
_LEAST_KERNEL = (5, 14)  # counts processes by namespace; mounts become read-only in one call from 5.12
_PROBE_SECONDS = 30.0
_DYING_SECONDS = 2.0  # for a process whose pipes are closed to be found dead

# What a program in the sandbox observes about itself. Prints one JSON object.
_PROBE = """
import json, os, resource, socket, sys
def refused(act):
    try:
        act()
    except OSError:
        return True
    return False
def write():
    path = os.path.join(os.path.dirname(os.__file__), "written_by_the_sandbox_probe")
    open(path, "x").close()
    os.unlink(path)
def children():
    pids = []
    try:
        for _ in range(resource.getrlimit(resource.RLIMIT_NPROC)[0] + 2):
            pid = os.fork()
            if pid == 0:
                os.close(hold[1])
                os.read(hold[0], 1)
                os._exit(0)
            pids.append(pid)
    finally:
        os.close(hold[1])
        for pid in pids:
            os.waitpid(pid, 0)
hold = os.pipe()
only_loopback = [name for _, name in socket.if_nameindex()] == ["lo"]
print(json.dumps({
    "no network": only_loopback and refused(lambda: socket.create_connection(("127.0.0.1", 9), 0.2)),
    "read-only root": refused(write),
    "private processes": os.getpid() < 8,
    "private /tmp": os.getcwd() == "/tmp" and set(os.listdir("/tmp")) <= set(sys.argv[1:]),
    "counted processes": resource.getrlimit(resource.RLIMIT_NPROC)[0] < 64 and refused(children),
}))
"""


class Killed(Exception):
    """A process was ended by a signal that nobody here sent, as one of kill or of the kernel for want of
    memory. There is no verdict, and the same check may well end in one."""


@dataclass(frozen=True, slots=True)
class Isolation:
    """The isolation in force. ``facts``: what a program in it was observed to be denied. ``refused``: why
    each stronger kind was not taken."""

    kind: IsolationKind
    facts: tuple[str, ...]
    refused: tuple[str, ...] = ()

    @property
    def is_sandbox(self) -> bool:
        """Whether a program can neither write outside its directory, nor reach a network or a process."""
        return {"no network", "read-only root", "private processes"} <= set(self.facts)

    def describe(self) -> str:
        """One line for people."""
        limits = "limits on time, memory and file size"
        denied = f"; {', '.join(self.facts)}" if self.facts else ""
        why = f" (not stronger: {'; '.join(self.refused)})" if self.refused else ""
        return f"{self.kind}: {limits}{denied}{why}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What the launcher is told. ``visible``: pairs of a path outside and its place inside, parents first;
    cpu_seconds and processes of 0 set no limit."""

    namespaces: bool
    has_network: bool
    visible: tuple[tuple[str, str], ...]
    cpu_seconds: int
    memory_bytes: int
    directory_bytes: int
    processes: int


def find_isolation(*, choose: IsolationKind | None = None, require_sandbox: bool = False) -> Isolation:
    """The strongest isolation that works here, or ``choose``. Raises VerifierUnavailable, saying why."""
    refused: list[str] = []
    for kind in CHOICES if choose is None else (choose,):
        try:
            found = _probe(kind, tuple(refused))
        except (VerifierUnavailable, Killed) as error:  # a kernel may kill for what it forbids
            refused.append(f"{kind}: {error}")
            continue
        if require_sandbox and not found.is_sandbox:
            refused.append(f"{kind}: a program may reach files, processes or the network")
            continue
        return found
    raise VerifierUnavailable(
        f"no sandbox for verifiers on this machine: {'; '.join(refused)}. Allow unprivileged user namespaces "
        "(sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns) or install "
        "bubblewrap; without require_sandbox only limits on time, memory and file size hold"
    )


def start(
    command: Sequence[str],
    isolation: IsolationKind,
    limits: Limits,
    *,
    directory: str = "/",
    has_network: bool = False,
    is_long_lived: bool = False,
    extra: Sequence[str] = (),
    python_path: Sequence[str] = (),
    stderr: int | IO[bytes] = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """A process running ``command`` in ``isolation``, with pipes to its standard input and output, leader of
    its own group if ``is_long_lived`` (then its processor time is not limited: it limits its children's).
    ``directory``: where it starts, if the isolation gives it no /tmp of its own.
    ``extra``: paths it sees besides the system, Python and this package.
    Raises VerifierUnavailable, Killed."""
    visible = _visible((*(_NETWORK if has_network else ()), *extra, *python_path))
    plan = Plan(
        namespaces=isolation == "namespaces",
        has_network=has_network,
        visible=visible,
        cpu_seconds=0 if is_long_lived else limits.cpu_seconds,
        memory_bytes=limits.memory_bytes,
        directory_bytes=limits.directory_bytes,
        processes=0 if isolation == "limits" else limits.processes + _OWN_PROCESSES,
    )
    status_read, status_write = os.pipe()
    try:
        prefix = _bwrap(plan) if isolation == "bwrap" else []
        python = [sys.executable, "-I", "-S", "-B", launcher.__file__]
        process = subprocess.Popen(
            [*prefix, *python, json.dumps(asdict(plan)), str(status_write), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            pass_fds=(status_write,),
            cwd=directory,
            env=_environment(python_path),
            start_new_session=is_long_lived,
        )
    except OSError as error:
        os.close(status_read)
        raise VerifierUnavailable(f"{command[0]} does not start: {error}") from error
    finally:
        os.close(status_write)
    with open(status_read, "rb") as status:
        said = status.read(4096).decode(errors="replace")
    if said != "ok":
        status_code = end(process, patience=_DYING_SECONDS)
        if not said and killed_by(status_code):
            raise Killed(f"{command[0]} did not start: {killed_by(status_code)}")
        why = said.removeprefix("ok") or f"status {status_code}"
        raise VerifierUnavailable(f"{isolation} refused: {why}")
    return process


def end(process: subprocess.Popen[bytes], *, patience: float = 0.0) -> int:
    """Kills a process that has not ended by itself within ``patience`` seconds, closes its pipes and gives
    its status."""
    if patience:
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    process.kill()
    status = process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()
    return status


def killed_by(status: int) -> str:
    """The name of the signal that ended a process, or the one in a namespace that it waited for; else
    empty."""
    number = -status if status < 0 else status - 128
    return signal.Signals(number).name if number in set(signal.Signals) else ""


def _probe(kind: IsolationKind, refused: tuple[str, ...]) -> Isolation:
    """The isolation of this kind as a program in it observes it."""
    if kind == "limits":
        return Isolation(kind, (), refused)
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    if kind == "namespaces" and release < _LEAST_KERNEL:
        raise VerifierUnavailable(f"Linux {os.uname().release} is older than 5.14")
    # What is visible may lie in /tmp: a checkout there, say.
    given = [Path(path).parts[2] for _, path in _visible(()) if path.startswith("/tmp/")]
    command = [sys.executable, "-I", "-S", "-B", "-c", _PROBE, *given]
    process = start(command, kind, Limits(processes=4, cpu_seconds=5))
    try:
        output, _ = process.communicate(timeout=_PROBE_SECONDS)
        facts = msgspec.json.decode(output, type=dict[str, bool])
    except (subprocess.TimeoutExpired, msgspec.DecodeError) as error:
        raise VerifierUnavailable(f"the probe in it failed: {error}") from error
    finally:
        end(process)
    return Isolation(kind, tuple(name for name, holds in facts.items() if holds), refused)


def _visible(extra: Sequence[str]) -> tuple[tuple[str, str], ...]:
    package = str(_PACKAGE_ROOT / "bittrue")
    own = dict.fromkeys((*_SYSTEM, sys.base_prefix, sys.prefix, package, *extra))
    pairs = [(path if path in _SYSTEM else os.path.realpath(path), path) for path in own]
    pairs += [(real, real) for real, path in pairs if real != path]
    return tuple(sorted(dict.fromkeys(pairs), key=lambda pair: len(pair[1])))


def _environment(python_path: Sequence[str]) -> dict[str, str]:
    """The whole environment of a worker: nothing of the caller's is passed on."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": "/tmp",
        "PYTHONPATH": os.pathsep.join((*python_path, str(_PACKAGE_ROOT))),
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _bwrap(plan: Plan) -> list[str]:
    """The command line up to the program for bubblewrap; the launcher inside it sets the limits alone."""
    program = shutil.which("bwrap")
    if program is None:
        raise VerifierUnavailable("bwrap is not installed")
    arguments = [
        program,
        "--unshare-all",
        "--die-with-parent",
        "--cap-drop",
        "ALL",
        "--uid",
        "1000",
        "--gid",
        "1000",
    ]
    if plan.has_network:
        arguments.append("--share-net")
    arguments += ["--dev", "/dev", "--proc", "/proc", "--size", str(plan.directory_bytes), "--tmpfs", "/tmp"]
    for source, target in plan.visible:
        if os.path.islink(source):
            arguments += ["--symlink", os.readlink(source), target]
        else:
            arguments += ["--ro-bind-try", source, target]
    return [*arguments, "--remount-ro", "/", "--chdir", "/tmp", "--"]
