"""Link: how messages reach an engine that runs elsewhere, and how it is started again; here over a socket."""

import select
import socket
import time
from typing import Protocol, Self

from bittrue.config.run import RunConfig
from bittrue.engine.launch import DEFAULT_FACTORY, EngineProcess
from bittrue.engine.wire import (
    HEADER_BYTES,
    FromEngine,
    ToEngine,
    body_bytes,
    decode_from_engine,
    frame,
)

_READ_BYTES = 1 << 20


class Link(Protocol):
    """One engine elsewhere. Messages arrive in order, or, once it is dead, not at all."""

    @property
    def pid(self) -> int | None:
        """Of the process that the engine runs in; None where that has gone before it could tell."""
        ...

    @property
    def is_dead(self) -> bool:
        """The engine has gone, and all that it said has been received."""
        ...

    def fileno(self) -> int:
        """Ready to be read (as ``select`` sees it) whenever ``receive`` would not wait."""
        ...

    def send(self, message: ToEngine) -> None:
        """Lost where the engine has gone: ``receive`` comes upon that."""
        ...

    def receive(self, timeout_s: float | None) -> list[FromEngine]:
        """What has come, waiting for a message (None = for ever); nothing where none came in time or the
        engine is dead."""
        ...

    def restart(self, verified: str) -> None:
        """Ends what is left of the engine and starts another in its place, which says Ready when it is.
        Files known as ``verified`` are not searched again. Raises BittrueError, OSError."""
        ...

    def close(self) -> None:
        """Ends the engine, if need be by force. Safe to repeat."""
        ...


class ProcessLink:
    """A Link to an engine process of this machine."""

    def __init__(self, process: EngineProcess) -> None:
        self._process = process
        self._data = bytearray()  # received, and not whole yet
        self.is_dead = False

    @classmethod
    def start(cls, config: RunConfig, *, factory: str = DEFAULT_FACTORY) -> Self:
        """Returns at once; the process loads what ``config`` names. Raises ConfigError where there is no such
        directory."""
        return cls(EngineProcess.start(config, factory=factory))

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def fileno(self) -> int:
        return self._process.link.fileno()

    def send(self, message: ToEngine) -> None:
        try:
            # The engine process reads at all times, so this does not wait for a step.
            self._process.link.sendall(frame(message))
        except ConnectionError:
            pass  # what it said last may still be there to be received; then comes the end

    def receive(self, timeout_s: float | None) -> list[FromEngine]:
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        found: list[FromEngine] = []
        while not found and not self.is_dead:
            left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            if not _is_readable(self._process.link, left_s):
                break
            self._read()
            found = self._whole_messages()
        return found

    def restart(self, verified: str) -> None:
        self._end()
        self._process = self._process.again(verified=verified)
        self._data.clear()
        self.is_dead = False

    def close(self) -> None:
        self._end()
        self.is_dead = True

    def _end(self) -> None:
        self._process.kill()
        self._process.popen.wait()
        self._process.link.close()

    def _read(self) -> None:
        """All that is there."""
        while True:
            try:
                data = self._process.link.recv(_READ_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionError:  # it died before it had read all that was sent
                data = b""
            if not data:
                self.is_dead = True
                return
            self._data += data

    def _whole_messages(self) -> list[FromEngine]:
        found, start = [], 0
        while len(self._data) - start >= HEADER_BYTES:
            begin = start + HEADER_BYTES
            end = begin + body_bytes(self._data[start:begin])
            if end > len(self._data):
                break
            found.append(decode_from_engine(bytes(self._data[begin:end])))
            start = end
        del self._data[:start]
        return found


def _is_readable(link: socket.socket, timeout_s: float | None) -> bool:
    poll = select.poll()
    poll.register(link, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))
