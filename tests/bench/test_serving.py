"""Loads are the same everywhere; every request is counted once; streams are read however they were cut."""

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from standins.live_server import LiveServer, write_model

from bittrue.bench.result import decode_result
from bittrue.bench.server import bench_added
from bittrue.bench.serving import Endpoint, Outcome, Recording, read_recording, serve_load
from bittrue.bench.trace import Arrival, Load, make_trace
from bittrue.cli.bench import serving
from bittrue.engine.engine import Engine
from bittrue.errors import UsageError
from bittrue.model.presets import make_checkpoint

VOCAB = 400  # the stand-in's plain ids


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory = tmp_path_factory.mktemp("standin")
    write_model(directory, step_s=0.002)
    with LiveServer(directory, {"max_running": 6, "max_queue": 64}) as live:
        yield live


# ---- traces ----


@pytest.mark.parametrize("kind", ["closed", "poisson", "burst"])
def test_a_trace_is_a_function_of_its_load(kind: str) -> None:
    load = Load(kind=kind, requests=20, concurrency=4, rate=3.0, spread=0.5, seed=9)  # type: ignore[arg-type]
    trace = make_trace(load)
    assert trace == make_trace(load)
    assert trace != make_trace(Load(kind=kind, requests=20, concurrency=4, rate=3.0, spread=0.5, seed=8))  # type: ignore[arg-type]
    assert [a.at_s for a in trace] == sorted(a.at_s for a in trace) and trace[0].at_s == 0.0
    assert all(128 <= len(a.prompt) <= 384 and 32 <= a.output_tokens <= 96 for a in trace)
    assert len({len(a.prompt) for a in trace}) > 5
    assert len({a.prompt for a in trace}) == 20  # no two prompts share a prefix cache by accident


def test_the_written_down_trace_does_not_change() -> None:
    trace = make_trace(Load(kind="poisson", requests=4, rate=2.0, prompt_tokens=3, output_tokens=5, seed=1))
    assert [round(a.at_s, 6) for a in trace] == [0.0, 0.536515, 0.690741, 3.37846]
    assert trace[3].prompt == (310, 389, 409)


def test_arrivals_keep_their_rate() -> None:
    poisson = make_trace(Load(kind="poisson", requests=4001, rate=50.0, prompt_tokens=1))
    assert poisson[-1].at_s == pytest.approx(80, rel=0.1)
    burst = make_trace(Load(kind="burst", requests=12, concurrency=4, rate=2.0))
    assert [a.at_s for a in burst] == [0.0] * 4 + [2.0] * 4 + [4.0] * 4


@pytest.mark.parametrize("bad", [{"requests": 0}, {"rate": 0.0}, {"spread": 1.0}, {"vocab": 5}])
def test_a_load_that_cannot_be_sent_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        Load(**bad)  # type: ignore[arg-type]


# ---- reading streams ----


def recording(*pieces: tuple[float, bytes], status: int = 200) -> Recording:
    return Recording(Arrival(0.0, (1,), 4), 0.0, ended_s=9.0, status=status, pieces=list(pieces))


STREAM = (
    b': keep-alive\n\ndata: {"choices":[{"text":"a","finish_reason":null}]}\n\n'
    b'data: {"choices":[{"text":"","finish_reason":null}],"usage":null}\n\n'
    b'data: {"choices":[{"text":"b","finish_reason":"length"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\ndata: [DONE]\n\n'
)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_a_stream_is_read_however_it_was_cut(newline: bytes) -> None:
    stream = STREAM.replace(b"\n", newline)
    whole = read_recording(recording((1.0, stream)))
    assert (whole.error, whole.num_prompt, whole.num_output, whole.token_times) == ("", 7, 3, (1.0, 1.0))
    for cut in range(1, len(stream)):
        found = read_recording(recording((1.0, stream[:cut]), (2.0, stream[cut:])))
        assert (found.error, found.num_output, len(found.token_times)) == ("", 3, 2)
        # The time of an event is that of its last byte.
        first_end = stream.index(newline * 2, stream.index(b"data")) + 2 * len(newline)
        assert found.token_times[0] == (1.0 if cut >= first_end else 2.0)


def test_times_are_those_of_the_text() -> None:
    outcome = Outcome(recording(), "", token_times=(1.0, 1.5, 3.0), num_prompt=1, num_output=5)
    assert (outcome.ttft_s, outcome.gaps_s, outcome.per_token_s) == (1.0, [0.5, 1.5], 0.5)


@pytest.mark.parametrize(
    ("pieces", "status", "reason"),
    [
        (STREAM[: STREAM.index(b'data: {"choices":[{"text":"b"')], 200, "finish reason"),
        (STREAM[: STREAM.index(b'data: {"choices":[],')], 200, "usage"),
        (STREAM.replace(b'"a"', b'""').replace(b'"b"', b'""'), 200, "no text"),
        (b'data: {"error":{"message":"x"}}\n\n', 200, "error"),
        (b"data: {nonsense}\n\n", 200, "protocol"),
        (b'{"error":"too long"}', 400, "HTTP 400.*too long"),
    ],
)
def test_what_is_not_a_whole_answer_is_an_error_with_its_reason(
    pieces: bytes, status: int, reason: str
) -> None:
    outcome = read_recording(recording((1.0, pieces), status=status))
    assert re.search(reason, outcome.error)


def test_chat_deltas_carry_text_too() -> None:
    delta = '{"choices":[{"delta":{"content":%s},"finish_reason":null}]}'
    lines = [delta % '""', delta % "null", delta % '"x"', '{"choices":[{"delta":{},"finish_reason":"stop"}]}']
    lines += ['{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}', "[DONE]"]
    stream = "".join(f"data: {line}\n\n" for line in lines).encode()
    assert read_recording(recording((4.0, stream))).token_times == (4.0,)


# ---- a live server ----


@pytest.mark.parametrize("kind", ["closed", "poisson", "burst"])
@pytest.mark.parametrize("chat", [False, True])
def test_a_load_is_served_and_counted_by_the_servers_usage(server: LiveServer, kind: str, chat: bool) -> None:
    load = Load(
        kind=kind,  # type: ignore[arg-type]
        requests=12,
        concurrency=4,
        rate=60.0,
        prompt_tokens=20,
        output_tokens=9,
        vocab=VOCAB,
    )
    served = serve_load(Endpoint(server.url, chat=chat), load)
    assert not served.errors
    found = {m.name: m for m in served.measurements(trace=kind)}
    assert found["output"].labels["output_tokens"] == 12 * 9
    if not chat:
        assert found["output"].labels["prompt_tokens"] == 12 * 20
    assert found["errors"].median == 0 and found["errors"].labels["requests"] == 12
    ttft, total = found["time to first token"], found["end to end"]
    assert 0 < ttft.median < total.median <= total.high <= float(total.labels["p99"])
    # The stand-in needs 2 ms a step: no answer of 9 tokens comes sooner.
    assert total.low >= 9 * 0.002 and found["time per output token"].median > 0
    assert server.is_idle_and_conserved()


def test_refused_and_cut_requests_are_counted(server: LiveServer) -> None:
    load = Load(
        requests=5, concurrency=2, prompt_tokens=9000, output_tokens=2, vocab=VOCAB
    )  # beyond its context
    served = serve_load(Endpoint(server.url), load)
    found = {m.name: m for m in served.measurements()}
    assert found["errors"].median == 5 and "output" not in found
    assert all(reason.startswith("HTTP 400") for reason in served.errors)
    late = serve_load(Endpoint(server.url, timeout_s=0.05), Load(requests=2, output_tokens=500, vocab=VOCAB))
    assert dict(late.errors) == {"no end within 0.05 s": 2}
    assert server.is_idle_and_conserved()


def test_a_server_that_hangs_up_is_an_error_not_a_result() -> None:
    with hanging_up(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\ndata:\r\n") as url:
        served = serve_load(Endpoint(url, model="m"), Load(requests=3, concurrency=3))
    assert dict(served.errors) == {"RemoteProtocolError": 3}


def test_a_url_without_a_server_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match="--model"):
        serve_load(Endpoint("http://127.0.0.1:9"), Load(requests=1))


def test_the_verb_prints_the_record_and_fails_where_a_request_did(
    server: LiveServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serving(f"{server.url}/v1", requests=3, output_tokens=2, vocab=VOCAB, json=True) == 0
    result = decode_result(capsys.readouterr().out, source="stdout")
    assert result.benchmark == "serving" and result.find("output", trace="closed") is not None
    assert serving(server.url, requests=2, prompt_tokens=9000, vocab=VOCAB) == 1
    assert "HTTP 400" in capsys.readouterr().err


def test_what_the_server_adds_is_the_difference_to_the_engine_alone(
    server: LiveServer, tmp_path: Path
) -> None:
    engine = Engine(make_checkpoint("tiny", 0, "bf16", tmp_path / "tiny"), threads=1, kv_memory=1 << 22)
    load = Load(requests=4, concurrency=4, prompt_tokens=8, output_tokens=6, vocab=VOCAB)
    found = {m.name: m for m in bench_added(engine, server.url, load, rounds=1)}
    here, there = found["token to token, in process"], found["token to token, over HTTP"]
    assert here.repeats == 1 and here.median > 0 and there.median > 0
    assert found["added to a token"].median == there.median - here.median
    assert 0 < found["client per streamed token"].median < 0.1
    assert engine.stats().pages_held == 0
    assert server.is_idle_and_conserved()


@contextmanager
def hanging_up(answer: bytes) -> Iterator[str]:
    """A server that reads a request, sends ``answer`` and closes the connection."""
    ready, urls, loop = threading.Event(), [], asyncio.new_event_loop()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1]) for line in head.split(b"\r\n") if b"content-length" in line.lower()
        )
        body = json.loads(await reader.readexactly(length))
        assert body["stream"] is True
        writer.write(answer)
        await writer.drain()
        writer.close()

    async def start() -> asyncio.Server:
        listening = await asyncio.start_server(handle, "127.0.0.1", 0)
        urls.append(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
        ready.set()
        return listening

    def run() -> None:
        listening = loop.run_until_complete(start())
        loop.run_forever()
        listening.close()
        loop.run_until_complete(listening.wait_closed())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    try:
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
