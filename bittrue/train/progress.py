"""How far a training run is: a bar on a terminal, elsewhere a log line every few steps."""

import time
from collections import deque
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from bittrue.obs.log import Log
from bittrue.train.run import Progress

_RECENT = 32  # steps whose speed is shown


class TrainProgress:
    """Called after every step inside its ``with`` block."""

    def __init__(self, log: Log, *, step: int, steps: int, every: int) -> None:
        self._log, self._steps, self._every = log, steps, every
        self._bar = step_bar(log)
        self._task = self._bar.add_task("train", total=steps, completed=step, shown="")
        # (time, tokens of the step that ended then)
        self._recent: deque[tuple[float, int]] = deque([(time.perf_counter(), 0)], maxlen=_RECENT + 1)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        values = progress.values
        self._recent.append((time.perf_counter(), int(values["tokens"])))
        rate = self._rate()
        shown = f"loss {values['main']:.4f}  {rate:,.0f} tokens/s  lr {values['lr']:.2e}"
        if progress.is_anticipating:
            shown += "  anticipating"
        self._bar.update(self._task, completed=progress.step, shown=shown)
        is_due = progress.step % self._every == 0 or progress.step == self._steps
        if self._bar.disable and is_due:  # a line would break the bar
            self._log.info(
                "step",
                n=f"{progress.step}/{self._steps}",
                loss=values["main"],
                mtp=values["mtp"],
                index=values["index"],
                balance=values["balance"],
                lr=values["lr"],
                grad_norm=values["grad_norm"],
                tokens_per_s=rate,
                left_s=round((self._steps - progress.step) * self._seconds()),
                **({"anticipating": True} if progress.is_anticipating else {}),
            )

    def _seconds(self) -> float:
        return (self._recent[-1][0] - self._recent[0][0]) / (len(self._recent) - 1)

    def _rate(self) -> float:
        seconds = self._recent[-1][0] - self._recent[0][0]
        tokens = sum(count for _, count in list(self._recent)[1:])
        return tokens / seconds if seconds else 0.0


def step_bar(log: Log) -> Bar:
    """A bar of steps with a text beside it, ``shown``; disabled where the log is no terminal."""
    return Bar(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(),
        console=Console(file=log.stream),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not log.stream.isatty(),
    )
