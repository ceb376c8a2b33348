"""Puts a program where it can do no harm, then becomes it: run as a script, with the standard library alone.

    python -I -S launcher.py PLAN STATUS_FD COMMAND...

PLAN is the JSON of ``sandbox.Plan``. With namespaces there are three processes: this one waits for the first
process of a new process namespace, which owns the mounts and waits for the second, which becomes COMMAND.
When the first of these dies, by whatever cause, the kernel kills everything in the namespace. STATUS_FD gets
"ok" just before COMMAND starts, or the reason why it cannot; COMMAND itself never sees it.
"""

import ctypes
import json
import os
import resource
import select
import signal
import sys
from typing import Any, NoReturn

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 1, 8, 38, 47
_PR_CAP_AMBIENT_RAISE = 2
_SYS_MOUNT_SETATTR = 442  # the same number on every architecture
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41}
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 1, 2
_CAP_DAC_READ_SEARCH = 2
_CAPABILITY_VERSION_3 = 0x20080522

_INNER_ID = 1000  # of user and group: not 0, so that becoming COMMAND drops every capability
_NOBODY = 65534  # what root becomes outside: the kernel counts no processes of root
_DEVICES = ("null", "zero", "full", "random", "urandom")

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace")]


def main(arguments: list[str]) -> NoReturn:
    plan, status, command = json.loads(arguments[0]), int(arguments[1]), arguments[2:]
    os.set_inheritable(status, False)
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if plan["namespaces"]:
            _enter(plan, status)
        _limit(plan)
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        os.write(status, b"ok")
        try:
            os.execv(command[0], command)
        except OSError as error:
            raise OSError(error.errno, f"{command[0]}: {error.strerror}") from error
    except (OSError, ValueError, KeyError) as error:
        os.write(status, f"{type(error).__name__}: {error}".encode())
        os._exit(97)


def _enter(plan: dict[str, Any], status: int) -> None:
    """Returns in the second process of new namespaces, without capabilities but one that reads."""
    is_root = os.getuid() == 0
    _new_user_namespace(plan)
    alive_read, alive_write = os.pipe()
    first = os.fork()
    if first:
        _become_waiter(first, status)
    os.close(alive_write)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if select.select([alive_read], [], [], 0)[0]:  # the waiter died before it would have taken this along
        os._exit(1)
    os.close(alive_read)
    _mount_all(plan)
    second = os.fork()
    if second:
        _become_waiter(second, status)
    if is_root and os.getuid() == 0:
        _become_nobody()


def _become_waiter(child: int, status: int) -> NoReturn:
    """Reaps until ``child`` ends, then ends like it."""
    os.close(status)
    while True:
        pid, code = os.wait()
        if pid == child:
            os._exit(os.WEXITSTATUS(code) if os.WIFEXITED(code) else 128 + os.WTERMSIG(code))


def _new_user_namespace(plan: dict[str, Any]) -> None:
    """Unshares. Root is mapped to itself, and nobody to the inner user; anyone else to the inner user."""
    uid, gid = os.getuid(), os.getgid()
    go_read, go_write = os.pipe()
    mapper = os.fork() if uid == 0 else 0
    if uid == 0 and mapper == 0:
        os.close(go_write)
        os._exit(_map_from_outside(os.getppid(), go_read))
    flags = _CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWIPC | _CLONE_NEWUTS
    _check(_libc.unshare(flags | (0 if plan["has_network"] else _CLONE_NEWNET)), "unshare")
    os.write(go_write, b"g")
    os.close(go_write)
    os.close(go_read)
    if mapper and os.waitpid(mapper, 0)[1] == 0:
        return
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{_INNER_ID} {uid} 1")
    _write("/proc/self/gid_map", f"{_INNER_ID} {gid} 1")


def _map_from_outside(pid: int, go: int) -> int:
    """Maps two users, which a namespace's own process may not; the exit status of the process that does."""
    if os.read(go, 1) != b"g":
        return 1
    try:
        for name in ("uid_map", "gid_map"):
            _write(f"/proc/{pid}/{name}", f"0 0 1\n{_INNER_ID} {_NOBODY} 1\n")
    except OSError:
        return 1
    return 0


def _mount_all(plan: dict[str, Any]) -> None:
    """A root of the visible paths, read-only, and an empty /tmp that ends with the namespace."""
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=4m")
    os.mkdir("/tmp/old")
    os.mkdir("/tmp/new")
    _pivot_root("/tmp", "/tmp/old")
    os.chdir("/")
    _mount("tmpfs", "/new", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=4m")
    os.mkdir("/new/tmp")
    size = f"mode=1777,size={plan['directory_bytes']},nr_inodes=4096"
    _mount("tmpfs", "/new/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, size)
    for name in _DEVICES:
        _show(f"/dev/{name}", f"/dev/{name}")
    for source, target in plan["visible"]:
        _show(source, target)
    _mount_proc()
    _set_attributes("/new", _MountAttributes(set=_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID), _AT_RECURSIVE)
    _set_attributes("/new/tmp", _MountAttributes(clear=_MOUNT_ATTR_RDONLY), 0)
    os.chdir("/new")
    _pivot_root(".", ".")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount")
    os.chdir("/tmp")


def _mount_proc() -> None:
    """This namespace's own processes; a container whose /proc is masked allows none, then there is none."""
    os.mkdir("/new/proc")
    try:
        _mount("proc", "/new/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
        _write("/new/proc/sys/user/max_user_namespaces", "0")
    except OSError:
        return


def _show(source: str, target: str) -> None:
    """Makes what is at ``source`` outside visible at ``target`` inside; what is there already stays."""
    source, target = f"/old{source}", f"/new{target}"
    if os.path.lexists(target) or not os.path.lexists(source):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return
    if os.path.isdir(source):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(source, target, None, _MS_BIND | _MS_REC)


def _become_nobody() -> None:
    """Root's program runs as nobody, who may still read what is visible: root's files may be root's alone."""
    os.setgroups([])
    os.setresgid(_INNER_ID, _INNER_ID, _INNER_ID)
    _prctl(_PR_SET_KEEPCAPS, 1)
    os.setresuid(_INNER_ID, _INNER_ID, _INNER_ID)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    mask = 1 << _CAP_DAC_READ_SEARCH
    data = (ctypes.c_uint32 * 6)(mask, mask, mask, 0, 0, 0)
    _check(_libc.capset(ctypes.byref(header), ctypes.byref(data)), "capset")
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_READ_SEARCH)


def _limit(plan: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_FSIZE: plan["directory_bytes"],
        resource.RLIMIT_AS: plan["memory_bytes"],
    }
    if plan["cpu_seconds"]:  # first a signal that says why, a second later one that cannot be ignored
        resource.setrlimit(resource.RLIMIT_CPU, (plan["cpu_seconds"], plan["cpu_seconds"] + 1))
    if plan["processes"]:
        limits[resource.RLIMIT_NPROC] = plan["processes"]
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, data)]
    _check(
        _libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]), f"mount {kind} {target}"
    )


def _set_attributes(path: str, attributes: _MountAttributes, flags: int) -> None:
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    done = _libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, ctypes.byref(attributes), size)
    _check(done, "mount_setattr")


def _pivot_root(root: str, old: str) -> None:
    number = _SYS_PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(f"no number of pivot_root for {os.uname().machine}")
    _check(_libc.syscall(number, root.encode(), old.encode()), "pivot_root")


def _prctl(option: int, first: int, second: int = 0) -> None:
    unused = ctypes.c_ulong(0)
    _check(_libc.prctl(option, ctypes.c_ulong(first), ctypes.c_ulong(second), unused, unused), "prctl")


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _write(path: str, text: str) -> None:
    handle = os.open(path, os.O_WRONLY)
    try:
        os.write(handle, text.encode())
    finally:
        os.close(handle)


if __name__ == "__main__":
    main(sys.argv[1:])
