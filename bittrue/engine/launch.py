"""EngineProcess: starts an engine process and says what to build; needs neither torch nor an event loop."""

import asyncio
import json
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from bittrue.config.run import RunConfig
from bittrue.engine.wire import Hello, frame
from bittrue.errors import ConfigError

DEFAULT_FACTORY = "bittrue.engine.engine:Engine"
# The engine process imports from exactly where the server does. A terminal's Ctrl-C is for the server to act
# on, from the first moment.
_BOOT = (
    "import json, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "sys.path[:] = json.loads(sys.argv[2]); "
    "from bittrue.engine.process import main; sys.exit(main(int(sys.argv[1])))"
)
_EXIT_POLL_S = 0.01


@dataclass(slots=True)
class EngineProcess:
    """One engine process and our end of the socket to it. Leaving the ``with`` block kills it."""

    popen: "subprocess.Popen[bytes]"
    link: socket.socket
    config: RunConfig
    factory: str

    @classmethod
    def start(cls, config: RunConfig, *, factory: str = DEFAULT_FACTORY, verified: str = "") -> Self:
        """Returns at once; the process loads what ``config`` names and then sends Ready. Raises ConfigError
        where there is no such directory."""
        if not Path(config.model).is_dir():
            raise ConfigError(f"model: {config.model} is not a directory; give a checkpoint's", field="model")
        ours, theirs = socket.socketpair()
        with theirs:
            popen = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout belongs to the server's result
            )
        hello = Hello(factory=factory, run_config=config.model_dump_json(), verified=verified)
        ours.sendall(frame(hello))
        return cls(popen, ours, config, factory)

    def again(self, *, verified: str) -> "EngineProcess":
        """Another process in the place of this one; files known as ``verified`` are not searched again."""
        return EngineProcess.start(self.config, factory=self.factory, verified=verified)

    @property
    def pid(self) -> int:
        return self.popen.pid

    async def wait(self) -> int:
        """The exit code, once there is one. The stream's end tells of the death; this only collects it."""
        while (code := self.popen.poll()) is None:
            await asyncio.sleep(_EXIT_POLL_S)
        return code

    def kill(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.popen.wait()
        self.link.close()
