"""Checks law L7: the engine process killed at any moment = never killed, for every stream that is open."""

import asyncio
import io
import os
import random
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bittrue.config.run import RunConfig
from bittrue.engine.launch import EngineProcess
from bittrue.engine.supervisor import EngineClient, EventChannel
from bittrue.engine.types import Request
from bittrue.obs.log import Log
from bittrue.obs.metrics import Metrics
from bittrue.probes.engines import Engines
from bittrue.probes.result import LawResult
from bittrue.probes.workload import Answer, Answers, compare, random_tokens, request_mix, run_alone

LENGTHS = (3, 40, 128, 150)
MAX_TOKENS = 40
_POLL_S = 0.002


@dataclass(slots=True)
class Killer:
    """Kills the engine process of ``client`` once so many tokens have come in all."""

    client: EngineClient
    at: list[int]
    num_tokens: int = 0
    num_kills: int = 0
    num_open: int = 0  # streams that were open at the kills
    _draw: random.Random = field(default_factory=lambda: random.Random(0))

    async def run(self, channel: EventChannel) -> None:
        for threshold in self.at:
            while channel.unfinished and (self.num_tokens < threshold or self.client.pid is None):
                await asyncio.sleep(_POLL_S)
            await asyncio.sleep(self._draw.random() * 4 * _POLL_S)  # anywhere within a step
            pid = self.client.pid
            if not channel.unfinished or pid is None:
                continue
            os.kill(pid, signal.SIGKILL)
            self.num_kills += 1
            self.num_open += len(channel.unfinished)
            while self.client.pid == pid:
                await asyncio.sleep(_POLL_S)


def crash(engines: Engines, *, kills: int, streams: int, seed: int) -> Iterator[LawResult]:
    """``streams`` at once through the supervisor, the engine killed ``kills`` times while they are open."""
    requests, plain = asked(engines, streams=streams, seed=seed)
    draw = random.Random(seed)
    total = sum(len(answer.entries) for answer in plain.values())
    # The first before there is a token; from then on as they come.
    at = [0, *sorted(draw.randrange(1, max(2, total * 3 // 4)) for _ in range(kills - 1))]
    with tempfile.TemporaryDirectory(prefix="bittrue-verify-") as directory:
        run = killable(engines, cache_dir=directory)
        answers, killer = asyncio.run(killed(run, requests, at, verified=engines.plain.verified))
    exercised = {"kills": killer.num_kills, "streams open at a kill": killer.num_open}
    yield compare("L7", f"{streams} streams, {killer.num_kills} kills", plain, answers, exercised)


def asked(engines: Engines, *, streams: int, seed: int) -> tuple[list[Request], Answers]:
    parts = engines.parts
    draw = random.Random(seed)
    room = engines.max_context - MAX_TOKENS
    prompts = [random_tokens(draw, parts, min(LENGTHS[i % len(LENGTHS)], room)) for i in range(streams)]
    requests = request_mix(parts, draw, prompts, max_tokens=MAX_TOKENS, name="stream")
    return requests, run_alone(engines.plain, requests)


def killable(engines: Engines, **knobs: Any) -> RunConfig:
    """The run of the process to be killed: everything that leaves something behind is on."""
    changed = {
        "prefix_cache": True,
        "speculation": "ngram",
        "max_context": engines.max_context,
        "max_restarts": 20,
    }
    return engines.plain.run.model_copy(update={**changed, **knobs})


async def killed(
    run: RunConfig, requests: Sequence[Request], at: list[int], *, verified: str
) -> tuple[Answers, Killer]:
    """What clients of the supervisor get, and who killed how often."""
    log = io.StringIO()
    client = EngineClient(run, Log(log), Metrics())
    answers = {request.request_id: Answer() for request in requests}
    killer = Killer(client, at)
    with EngineProcess.start(run, verified=verified) as process:
        await client.start(process)
        try:
            with client.open(requests) as channel:
                killing = asyncio.create_task(killer.run(channel))
                while channel.unfinished:
                    for event in await channel.next_events():
                        answers[event.request_id].take(event)
                        killer.num_tokens += len(event.token_ids)
                await killing
        finally:
            await client.close()
    return answers, killer
