"""LoadProgress: how far a long read is, as a bar on a terminal, elsewhere as one log line at either end."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from bittrue.obs.log import Log


class LoadProgress:
    """Called with (bytes done, bytes in all, name at hand) inside its ``with`` block."""

    def __init__(self, log: Log, what: str) -> None:
        self._log, self._what = log, what
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        # Log lines of this process keep their stream: only the bar is drawn by rich.
        self._bar = Progress(
            *columns,
            console=Console(file=log.stream),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not log.stream.isatty(),
        )
        self._task = self._bar.add_task("loading", total=None)
        self._num_bytes = 0
        self._started_s = time.perf_counter()

    def __enter__(self) -> Self:
        self._log.info("loading", model=self._what)
        self._bar.start()
        return self

    def __call__(self, done: int, total: int, name: str) -> None:
        self._num_bytes = done
        self._bar.update(self._task, completed=done, total=total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if error is None:
            seconds = time.perf_counter() - self._started_s
            self._log.info("loaded", model=self._what, bytes=self._num_bytes, seconds=seconds)
