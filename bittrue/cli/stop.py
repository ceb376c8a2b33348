"""Ends a long command at its next good moment."""

import contextlib
import signal
from collections.abc import Callable, Iterator

from bittrue.obs.log import Log

EXIT_STOPPED = 130


@contextlib.contextmanager
def stop_on_signal(log: Log) -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or Ctrl-C has come. The second one ends the program as it would have without this."""
    caught: list[int] = []

    def note(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(number, before[number])
        log.info("stopping", signal=signal.Signals(number).name, after="this step")

    before = {int(number): signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
