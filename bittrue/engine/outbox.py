"""Outbox: what the engine process says, sent without the step thread ever waiting for the reader."""

import socket
import threading
from collections.abc import Callable

from bittrue.engine.wire import FromEngine, StepDone, frame


class Outbox:
    """Frames in order. While the reader keeps up, ``send`` writes to the socket itself; what the socket
    does not take at once is left to a thread, and steps that pile up there go out as one.

    ``on_gone`` is called when the reader has closed its end.
    """

    def __init__(self, link: socket.socket, on_gone: Callable[[], None]) -> None:
        self._link, self._on_gone = link, on_gone
        self._waiting: list[FromEngine | bytes] = []
        self._is_closed = False
        self._is_writing = False  # the thread is in the middle of a frame: nobody else may write
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._drain, name="outbox", daemon=True)
        self._thread.start()

    def send(self, message: FromEngine) -> None:
        with self._changed:
            if self._waiting or self._is_writing:
                self._waiting.append(message)
                return
            rest = self._write_some(frame(message))
            if rest:
                self._waiting.append(rest)
                self._changed.notify()

    def close(self, timeout_s: float) -> None:
        """Waits until everything is written, at most ``timeout_s``."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _write_some(self, data: bytes) -> bytes:
        """What the socket did not take."""
        try:
            return data[self._link.send(data, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            return data
        except ConnectionError:
            self._on_gone()
            return b""

    def _drain(self) -> None:
        while True:
            with self._changed:
                self._is_writing = False
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if not self._waiting:
                    return
                waiting, self._waiting = self._waiting, []
                self._is_writing = True
            data = b"".join(m if isinstance(m, bytes) else frame(m) for m in merged(waiting))
            try:
                self._link.sendall(data)
            except ConnectionError:
                self._on_gone()
                return


def merged(messages: list[FromEngine | bytes]) -> list[FromEngine | bytes]:
    """The same news in fewer messages: neighbouring steps become one, with the numbers after the last."""
    out: list[FromEngine | bytes] = []
    for message in messages:
        last = out[-1] if out else None
        if isinstance(message, StepDone) and isinstance(last, StepDone):
            out[-1] = StepDone(events=last.events + message.events, stats=message.stats)
        else:
            out.append(message)
    return out
