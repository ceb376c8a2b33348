"""Runs the server: binds the port, starts the engine process, serves, drains, and says how it ended."""

import asyncio
import contextlib
import errno
import gc
import logging
import signal
import socket
import sys
import time
import traceback
from collections.abc import Generator
from pathlib import Path

import uvicorn
import uvloop

from bittrue.config.run import RunConfig
from bittrue.engine.launch import EngineProcess
from bittrue.engine.supervisor import EngineClient
from bittrue.errors import ConfigError, Draining, EngineDied
from bittrue.obs.log import Log
from bittrue.obs.metrics import Metrics
from bittrue.server.app import build_app
from bittrue.server.requests import settle_interrupted
from bittrue.server.state import ServerState
from bittrue.text.codec import Codec
from bittrue.text.grammar import GrammarCompiler
from bittrue.text.tokenizer import Tokenizer

_POLL_S = 0.05
_IDLE_CONNECTION_S = (
    75  # longer than clients keep theirs: the side that sends next should be the one that closes
)
_CLOSE_S = 2  # streams that were told of the end get this long to be written out


def run_server(config: RunConfig, engine: EngineProcess) -> int:
    """Serves with the process just started until SIGTERM or SIGINT; returns the exit code.

    Raises BittrueError when it cannot start. Writes one line per event to stderr.
    """
    log = Log(sys.stderr, config.log_level)
    listener = _bind(config)
    with contextlib.closing(listener), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config, log, listener, engine))


async def _serve(config: RunConfig, log: Log, listener: socket.socket, engine: EngineProcess) -> int:
    metrics = Metrics()
    client = EngineClient(config, log, metrics)
    loop = asyncio.get_running_loop()
    end = _End(asyncio.current_task())
    loop.add_signal_handler(signal.SIGTERM, end.ask)
    try:
        try:
            state = await _start(config, log, metrics, client, engine)
        except asyncio.CancelledError:
            if not end.is_cancelled:
                raise
            return 0
        if state.is_limited_by_memory:
            log.warning(
                "context_limited",
                max_context=state.max_context,
                reason="kv_memory holds no more tokens",
                kv_memory_for_all=state.kv_memory_for(client.ready.max_context),
            )
        settle_interrupted(state)
        server = Server(state, listener)
        client.on_dead = server.engine_died
        end.server = server
        loop.add_signal_handler(signal.SIGINT, end.ask)
        await server.serve(sockets=[listener])
        return server.exit_code
    finally:
        await client.close()
        log.info("stopped")


class _End:
    """What a signal asks for: the start-up is cancelled, once, a server drains.

    One owner of the signals all the time: a loop may call a handler that has just been replaced. Nothing is
    lost before the server listens, so a cancelled start exits with 0.
    """

    def __init__(self, task: "asyncio.Task[object] | None") -> None:
        assert task is not None
        self.is_cancelled = False
        self.server: Server | None = None
        self._task = task

    def ask(self) -> None:
        if self.server is not None:
            self.server.begin_drain()
        elif not self.is_cancelled:
            self.is_cancelled = True
            self._task.cancel()


class _Relay(logging.Handler):
    """Writes what uvicorn says as lines of the log; what a bug raised, with its traceback."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, asyncio.CancelledError):
            return  # a connection cut by the second signal
        write = self._log.error if record.levelno >= logging.ERROR else self._log.warning
        if error is None:
            write("http", message=record.getMessage())
            return
        write("http_bug", error=f"{type(error).__name__}: {error}")
        traceback.print_exception(error, file=self._log.stream)


async def _start(
    config: RunConfig, log: Log, metrics: Metrics, client: EngineClient, engine: EngineProcess
) -> ServerState:
    """The engine process and the tokenizer load side by side."""
    starting = asyncio.create_task(client.start(engine))
    try:
        tokenizer = await asyncio.to_thread(Tokenizer.from_file, Path(config.model) / "tokenizer.json")
        ready = await starting
    except BaseException:
        # A directory that is no checkpoint fails on both sides: the engine's reason says more.
        if starting.done() and starting.exception() is not None:
            await starting
        starting.cancel()
        raise
    grammars = await asyncio.to_thread(GrammarCompiler, tokenizer, ready.vocab_size)
    gc.freeze()  # what the start made stays: no collection looks through it again
    created = int(time.time())
    return ServerState(config, tokenizer, Codec(tokenizer), grammars, client, metrics, log, created)


def _bind(config: RunConfig) -> socket.socket:
    """Before the model loads: a port in use is told at once."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        field = "port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "host"
        remedy = "use another --port" if field == "port" else "give an address of this machine as --host"
        message = f"cannot listen on {config.host} port {config.port}: {error.strerror}; {remedy}"
        raise ConfigError(message, field=field) from error
    return listener


class Server(uvicorn.Server):
    """uvicorn with a drain: after SIGTERM or SIGINT no new request is taken and unfinished ones may end.

    A second signal ends at once.
    """

    def __init__(self, state: ServerState, listener: socket.socket) -> None:
        super().__init__(
            uvicorn.Config(
                build_app(state),
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_IDLE_CONNECTION_S,
                timeout_graceful_shutdown=_CLOSE_S,
            )
        )
        # uvicorn logs through the logging module, whose loggers are shared by the whole process.
        for logger in (logging.getLogger("uvicorn.error"), logging.getLogger("uvicorn.asgi")):
            logger.handlers, logger.propagate = [_Relay(state.log)], False
        self.exit_code = 0
        self._state, self._listener = state, listener
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """uvicorn would take the signals from here on only; they belong to the loop all the time."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self._listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        self._state.log.info("serving", url=f"http://{shown}:{port}", model=self._state.config.name)

    def engine_died(self, error: EngineDied) -> None:
        """There will be no engine again. Requests and /health are told so (503) for ``drain_timeout_s``, so
        that balancers and people see why; then the process ends, for its service manager to start another."""
        self.exit_code = error.exit_code
        timeout_s = self._state.config.drain_timeout_s
        self._state.log.error("serving_errors", reason=error, exit_in_s=timeout_s)
        asyncio.get_running_loop().call_later(timeout_s, self._end_failed)

    def _end_failed(self) -> None:
        if self._draining is None:
            self.begin_drain()

    def begin_drain(self) -> None:
        """Also before ``serve``, which then returns at once."""
        if self._draining is not None:
            self.should_exit = self.force_exit = True
            return
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        state = self._state
        state.is_draining = True
        state.log.info("draining", active=state.num_active, timeout_s=state.config.drain_timeout_s)
        deadline_s = time.monotonic() + state.config.drain_timeout_s
        while state.num_active and time.monotonic() < deadline_s:
            await asyncio.sleep(_POLL_S)
        if state.num_active:
            state.log.warning("drain_timeout", active=state.num_active)
            late = Draining("the server ended before this request did; send it to another one")
            state.client.fail_all(late)
        self.should_exit = True
