"""A long prefill is seen while it runs: in the stream, in the log and in the metrics."""

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from standins.live_server import MODEL, LiveServer, write_model

from bittrue.kv.layout import KVBudget

NUM_PROMPT = 3_200
STEP_TOKENS = 100
STEP_S = 0.085  # 32 steps: longer than the two seconds after which the log speaks


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory = tmp_path_factory.mktemp("slow")
    write_model(directory, prefill_tokens=STEP_TOKENS, step_s=STEP_S)
    with LiveServer(directory, {"keepalive_s": 0.25}) as server:
        yield server


def metric(server: LiveServer, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", server.http.get("/metrics").text, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def ask(num_prompt: int = NUM_PROMPT) -> dict[str, object]:
    return {"model": MODEL, "prompt": [5] * num_prompt, "max_tokens": 3, "seed": 1, "ignore_eos": True}


def test_comment_lines_log_and_metrics_tell_how_far_a_prefill_is(slow: LiveServer) -> None:
    during: list[tuple[float, float]] = []

    def watch() -> None:
        time.sleep(1.0)
        during.append(
            (metric(slow, "bittrue_prefill_tokens_done"), metric(slow, "bittrue_prefill_tokens_remaining"))
        )

    watcher = threading.Thread(target=watch)
    watcher.start()
    with slow.http.stream("POST", "/v1/completions", json={**ask(), "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
    watcher.join()
    first_data = next(i for i, line in enumerate(lines) if line.startswith("data: "))
    told = [re.fullmatch(r": prefill (\d+)/(\d+)", line) for line in lines[:first_data]]
    numbers = [(int(found[1]), int(found[2])) for found in told if found is not None]
    assert len(numbers) == len(told) >= 4
    done = [one for one, _ in numbers]
    assert done == sorted(set(done)) and 0 < done[0] and done[-1] < NUM_PROMPT
    assert {total for _, total in numbers} == {NUM_PROMPT}
    assert all(one % STEP_TOKENS == 0 for one in done)

    done_then, left_then = during[0]
    assert 0 < done_then < NUM_PROMPT and 0 < left_then < NUM_PROMPT
    assert metric(slow, "bittrue_prefill_tokens_done") == 0
    assert metric(slow, "bittrue_prefill_tokens_remaining") == 0

    slow.wait_for_log(" prefilled ")
    said = [line for line in slow.log if " prefill id=cmpl-" in line]
    assert len(said) == 1  # at two seconds; the next would come at seven
    assert re.search(rf"tokens=\d+/{NUM_PROMPT} tokens_per_s=\S+ left_s=\S+$", said[0].strip()), said
    ended = next(line for line in slow.log if " prefilled " in line)
    assert f" tokens={NUM_PROMPT} " in ended


def test_the_openai_client_reads_over_the_comments(slow: LiveServer) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{slow.url}/v1", api_key="none", max_retries=0, timeout=20
        ) as client:
            stream = await client.completions.create(
                model=MODEL, prompt=[5] * 1200, max_tokens=3, seed=1, stream=True
            )
            return [chunk.choices[0].text async for chunk in stream]

    texts = asyncio.run(run())
    alone = slow.post("/v1/completions", {**ask(1200), "ignore_eos": False}).json()["choices"][0]["text"]
    assert "".join(texts) == alone


def test_a_short_prefill_leaves_no_trace_in_the_log(slow: LiveServer) -> None:
    before = len([line for line in slow.log if " prefill" in line])
    assert slow.post("/v1/completions", ask(300)).status_code == 200
    assert len([line for line in slow.log if " prefill" in line]) == before


def test_a_prompt_beyond_the_kv_memory_is_told_the_bytes_that_would_hold_it(tmp_path: Path) -> None:
    write_model(tmp_path, num_pages=4)
    with LiveServer(tmp_path, {"max_running": 3}) as server:
        answer = server.post("/v1/completions", ask(1000))
        # The stand-in says: 100 bytes a page, 1000 a state slot. One token of output must fit behind.
        needed = KVBudget(100, 1000, 3).needed_for(1001)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert f"--kv-memory (it needs {needed} bytes)" in error["message"], error
        assert error["code"] == "context_length_exceeded"
        beyond = server.post("/v1/completions", ask(9000)).json()["error"]["message"]
        assert "context of this server is 8192" in beyond and "--max-context" in beyond


def test_the_ledger_and_what_is_resident_are_metrics(slow: LiveServer) -> None:
    text = slow.http.get("/metrics").text
    assert 'bittrue_memory_bytes{kind="process"} 1.048576e+06' in text
    held = dict(re.findall(r'bittrue_resident_bytes\{pages="(?:own)",process="(\w+)"\} (\S+)', text))
    assert set(held) == {"engine", "server"}
    assert all(5e6 < float(num_bytes) < 1e9 for num_bytes in held.values())
    assert any(" memory weights=0 process=1048576 total=1048576" in line for line in slow.log)
