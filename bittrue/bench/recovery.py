"""Recovery of a server whose engine process is killed: from the kill to the next token of every stream."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import uvloop

from bittrue.bench.engines import at_least
from bittrue.bench.result import Label, Measurement, measured
from bittrue.bench.server import Serving, started_server
from bittrue.bench.serving import Endpoint, Recording, body_of, first_model, read_recording, send
from bittrue.bench.trace import Load, make_trace
from bittrue.errors import EngineDied

_RESTARTED = b": engine restarted\n\n"
_POLL_S = 0.005
_START_S = 300.0  # for all streams to have begun
_MAX_CONTEXT = 8192

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Recovery:
    """Kills the engine while ``streams`` answers stream, every one of them at its ``kill_after``-th event or
    later. Files of the disk cache go to ``folder``."""

    model: Path
    vocab: int
    folder: Path
    tell: Tell
    streams: Sequence[int] = (1, 32)
    prompt_tokens: int = 1024
    output_tokens: int = 512
    kill_after: int = 16
    rounds: int = 3
    threads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(rounds=(self.rounds, 1), streams=(min(self.streams, default=0), 1))
        at_least(
            prompt_tokens=(self.prompt_tokens, 1), output_tokens=(self.output_tokens, self.kill_after + 1)
        )

    def run(self) -> Iterator[Measurement]:
        """A server without a disk cache and one with it, in turn."""
        most = max(self.streams)
        flags = [f"--threads={self.threads}", f"--max-context={_MAX_CONTEXT}", f"--max-running={most}"]
        flags += ["--kv-memory=1GiB", "--log-level=info"]
        with ExitStack() as stack:
            servers = {
                "none": stack.enter_context(started_server(self.model, *flags)),
                "disk": stack.enter_context(started_server(self.model, *flags, f"--cache-dir={self.folder}")),
            }
            for streams in self.streams:
                ready: dict[str, list[float]] = {name: [] for name in servers}
                token: dict[str, list[float]] = {name: [] for name in servers}
                last: dict[str, list[float]] = {name: [] for name in servers}
                for number in range(self.rounds):
                    for name, server in servers.items():
                        self.tell(f"{streams} streams, cache {name}, kill {number + 1} of {self.rounds}")
                        killed = self._kill(server, streams, number)
                        ready[name].append(min(restarted for restarted, _ in killed))
                        token[name] += [next_s for _, next_s in killed]
                        last[name].append(max(next_s for _, next_s in killed))
                for name in servers:
                    labels: dict[str, Label] = {"streams": streams, "tier": name}
                    yield measured("kill to engine ready", "s", ready[name], labels)
                    yield measured("kill to next token", "s", token[name], labels)
                    yield measured("kill to next token of the last stream", "s", last[name], labels)

    def _kill(self, server: Serving, streams: int, number: int) -> list[tuple[float, float]]:
        load = Load(
            requests=streams,
            concurrency=streams,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            vocab=self.vocab,
            seed=self.seed + 1000 * streams + number,  # a prompt is never asked twice
        )
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(self._kill_under(server, load))

    async def _kill_under(self, server: Serving, load: Load) -> list[tuple[float, float]]:
        """(seconds from the kill to the comment that tells of the restart, to the token after it) of every
        stream. Raises EngineDied where a stream failed, ended too early or tells of no restart."""
        endpoint = Endpoint(server.url)
        recordings = [Recording(arrival, 0.0) for arrival in make_trace(load)]
        limits = httpx.Limits(max_connections=None)
        timeout = httpx.Timeout(endpoint.timeout_s)
        async with httpx.AsyncClient(base_url=endpoint.base, limits=limits, timeout=timeout) as client:
            model = await first_model(client)
            sending = [
                asyncio.create_task(
                    send(client, endpoint, each, msgspec.json.encode(body_of(endpoint, model, each.arrival)))
                )
                for each in recordings
            ]
            deadline_s = time.perf_counter() + _START_S
            while min(len(each.pieces) for each in recordings) < self.kill_after:
                if time.perf_counter() > deadline_s or any(task.done() for task in sending):
                    raise EngineDied("a stream ended before all had begun; raise --output-tokens")
                await asyncio.sleep(_POLL_S)
            os.kill(server.engine_pid(), signal.SIGKILL)
            killed_s = time.perf_counter()
            await asyncio.gather(*sending)
        return [_after(each, killed_s) for each in recordings]


def _after(recording: Recording, killed_s: float) -> tuple[float, float]:
    outcome = read_recording(recording)
    if outcome.error:
        raise EngineDied(f"a stream did not survive the kill: {outcome.error}")
    if outcome.num_output != recording.arrival.output_tokens:
        raise EngineDied(f"a stream has {outcome.num_output} tokens of {recording.arrival.output_tokens}")
    told_s: float | None = None
    for at_s, data in recording.pieces:
        if told_s is None and _RESTARTED in data:
            told_s, data = at_s, data.partition(_RESTARTED)[2]
        if told_s is not None and b"data:" in data:
            return told_s - killed_s, at_s - killed_s
    raise EngineDied("a stream tells of no restart: it had ended before the kill; raise --output-tokens")
