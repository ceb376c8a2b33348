"""The room of the disk tier: whether its directory can be used, how much of it, and when to write."""

import errno
import os
import stat
import threading
import time

from bittrue.errors import ConfigError
from bittrue.obs.log import Log

MARGIN_BYTES = 2**30  # left free for others, or a twentieth of a small file system
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 300.0
_FULL_FOR_S = 600.0  # how long "no space left" is believed to tell what there is room for
_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskRoom:
    """The directory ``root`` that one cache may fill up to ``budget_bytes``, working below ``inner``.

    ``temp`` is made, and a file in it tried. Raises ConfigError when nothing can be written there and nothing
    is there to read. Safe for threads: the numbers are single values, a race costs one more line in the log.
    """

    def __init__(self, root: str, inner: str, temp: str, *, budget_bytes: int, log: Log) -> None:
        self._root = root
        self._budget_bytes = budget_bytes
        self._log = log
        self._lock = threading.Lock()
        self._pause_s = 0.0  # 0 = the last write worked
        self._paused_until = 0.0
        self._full_bytes = 0
        self._full_until = 0.0
        self._is_limited = False
        _check_owner(_made(root), root)
        error = _try_to_write(temp)
        if error is not None:
            if error.errno not in _FULL and not os.path.isdir(inner):
                raise _unusable(root, f"cannot be written: {error.strerror}, and holds no cache to read")
            self.failed(error, 0)

    def limit_bytes(self, held_bytes: int) -> int:
        """Bytes the cache may hold now, when it holds ``held_bytes``: the budget, or less where the disk has
        less, told in the log when that changes."""
        try:
            disk = os.statvfs(self._root)
        except OSError:
            return self._budget_bytes  # the write that follows says what is wrong
        margin_bytes = min(MARGIN_BYTES, disk.f_blocks * disk.f_frsize // 20)
        free_bytes = disk.f_bavail * disk.f_frsize
        limit_bytes = min(self._budget_bytes, max(0, held_bytes + free_bytes - margin_bytes))
        if time.monotonic() < self._full_until:
            limit_bytes = min(limit_bytes, self._full_bytes)
        with self._lock:
            changed = self._is_limited != (limit_bytes < self._budget_bytes)
            self._is_limited = limit_bytes < self._budget_bytes
        if changed and self._is_limited:
            self._log.warning(
                "disk_cache_limited",
                directory=self._root,
                budget=self._budget_bytes,
                in_force=limit_bytes,
                free=free_bytes,
                kept_free=margin_bytes,
            )
        elif changed:
            self._log.info("disk_cache_unlimited", directory=self._root, in_force=limit_bytes)
        return limit_bytes

    def is_paused(self) -> bool:
        """Whether writing is off for a while, because it failed."""
        return time.monotonic() < self._paused_until

    def failed(self, error: OSError, held_bytes: int) -> None:
        """A write failed while the cache held ``held_bytes``: wait before the next, twice as long each time.
        The first of an outage is logged."""
        with self._lock:
            is_first = self._pause_s == 0.0
            self._pause_s = min(_LONGEST_PAUSE_S, max(_FIRST_PAUSE_S, 2 * self._pause_s))
            self._paused_until = time.monotonic() + self._pause_s
            if error.errno in _FULL:  # a quota does not show in the free space: what is held is what fits
                self._full_bytes = held_bytes
                self._full_until = time.monotonic() + _FULL_FOR_S
        if is_first:
            self._log.warning(
                "disk_cache_write_failed",
                directory=self._root,
                error=error.strerror,
                reads="go on",
                retry_s=self._pause_s,
            )

    def worked(self) -> None:
        """A write went through: the outage, if there was one, is over."""
        if self._pause_s:
            with self._lock:
                self._pause_s = 0.0
            self._log.info("disk_cache_writes_again", directory=self._root)


def _unusable(root: str, fact: str) -> ConfigError:
    return ConfigError(
        f"the cache directory {root} {fact}; name a directory of your own with --cache-dir, or leave it out",
        field="cache_dir",
    )


def _made(root: str) -> os.stat_result:
    """The directory's facts; it is made, for its owner only, if it is not there. It can be listed."""
    try:
        os.makedirs(root, mode=0o700, exist_ok=True)
        os.listdir(root)
        return os.stat(root)
    except (FileExistsError, NotADirectoryError) as error:
        raise _unusable(root, "is a file, or lies below one") from error
    except PermissionError as error:
        raise _unusable(root, f"cannot be read: {error.strerror}") from error
    except OSError as error:
        raise _unusable(root, f"cannot be made: {error.strerror}") from error


def _check_owner(facts: os.stat_result, root: str) -> None:
    """Whoever may write there decides what the model remembers: nobody but the user or root."""
    user = os.geteuid()
    if user != 0 and facts.st_uid not in (0, user):
        raise _unusable(root, f"belongs to user {facts.st_uid}, and this is user {user}")
    if facts.st_mode & stat.S_IWOTH:
        raise _unusable(root, f"can be written by everybody (mode {stat.S_IMODE(facts.st_mode):o})")


def _try_to_write(temp: str) -> OSError | None:
    """Make the directory ``temp`` and a file in it; what went wrong."""
    path = f"{temp}/{os.getpid()}-{os.urandom(4).hex()}.part"
    try:
        os.makedirs(temp, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        os.close(fd)
        os.unlink(path)
    except OSError as error:
        return error
    return None
