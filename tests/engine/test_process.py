import asyncio
import errno
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from standins.ngram_engine import StandinOptions

from bittrue.config.run import RunConfig
from bittrue.engine.launch import EngineProcess
from bittrue.engine.supervisor import EngineClient
from bittrue.engine.types import EngineStats, Request, SamplingParams
from bittrue.errors import (
    BittrueError,
    CheckpointError,
    EngineDied,
    InvalidRequest,
    PoisonRequest,
    PromptTooLong,
    QueueFull,
)
from bittrue.obs.log import Log
from bittrue.obs.metrics import Metrics

FACTORY = "standins.ngram_engine:NgramEngine"


def run_client(
    directory: Path,
    body: Callable[[EngineClient], Awaitable[object]],
    *,
    options: StandinOptions,
    factory: str = FACTORY,
    **knobs: int,
) -> object:
    """Runs ``body`` with a started client and closes it."""
    options.save(directory)

    async def main() -> object:
        config = RunConfig(model=str(directory), **knobs)
        client = EngineClient(config, Log(io.StringIO()), Metrics())
        with EngineProcess.start(config, factory=factory) as process:
            await client.start(process)
            try:
                return await asyncio.wait_for(body(client), 100)
            finally:
                await client.close()

    return asyncio.run(main())


def a_request(
    name: str, *, max_tokens: int = 8, seed: int = 7, prompt: tuple[int, ...] = (20, 21, 22)
) -> Request:
    return Request(request_id=name, prompt=prompt, params=SamplingParams(max_tokens=max_tokens, seed=seed))


async def collect(client: EngineClient, requests: list[Request]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    with client.open(requests) as channel:
        while channel.unfinished:
            for event in await channel.next_events():
                tokens[event.request_id] += event.token_ids
    return tokens


def is_conserved(stats: EngineStats) -> bool:
    return stats.pages_free + stats.pages_held == stats.pages_total and stats.pages_held == 0


def gauge(client: EngineClient, name: str) -> float | None:
    return client.metrics.registry.get_sample_value(name)


def test_tokens_come_back_in_order_and_every_sequence_finishes(tmp_path: Path) -> None:
    async def body(client: EngineClient) -> None:
        requests = [a_request(f"r{i}", max_tokens=5 + i, seed=i) for i in range(6)]
        together = await collect(client, requests)
        alone = {}
        for request in requests:
            alone |= await collect(client, [request])
        assert together == alone
        assert [len(tokens) for tokens in together.values()] == [5, 6, 7, 8, 9, 10]
        assert len(client.journal) == 0
        assert is_conserved(await client.fresh_stats())
        assert gauge(client, "bittrue_generated_tokens_total") == 90
        assert gauge(client, "bittrue_time_to_first_token_seconds_count") == 12

    run_client(tmp_path, body, options=StandinOptions())


@pytest.mark.parametrize("num_before_kill", [0, 1, 7])
def test_killed_engine_is_restarted_and_streams_go_on_with_the_same_tokens(
    tmp_path: Path, num_before_kill: int
) -> None:
    async def body(client: EngineClient) -> None:
        requests = [a_request(f"r{i}", max_tokens=20 + i, seed=i) for i in range(4)]
        undisturbed = await collect(client, requests)
        first_pid = client.pid
        assert first_pid is not None
        tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
        with client.open(requests) as channel:
            is_killed = False
            while channel.unfinished:
                if not is_killed and len(tokens["r0"]) >= num_before_kill:
                    os.kill(first_pid, signal.SIGKILL)
                    is_killed = True
                for event in await channel.next_events():
                    tokens[event.request_id] += event.token_ids
        assert is_killed
        assert tokens == undisturbed
        assert client.pid != first_pid
        assert gauge(client, "bittrue_engine_restarts_total") == 1
        assert is_conserved(await client.fresh_stats())
        # Only the first process had to look through the files.
        assert (tmp_path / "starts.txt").read_text() == "verified=\nverified=standin-files\n"

    run_client(tmp_path, body, options=StandinOptions(step_s=0.005))


def test_request_sent_while_the_engine_is_down_is_served_by_the_next_one(tmp_path: Path) -> None:
    async def body(client: EngineClient) -> None:
        expected = await collect(client, [a_request("r")])
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        while client.is_up:
            await asyncio.sleep(0.005)
        assert await collect(client, [a_request("r")]) == expected

    run_client(tmp_path, body, options=StandinOptions())


def test_a_restart_for_which_the_system_has_no_process_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = EngineProcess.again
    refusals = [OSError(errno.EAGAIN, "no more processes"), OSError(errno.ENOMEM, "no memory")]

    def scarce(process: EngineProcess, *, verified: str) -> EngineProcess:
        if refusals:
            raise refusals.pop()
        return again(process, verified=verified)

    monkeypatch.setattr(EngineProcess, "again", scarce)

    async def body(client: EngineClient) -> None:
        undisturbed = await collect(client, [a_request("r")])
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        assert await collect(client, [a_request("r")]) == undisturbed
        assert refusals == []

    run_client(tmp_path, body, options=StandinOptions())


def test_leaving_the_channel_early_aborts_and_frees_the_memory(tmp_path: Path) -> None:
    async def body(client: EngineClient) -> None:
        with client.open([a_request("r", max_tokens=400)]) as channel:
            await channel.next_events()
            assert (await client.fresh_stats()).pages_held > 0
        assert is_conserved(await client.fresh_stats())
        assert len(client.journal) == 0

    run_client(tmp_path, body, options=StandinOptions(step_s=0.005))


def test_silence_gives_an_empty_batch_after_the_timeout(tmp_path: Path) -> None:
    async def body(client: EngineClient) -> None:
        with client.open([a_request("r", max_tokens=1)]) as channel:
            assert await channel.next_events(timeout_s=0.02) == []
            assert [event.finish_reason for event in await channel.next_events()] == ["length"]

    run_client(tmp_path, body, options=StandinOptions(step_s=0.3))


def test_refusal_by_the_engine_reaches_the_caller_as_the_same_error(tmp_path: Path) -> None:
    async def body(client: EngineClient) -> None:
        with pytest.raises(PromptTooLong, match="600 tokens.* 512 tokens") as caught:
            await collect(client, [a_request("r", prompt=(5,) * 600)])
        assert (caught.value.num_tokens, caught.value.limit, caught.value.status) == (600, 512, 400)
        assert is_conserved(await client.fresh_stats())

    run_client(tmp_path, body, options=StandinOptions())


def test_more_sequences_than_the_queue_holds_are_refused_whole(tmp_path: Path) -> None:
    async def body(client: EngineClient) -> None:
        with client.open([a_request("a"), a_request("b")]):
            with pytest.raises(QueueFull, match="2 sequences are unfinished and the limit is 3"):
                client.open([a_request("c"), a_request("d")])
            with client.open([a_request("c")]):
                assert len(client.journal) == 3
        assert len(client.journal) == 0
        with pytest.raises(InvalidRequest, match="4 sequences, but this server takes at most 3"):
            client.open([a_request(name) for name in "abcd"])
        assert len(client.journal) == 0

    run_client(tmp_path, body, options=StandinOptions(step_s=0.01), max_running=1, max_queue=2)


def test_start_up_failure_names_the_file_and_the_tensor(tmp_path: Path) -> None:
    async def never(client: EngineClient) -> None:
        raise AssertionError("started")

    with pytest.raises(CheckpointError, match="model-00001.safetensors: tensor .* holds a NaN") as caught:
        run_client(tmp_path, never, options=StandinOptions(broken_file="model-00001.safetensors"))
    assert caught.value.file == "model-00001.safetensors"
    assert caught.value.tensor == "layers.0.attn.wq_a.weight"


def test_start_up_failure_of_an_unforeseen_kind_tells_its_text(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def never(client: EngineClient) -> None:
        raise AssertionError("started")

    with pytest.raises(EngineDied, match="ModuleNotFoundError.*no_such_module"):
        run_client(tmp_path, never, options=StandinOptions(), factory="no_such_module:Engine")
    assert "Traceback" in capfd.readouterr().err


def test_a_request_that_kills_the_engine_is_given_up_and_the_server_lives(tmp_path: Path) -> None:
    async def body(client: EngineClient) -> None:
        with pytest.raises(PoisonRequest, match="died each time it ran this request"):
            await collect(client, [a_request("poison", prompt=(20, 666))])
        assert len((await collect(client, [a_request("good")]))["good"]) == 8
        assert is_conserved(await client.fresh_stats())

    run_client(tmp_path, body, options=StandinOptions(crash_on=[666]))


def test_an_engine_that_cannot_be_kept_alive_fails_every_request_and_tells_the_server(tmp_path: Path) -> None:
    told: list[BittrueError] = []

    async def body(client: EngineClient) -> None:
        client.on_dead = told.append
        with pytest.raises(EngineDied, match="died without a token, 1 in a row"):
            await collect(client, [a_request("poison", prompt=(20, 666))])
        with pytest.raises(EngineDied):
            client.open([a_request("later")])
        assert len(client.journal) == 0
        assert len(told) == 1

    run_client(tmp_path, body, options=StandinOptions(crash_on=[666]), max_restarts=0)


def test_engine_process_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    StandinOptions(step_s=0.01).save(tmp_path)
    program = f"""
import asyncio, sys
sys.path[:] = {sys.path!r}
from bittrue.config.run import RunConfig
from bittrue.engine.launch import EngineProcess
from bittrue.engine.supervisor import EngineClient
from bittrue.obs.log import Log
from bittrue.obs.metrics import Metrics
from engine.test_process import a_request
async def main():
    config = RunConfig(model={str(tmp_path)!r})
    client = EngineClient(config, Log(sys.stderr), Metrics())
    await client.start(EngineProcess.start(config, factory={FACTORY!r}))
    client.open([a_request("r", max_tokens=300)])
    print(client.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    engine_pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while _is_alive(engine_pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _is_alive(engine_pid)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
