"""The program itself: `bittrue serve` on a small checkpoint, driven by the official OpenAI client and by
HTTP."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from standins.live_server import LiveServer

from bittrue.engine.engine import Engine
from bittrue.engine.types import Choices, Request, SamplingParams
from bittrue.model.presets import make_checkpoint

MODEL = "tiny-fp4"
NUM_STREAMS = 64


class Program(LiveServer):
    """`bittrue serve DIRECTORY` as its users start it."""

    def start(self) -> None:
        knobs = [f"--{name.replace('_', '-')}={value}" for name, value in self.knobs.items()]
        command = [sys.executable, "-m", "bittrue.cli.main", "serve", str(self.directory), "--port=0", *knobs]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("tiny", 3, "fp4", tmp_path_factory.mktemp("real") / MODEL)


@pytest.fixture(scope="module")
def program(directory: Path) -> Iterator[Program]:
    knobs = {
        "threads": 1,
        "kv_memory": "64MiB",
        "max_step_tokens": 96,
        "max_running": 24,
        "max_context": 2048,
    }
    with Program(directory, knobs) as live:
        yield live


def engine_children(program: Program) -> list[int]:
    path = Path(f"/proc/{program.process.pid}/task/{program.process.pid}/children")
    return [int(child) for child in path.read_text().split()]


def completion(i: int) -> dict[str, Any]:
    """The i-th of a set of differing requests: lengths, temperatures, filters, penalties,
    log-probabilities."""
    return {
        "model": MODEL,
        "prompt": [(7 * i + 13 * j) % 900 for j in range(1 + 9 * (i % 7))],
        "max_tokens": 8 + i % 5,
        "seed": i,
        "temperature": [1.0, 0.0, 0.8][i % 3],
        "top_p": [1.0, 0.9][i % 2],
        "frequency_penalty": [0.0, 0.5][i % 2],
        "logprobs": 2,
        "extra_body": {"ignore_eos": True, "return_token_ids": True} if i % 4 == 0 else {"ignore_eos": True},
    }


async def stream_one(client: openai.AsyncOpenAI, i: int) -> tuple[str, list[float]]:
    request = completion(i)
    request["extra_body"].pop("return_token_ids", None)
    text, logprobs = "", []
    async for chunk in await client.completions.create(**request, stream=True):
        for choice in chunk.choices:
            text += choice.text
            if choice.logprobs is not None:
                logprobs += choice.logprobs.token_logprobs or []
    return text, logprobs


def test_64_concurrent_streams_each_equal_their_solo_run(program: Program) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{program.url}/v1", api_key="none", max_retries=0, timeout=120
        ) as client:
            together = await asyncio.gather(*(stream_one(client, i) for i in range(NUM_STREAMS)))
            for i in range(NUM_STREAMS):
                assert await stream_one(client, i) == together[i], i
            assert all(len(logprobs) == 8 + i % 5 for i, (_, logprobs) in enumerate(together))

    asyncio.run(run())
    stats = program.http.get("/admin/stats").json()
    assert stats["pages_held"] == stats["slots_held"] == 0
    assert stats["pages_free"] + stats["pages_cached"] == stats["pages_total"]
    assert stats["slots_free"] + stats["slots_cached"] == stats["slots_total"]


def test_the_server_gives_the_engines_tokens(program: Program, directory: Path) -> None:
    prompt = [5, 77, 300, 12]
    body = {
        "prompt": prompt,
        "model": MODEL,
        "max_tokens": 12,
        "seed": 5,
        "temperature": 1.0,
        "ignore_eos": True,
    }
    answer = program.http.post("/v1/completions", json={**body, "logprobs": 0}).json()
    engine = Engine(directory, kv_memory="16MiB", max_context=2048, threads=1)
    tokens = engine.generate([prompt], SamplingParams(max_tokens=12, seed=5, ignore_eos=True))[0]
    assert answer["choices"][0]["text"] == engine.parts.tokenizer.decode(tokens, skip_special=True)
    scores = engine.score((*prompt, *tokens))[len(prompt) - 1 :]
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(scores, abs=0)
    assert answer["system_fingerprint"] == engine.parts.weight_version


def test_generate_tells_what_was_chosen_for_its_tokens(program: Program, directory: Path) -> None:
    prompt = list(range(5, 90))
    body = {
        "prompt_ids": prompt,
        "record": True,
        "sampling": {"max_tokens": 6, "temperature": 0, "ignore_eos": True},
    }
    answer = program.http.post("/generate", json=body).json()
    engine = Engine(directory, kv_memory="32MiB", threads=1, max_context=2048, log_level="error")
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    engine.add(Request(request_id="r", prompt=tuple(prompt), params=params, records_choices=True))
    last = None
    while engine.has_work():
        last = next(iter(engine.step()[-1:]), last)
    engine.close()
    assert last is not None and last.choices is not None
    assert msgspec.convert(answer["record"], Choices) == last.choices
    del body["record"]
    assert program.http.post("/generate", json=body).json()["record"] is None


def test_echo_gives_the_scores_of_the_prompt(program: Program, directory: Path) -> None:
    prompt = [5, 77, 300, 12, 9, 41]
    body = {"prompt": prompt, "model": MODEL, "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = program.http.post("/v1/completions", json=body).json()
    engine = Engine(directory, kv_memory="16MiB", max_context=2048, threads=1)
    got = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert got[0] is None
    assert got[1:] == engine.score(prompt)


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


def test_strict_json_schema_holds_even_for_a_model_that_talks_noise(program: Program) -> None:
    with openai.OpenAI(base_url=f"{program.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        for seed in range(3):
            answer = client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "give me json"}],
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "pair", "strict": True, "schema": SCHEMA},
                },
                max_tokens=300,
                seed=seed,
            )
            choice = answer.choices[0]
            if choice.finish_reason == "stop":
                value = json.loads(choice.message.content or "")
                assert set(value) == {"n", "ok"} and 0 <= value["n"] <= 99 and isinstance(value["ok"], bool)
            else:  # noise may fill the budget with white space, which the grammar allows
                assert choice.finish_reason == "length"


def test_a_named_tool_choice_gives_a_call_with_valid_arguments(program: Program) -> None:
    tool: Any = {
        "type": "function",
        "function": {
            "name": "set_level",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"level": {"type": "integer", "minimum": 1, "maximum": 9}},
                "required": ["level"],
                "additionalProperties": False,
            },
        },
    }
    with openai.OpenAI(base_url=f"{program.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "set it"}],
            tools=[tool],
            tool_choice={"type": "function", "function": {"name": "set_level"}},
            max_tokens=200,
            seed=1,
        )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.function.name == "set_level"
    assert 1 <= json.loads(call.function.arguments)["level"] <= 9


def test_a_killed_engine_process_does_not_change_a_stream(program: Program) -> None:
    request = {
        "model": MODEL,
        "prompt": [9, 8, 7],
        "max_tokens": 300,
        "seed": 11,
        "ignore_eos": True,
        "stream": True,
        "temperature": 1.0,
    }

    def text_of(kill_after: int | None) -> str:
        text, chunks = "", 0
        with program.http.stream("POST", "/v1/completions", json=request, timeout=120) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    chunks += 1
                    if chunks == kill_after:
                        (child,) = engine_children(program)
                        os.kill(child, signal.SIGKILL)
        return text

    undisturbed = text_of(None)
    assert text_of(20) == undisturbed
    stats = program.http.get("/admin/stats").json()
    assert stats["pages_held"] == 0 and stats["slots_held"] == 0


def test_bad_input_of_every_kind_leaves_all_memory_free(program: Program) -> None:
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
    cases: list[tuple[dict[str, Any], int, str | None]] = [
        ({**chat, "temperatur": 1}, 400, "temperatur"),
        ({**chat, "temperature": "hot"}, 400, "temperature"),
        ({**chat, "temperature": 9}, 400, "temperature"),
        ({**chat, "model": "other"}, 404, None),
        ({**chat, "max_tokens": 1_000_000}, 400, None),
        ({**chat, "messages": [{"role": "user", "content": "word " * 9000}]}, 400, None),
        ({**chat, "logit_bias": {"99999999": 1}}, 400, None),
    ]
    for body, status, param in cases:
        response = program.http.post("/v1/chat/completions", json=body)
        error = response.json()["error"]
        assert response.status_code == status, (body, error)
        assert param is None or param in (error["param"] or ""), error
    stats = program.http.get("/admin/stats").json()
    assert stats["pages_held"] == stats["slots_held"] == 0
    assert stats["pages_free"] + stats["pages_cached"] == stats["pages_total"]
    assert stats["slots_free"] + stats["slots_cached"] == stats["slots_total"]


def test_a_corrupt_checkpoint_ends_the_program_naming_file_and_tensor(tmp_path: Path) -> None:
    made = make_checkpoint("tiny", 0, "f32", tmp_path / "broken")
    shard = made / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"  # a NaN as the last float
    shard.write_bytes(bytes(data))
    done = subprocess.run(
        [sys.executable, "-m", "bittrue.cli.main", "serve", str(made), "--port=0"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "model.safetensors" in done.stderr and "NaN" in done.stderr, done.stderr
