"""EngineGroup: several engines that sample as one."""

import hashlib
import select
from collections.abc import Sequence
from typing import Any

import msgspec

from bittrue.engine.types import EngineStats, Request, Running, TokenEvent
from bittrue.errors import BittrueError, ConfigError
from bittrue.model.weight_update import WeightUpdate
from bittrue.rl.remote_engine import RemoteEngine


class EngineGroup:
    """What RemoteEngine does, by several of them. Requests whose ids begin alike, up to the last slash, go to
    one engine: answers to one prompt share it there. Which engine computes a request changes none of its
    bits. ``step`` and ``poll`` raise what an engine raises; events of the others come with the next call.
    """

    def __init__(self, engines: Sequence[RemoteEngine]) -> None:
        if not engines:
            raise ConfigError("a group of no engines samples nothing; give at least one", field="engines")
        self.engines = tuple(engines)
        self._kept: list[TokenEvent] = []

    def engine_of(self, request_id: str) -> RemoteEngine:
        """The engine that a request of this id goes to."""
        key = request_id.rpartition("/")[0] or request_id
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        return self.engines[int.from_bytes(digest, "little") % len(self.engines)]

    def add(self, request: Request) -> None:
        self.engine_of(request.request_id).add(request)

    def abort(self, request_id: str) -> None:
        self.engine_of(request_id).abort(request_id)

    def has_work(self) -> bool:
        return bool(self._kept) or any(engine.has_work() for engine in self.engines)

    def step(self) -> list[TokenEvent]:
        """The events that have come of all engines, waiting for a message of one where there are none but
        work."""
        events = self.poll()
        busy = [engine for engine in self.engines if engine.has_work()]
        if events or not busy:
            return events
        waiting = select.poll()
        for engine in busy:
            waiting.register(engine.fileno(), select.POLLIN)
        waiting.poll()
        return self.poll()

    def poll(self) -> list[TokenEvent]:
        """The events that have come of all engines, without waiting."""
        for engine in self.engines:
            self._kept += engine.poll()
        events, self._kept = self._kept, []
        return events

    def update_weights(self, update: WeightUpdate, *, running: Running = "retract") -> bool:
        """Makes ``update`` the weights of all engines, side by side; whether any changed.

        Raises what one of them raises when all have answered: those that took it keep it, and the same update
        given again does nothing to them.
        """
        begun, errors = [], []
        for engine in self.engines:
            try:
                engine.begin_update(update, running=running)
                begun.append(engine)
            except BittrueError as error:
                errors.append(error)
        is_changed = False
        for engine in begun:
            try:
                is_changed |= engine.finish_update()
            except BittrueError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return is_changed

    @property
    def restarts(self) -> int:
        return sum(engine.restarts for engine in self.engines)

    def stats(self) -> EngineStats:
        """The sums over all engines. ``weight_version``: the versions they have, one after the other, where
        these differ."""
        each = [engine.stats() for engine in self.engines]
        versions = sorted({stats.weight_version for stats in each})
        total = msgspec.structs.replace(each[0], weight_version=" ".join(versions))
        for stats in each[1:]:
            total = _sum(total, stats)
        return total

    def close(self) -> None:
        for engine in self.engines:
            engine.close()


def _sum(a: Any, b: Any) -> Any:
    """Of two numbers, or of all numbers in two equal structures; lists of rows follow each other."""
    match a:
        case int():
            return a + b
        case str():
            return a
        case dict():
            return {name: a.get(name, 0) + b.get(name, 0) for name in a | b}
        case tuple():
            if any(not isinstance(item, int) for item in (*a, *b)):
                return a + b
            size = max(len(a), len(b))
            left, right = (list(part) + [0] * (size - len(part)) for part in (a, b))
            return tuple(x + y for x, y in zip(left, right, strict=True))
    fields = {name: _sum(getattr(a, name), getattr(b, name)) for name in a.__struct_fields__}
    return msgspec.structs.replace(a, **fields)
