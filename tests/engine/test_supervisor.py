"""Engines that die under many streams: poisons are found, nobody else is failed, tokens do not change."""

import asyncio
import os
import random
import signal
from pathlib import Path

import pytest
from engine.test_process import a_request, collect, gauge, is_conserved, run_client
from standins.ngram_engine import Poison, StandinOptions

from bittrue.engine.supervisor import EngineClient
from bittrue.engine.types import Request
from bittrue.errors import BittrueError, NotFlushed, PoisonRequest

NUM_STREAMS = 32
MAX_RESTARTS = 3
POISON = (901, 902, 903)  # tokens of prompts; the walk stays below 200


def streams(num_tokens: int, num_streams: int = NUM_STREAMS) -> list[Request]:
    return [
        a_request(f"r{i}", max_tokens=num_tokens + i % 7, seed=i, prompt=(20 + i, 21, 22))
        for i in range(num_streams)
    ]


async def outcome(client: EngineClient, request: Request) -> list[int] | BittrueError:
    try:
        return (await collect(client, [request]))[request.request_id]
    except BittrueError as error:
        return error


async def each_alone(client: EngineClient, requests: list[Request]) -> list[list[int] | BittrueError]:
    """Every request on a channel of its own, all at once."""
    return list(await asyncio.gather(*(outcome(client, request) for request in requests)))


@pytest.mark.parametrize(
    ("places", "exit_signal"),
    [
        ({5: 0}, 0),
        ({0: 4}, signal.SIGSEGV),
        ({31: 9}, signal.SIGABRT),
        ({3: 0, 17: 6}, signal.SIGBUS),
        ({0: 3, 1: 3, 30: 5}, 0),
        ({7: 5}, signal.SIGKILL),
    ],
    ids=["prompt", "segv", "abort", "two", "three", "kill"],
)
def test_poisons_are_answered_with_an_error_and_the_others_get_their_tokens(
    tmp_path: Path, places: dict[int, int], exit_signal: int
) -> None:
    requests = streams(12)
    poisons = []
    for token, (place, at) in zip(POISON, places.items(), strict=False):
        harmless = requests[place]
        requests[place] = a_request(harmless.request_id, max_tokens=20, prompt=(20, token))
        poisons.append(Poison(token, at, exit_signal))

    async def body(client: EngineClient) -> None:
        innocent = [request for i, request in enumerate(requests) if i not in places]
        undisturbed = await collect(client, innocent)
        results = await each_alone(client, requests)
        for i, (request, result) in enumerate(zip(requests, results, strict=True)):
            if i in places:
                assert isinstance(result, PoisonRequest), (i, result)
            else:
                assert result == undisturbed[request.request_id], i
        assert gauge(client, "bittrue_poison_requests_total") == len(places)
        per_poison = MAX_RESTARTS + 2 if exit_signal == signal.SIGKILL else 3
        assert (gauge(client, "bittrue_engine_restarts_total") or 0) <= (per_poison + 1) * len(places)
        assert is_conserved(await client.fresh_stats())
        assert len(client.journal) == 0
        # Nothing of it stays: the next ones batch as ever.
        assert await collect(client, innocent) == undisturbed

    options = StandinOptions(step_s=0.002, poisons=poisons)
    run_client(tmp_path, body, options=options, max_restarts=MAX_RESTARTS)


def test_20_random_kills_under_32_streams_change_no_token(tmp_path: Path) -> None:
    rng = random.Random(7)

    async def body(client: EngineClient) -> None:
        requests = streams(700)
        undisturbed = await collect(client, requests)
        num_kills = 0

        async def kill() -> None:
            nonlocal num_kills
            while num_kills < 20:
                await asyncio.sleep(rng.uniform(0, 0.08))
                if client.pid is not None:
                    os.kill(client.pid, signal.SIGKILL)
                    num_kills += 1
                    while client.is_up:
                        await asyncio.sleep(0.002)

        killer = asyncio.create_task(kill())
        results = await each_alone(client, requests)
        assert num_kills == 20, "the streams were too short for 20 kills"
        await killer
        assert results == [undisturbed[request.request_id] for request in requests]
        assert gauge(client, "bittrue_poison_requests_total") == 0
        assert (gauge(client, "bittrue_engine_restarts_total") or 0) >= 20
        assert is_conserved(await client.fresh_stats())

    run_client(tmp_path, body, options=StandinOptions(step_s=0.001, max_context=1024, num_pages=8000))


def test_requests_off_probation_batch_together_and_new_ones_wait_behind(tmp_path: Path) -> None:
    async def body(client: EngineClient) -> None:
        requests = streams(40, 8)
        tasks = [asyncio.create_task(outcome(client, request)) for request in requests]
        while (await client.fresh_stats()).num_running < 8:
            await asyncio.sleep(0.01)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        while client.is_up:
            await asyncio.sleep(0.002)
        late = asyncio.create_task(outcome(client, a_request("late", max_tokens=2)))
        most = 0
        while not late.done():
            most = max(most, client.stats.num_running)
            await asyncio.sleep(0.002)
        assert most >= 8  # all at once again, well before they end
        assert not any(task.done() for task in tasks)
        await asyncio.gather(*tasks)

    run_client(tmp_path, body, options=StandinOptions(step_s=0.01))


def test_a_restart_is_told_once_to_every_open_channel(tmp_path: Path) -> None:
    async def body(client: EngineClient) -> None:
        with client.open([a_request("a", max_tokens=50)]) as first, client.open([a_request("b")]) as second:
            first.is_open = True
            await first.next_events()
            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
            told = 0
            while first.unfinished:
                await first.next_events()
                told += first.take_restart()
            assert told == 1
            assert second.take_restart() and not second.take_restart()

    run_client(tmp_path, body, options=StandinOptions(step_s=0.005))


def test_a_flush_tells_what_was_dropped_or_fails(tmp_path: Path) -> None:
    async def succeeds(client: EngineClient) -> None:
        assert (await client.flush()).dropped == {"pages": 3, "snapshots": 1, "host": 4, "disk": 5}

    async def fails(client: EngineClient) -> None:
        with pytest.raises(NotFlushed, match="a file could not be removed"):
            await client.flush()

    async def dies(client: EngineClient) -> None:
        assert client.pid is not None
        os.kill(client.pid, signal.SIGSTOP)
        flushing = asyncio.create_task(client.flush())
        await asyncio.sleep(0)
        os.kill(client.pid, signal.SIGKILL)
        (result,) = await asyncio.gather(flushing, return_exceptions=True)
        assert isinstance(result, BittrueError) and result.status == 503, result

    run_client(tmp_path, succeeds, options=StandinOptions())
    run_client(tmp_path, fails, options=StandinOptions(flush_error="a file could not be removed"))
    run_client(tmp_path, dies, options=StandinOptions())
