"""The engine process: owns the model and the KV memory, takes requests from a socket, sends back tokens."""

import gc
import importlib
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, Protocol

from bittrue.config.load import run_config_from_json
from bittrue.config.run import RunConfig
from bittrue.engine.outbox import Outbox
from bittrue.engine.types import Abort, EngineStats, MemoryReport, Request, Running, TokenEvent
from bittrue.engine.weight_parts import UpdateParts
from bittrue.engine.wire import (
    HEADER_BYTES,
    Flush,
    Flushed,
    FromEngine,
    Hello,
    Ping,
    Pong,
    Ready,
    Shutdown,
    StepDone,
    ToEngine,
    Updated,
    UpdatePart,
    body_bytes,
    decode_to_engine,
    refusal,
)
from bittrue.errors import BittrueError, EngineDied, PublicationRefused
from bittrue.model.weight_update import WeightUpdate
from bittrue.obs.log import Log
from bittrue.obs.progress import LoadProgress

EXIT_REFUSED = 2  # the engine could not be built; the reason was sent
EXIT_CRASHED = 70  # an unforeseen error; its traceback is on stderr
_LAST_WORDS_S = 5.0  # a server that reads nothing for so long does not hear how the process ended


class ModelFacts(Protocol):
    @property
    def vocab_size(self) -> int: ...


class ServedEngine(Protocol):
    """What the process needs of an engine (engine.Engine is one).

    Events of a request with ``resume`` hold only the tokens after those. ``has_work()``: ``step()`` gets on.
    ``verified``: identity of the checkpoint's files, found sound. ``flush()`` drops every cached prefix and
    says how much, by kind; BittrueError when something stayed. ``update_weights()`` says whether anything
    changed; PublicationRefused, and nothing did.
    """

    @property
    def config(self) -> ModelFacts: ...
    @property
    def max_context(self) -> int: ...
    @property
    def verified(self) -> str: ...
    def add(self, request: Request) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> list[TokenEvent]: ...
    def has_work(self) -> bool: ...
    def flush(self) -> dict[str, int]: ...
    def update_weights(self, update: WeightUpdate, *, running: Running) -> bool: ...
    def stats(self) -> EngineStats: ...
    def memory(self) -> MemoryReport: ...
    def fingerprint(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


class EngineFactory(Protocol):
    """Builds the engine; ``progress`` is told (bytes done, bytes in all, tensor at hand). Files of which
    ``verified`` tells that they were found sound are not read through again."""

    def __call__(
        self, model: str, run: RunConfig, *, progress: Callable[[int, int, str], None], verified: str
    ) -> ServedEngine: ...


def main(fd: int) -> int:
    """Body of the engine process; ``fd`` is its end of the socket pair. Returns the exit code."""
    # A terminal's Ctrl-C and a service manager's SIGTERM reach the whole group: the server decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Imports and start-up make hundreds of thousands of objects that stay: looking through them for cycles
    # again and again costs a quarter second of the start, and later a pause now and then.
    gc.disable()
    link = socket.socket(fileno=fd)
    inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
    threading.Thread(target=_read_messages, args=(link, inbox), name="inbox", daemon=True).start()
    outbox = Outbox(link, on_gone=lambda: os._exit(0))  # the server process has gone
    try:
        return serve(inbox, outbox.send)
    finally:
        outbox.close(_LAST_WORDS_S)


def serve(inbox: "queue.SimpleQueue[ToEngine]", send: Callable[[FromEngine], None]) -> int:
    """Builds the engine that the first message names and runs it until Shutdown. Returns the exit code."""
    engine: ServedEngine | None = None
    try:
        hello = inbox.get()
        assert isinstance(hello, Hello), hello
        engine = _build(hello)
        gc.freeze()
        gc.enable()
        send(
            Ready(
                max_context=engine.max_context,
                vocab_size=engine.config.vocab_size,
                fingerprint=engine.fingerprint(),
                stats=engine.stats(),
                memory=engine.memory(),
                verified=engine.verified,
            )
        )
        _run(engine, inbox, send)
        engine.close()
        return 0
    except BittrueError as error:
        if engine is not None:
            return _crashed()
        send(refusal(None, error))
        return EXIT_REFUSED
    except Exception as error:  # noqa: BLE001  the engine's top: recorded, then the supervisor decides
        code = _crashed()
        if engine is None:
            send(refusal(None, EngineDied(f"the engine could not start: {type(error).__name__}: {error}")))
        return code


def _crashed() -> int:
    traceback.print_exc(file=sys.stderr)
    sys.stderr.flush()
    return EXIT_CRASHED


def _build(hello: Hello) -> ServedEngine:
    config = run_config_from_json(hello.run_config)
    module_name, _, attribute = hello.factory.partition(":")
    factory: EngineFactory = getattr(importlib.import_module(module_name), attribute)
    with LoadProgress(Log(sys.stderr, config.log_level), config.model) as progress:
        return factory(config.model, config, progress=progress, verified=hello.verified)


def _read_messages(link: socket.socket, inbox: "queue.SimpleQueue[ToEngine]") -> None:
    """Fills the inbox. The stream ends with the server process: then so does this one, even mid-step."""
    while True:
        header = _read_exactly(link, HEADER_BYTES)
        body = None if header is None else _read_exactly(link, body_bytes(header))
        if body is None:
            os._exit(0)
        inbox.put(decode_to_engine(body))


def _read_exactly(link: socket.socket, num_bytes: int) -> bytearray | None:
    """None at the end of the stream."""
    data = bytearray(num_bytes)
    view = memoryview(data)
    while view:
        try:
            count = link.recv_into(view)
        except OSError:
            return None
        if count == 0:
            return None
        view = view[count:]
    return data


def _run(
    engine: ServedEngine, inbox: "queue.SimpleQueue[ToEngine]", send: Callable[[FromEngine], None]
) -> None:
    """Takes in what has arrived, steps, reports; sleeps on the inbox without work. Returns on Shutdown."""
    parts = UpdateParts()
    while True:
        if not _take_in(engine, inbox, send, parts):
            return
        events = engine.step() if engine.has_work() else []
        send(StepDone(events=events, stats=engine.stats()))


def _take_in(
    engine: ServedEngine,
    inbox: "queue.SimpleQueue[ToEngine]",
    send: Callable[[FromEngine], None],
    parts: UpdateParts,
) -> bool:
    """Handles every waiting message, waiting for one if the engine is idle. False on Shutdown."""
    while True:
        try:
            message = inbox.get(block=not engine.has_work())
        except queue.Empty:
            return True
        match message:
            case Request():
                try:
                    engine.add(message)
                except BittrueError as error:
                    send(refusal(message.request_id, error))
            case Abort():
                engine.abort(message.request_id)
            case Ping():
                send(Pong(ping_id=message.ping_id, stats=engine.stats()))
            case Flush():
                send(_flushed(engine, message.flush_id))
            case UpdatePart():
                _update(engine, message, parts, send)
            case Shutdown():
                return False
            case Hello():
                raise AssertionError("a second Hello")
        if inbox.empty():
            return True


def _flushed(engine: ServedEngine, flush_id: int) -> Flushed:
    try:
        return Flushed(flush_id=flush_id, dropped=engine.flush())
    except BittrueError as error:
        return Flushed(flush_id=flush_id, error=str(error))


def _update(
    engine: ServedEngine, part: UpdatePart, parts: UpdateParts, send: Callable[[FromEngine], None]
) -> None:
    """Takes in one part of new weights; the last one makes them the engine's."""
    is_changed, refused = False, None
    try:
        update = parts.take(part)
        if update is None:
            return
        is_changed = engine.update_weights(update, running=part.running)
    except PublicationRefused as error:
        refused = refusal(None, error)
    send(Updated(update_id=part.update_id, is_changed=is_changed, stats=engine.stats(), refusal=refused))
