"""The real engine that dies under many streams: every token as if it had not, poisons alone are failed."""

import asyncio
import io
import os
import random
import signal
from pathlib import Path

import pytest
from engine.test_supervisor import each_alone
from standins.poisoned_engine import POISON

from bittrue.config.run import RunConfig
from bittrue.engine.engine import Engine
from bittrue.engine.launch import EngineProcess
from bittrue.engine.supervisor import EngineClient
from bittrue.engine.types import Request, SamplingParams, TokenEvent
from bittrue.errors import PoisonRequest
from bittrue.model.presets import make_checkpoint
from bittrue.obs.log import Log
from bittrue.obs.metrics import Metrics

KNOBS = {"threads": 1, "kv_memory": "64MiB", "max_step_tokens": 96, "max_running": 32, "max_context": 2048}


def streams(num_tokens: int) -> list[Request]:
    """32 that differ in length, temperature, penalties and seed; prompts of a token to several pages."""
    return [
        Request(
            request_id=f"r{i}",
            prompt=tuple((7 * i + 13 * j) % 500 for j in range(1 + 11 * i)),
            params=SamplingParams(
                max_tokens=num_tokens + i % 5,
                seed=i,
                temperature=(1.0, 0.0, 0.8)[i % 3],
                frequency_penalty=(0.0, 0.5)[i % 2],
                ignore_eos=True,
            ),
        )
        for i in range(32)
    ]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("tiny", 3, "fp4", tmp_path_factory.mktemp("real") / "tiny")


def undisturbed(directory: Path, requests: list[Request]) -> list[list[int]]:
    engine = Engine(directory, **KNOBS)
    tokens = engine.generate([r.prompt for r in requests], [r.params for r in requests])
    engine.close()
    return [list(each) for each in tokens]


@pytest.mark.slow
def test_20_random_kills_of_the_real_engine_change_no_token(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(_kills(directory, monkeypatch))


async def _kills(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = streams(160)
    expected = undisturbed(directory, requests)
    # On a busy machine a start may take longer than the time between two kills.
    config = RunConfig(model=str(directory), max_restarts=40, **KNOBS)
    client = EngineClient(config, Log(io.StringIO()), Metrics())
    # Kills come when so many tokens have arrived: as many on a quick machine as on a slow one.
    total = sum(map(len, expected))
    moments = sorted(random.Random(11).sample(range(total * 9 // 10), 20))
    num_tokens = num_kills = 0
    deliver = client._deliver

    def counted(event: TokenEvent, now_s: float) -> None:
        nonlocal num_tokens
        num_tokens += len(event.token_ids)
        deliver(event, now_s)

    monkeypatch.setattr(EngineClient, "_deliver", lambda _, event, now_s: counted(event, now_s))
    with EngineProcess.start(config) as process:
        await client.start(process)

        async def kill() -> None:
            nonlocal num_kills
            for moment in moments:
                while num_tokens < moment or client.pid is None:
                    await asyncio.sleep(0.001)
                os.kill(client.pid, signal.SIGKILL)
                num_kills += 1
                while client.is_up:
                    await asyncio.sleep(0.002)

        killer = asyncio.create_task(kill())
        try:
            results = await asyncio.wait_for(each_alone(client, requests), 280)
            assert num_kills == 20, "the streams ended before the last kill"
            await killer
        finally:
            killer.cancel()
            await client.close()
    assert results == expected


@pytest.mark.slow
def test_poisons_of_the_real_engine_are_given_up_and_the_others_get_their_tokens(directory: Path) -> None:
    requests = streams(12)
    expected = undisturbed(directory, requests)
    places = (4, 20)

    async def main() -> None:
        for place in places:
            poisoned = Request(
                request_id=f"r{place}", prompt=(5, POISON, 9), params=SamplingParams(max_tokens=30, seed=1)
            )
            requests[place] = poisoned
        config = RunConfig(model=str(directory), **KNOBS)
        client = EngineClient(config, Log(io.StringIO()), Metrics())
        with EngineProcess.start(config, factory="standins.poisoned_engine:PoisonedEngine") as process:
            await client.start(process)
            try:
                results = await asyncio.wait_for(each_alone(client, requests), 280)
                stats = await client.fresh_stats()
            finally:
                await client.close()
        for i, (result, tokens) in enumerate(zip(results, expected, strict=True)):
            if i in places:
                assert isinstance(result, PoisonRequest), result
            else:
                assert result == tokens, i
        assert stats.pages_held == stats.slots_held == 0

    asyncio.run(main())
