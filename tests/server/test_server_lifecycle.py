import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from standins.live_server import MODEL, LiveServer, write_model

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"


def ask(prompt: str | list[int] = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "seed": 4, **fields}


@contextmanager
def live(directory: Path, knobs: dict[str, Any] | None = None, **options: Any) -> Iterator[LiveServer]:
    write_model(directory, **options)
    with LiveServer(directory, knobs or {}) as server:
        yield server


@pytest.fixture(scope="module")
def paced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server of 100 steps a second whose engine dies of a prompt with a tilde."""
    directory = tmp_path_factory.mktemp("paced")
    poison = write_model(directory).encode_text("~")
    with live(directory, step_s=0.01, crash_on=poison) as server:
        yield server


def num_restarts(server: LiveServer) -> int:
    lines = server.http.get("/metrics").text.splitlines()
    return next(
        int(float(line.split()[1])) for line in lines if line.startswith("bittrue_engine_restarts_total")
    )


def text_of(events: list[Any]) -> str:
    return "".join(e["choices"][0]["text"] for e in events if isinstance(e, dict) and e["choices"])


class Background:
    """A streamed request in a thread; ``events`` grows as it comes."""

    def __init__(self, server: LiveServer, body: dict[str, Any]) -> None:
        self.events: list[Any] = []
        self.begun = threading.Event()
        self._http, self._body = server.http, {**body, "stream": True}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # A connection that is cut ends the events as well; which ones came is for the test to judge.
        with (
            suppress(httpx.RemoteProtocolError),
            self._http.stream("POST", TEXT, json=self._body) as response,
        ):
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line[6:] if line == "data: [DONE]" else json.loads(line[6:]))
                    self.begun.set()

    def join(self) -> list[Any]:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.events


def test_engine_killed_mid_stream_and_the_clients_see_the_same_text(paced: LiveServer) -> None:
    bodies = [ask(f"hello {i}", max_tokens=60, seed=i) for i in range(3)]
    undisturbed = [text_of(paced.stream(TEXT, {**body, "stream": True})) for body in bodies]
    before = num_restarts(paced)
    streams = [Background(paced, body) for body in bodies]
    for stream in streams:
        assert stream.begun.wait(10)
    paced.kill_engine()
    disturbed = [stream.join() for stream in streams]
    assert [text_of(events) for events in disturbed] == undisturbed
    assert all(events[-1] == "[DONE]" for events in disturbed)
    assert num_restarts(paced) == before + 1
    assert paced.http.get("/health").json()["status"] == "ok"
    assert paced.is_idle_and_conserved()


def test_whole_answer_survives_the_death_of_the_engine(paced: LiveServer) -> None:
    body = ask(max_tokens=60, logprobs=1, echo=True)
    undisturbed = paced.post(TEXT, body).json()["choices"]
    before = num_restarts(paced)
    killer = threading.Timer(0.3, paced.kill_engine)
    killer.start()
    assert paced.post(TEXT, body).json()["choices"] == undisturbed
    killer.join()
    assert num_restarts(paced) == before + 1


def test_request_that_kills_the_engine_gets_500_and_the_server_lives(paced: LiveServer) -> None:
    answer = paced.post(TEXT, ask("~"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "poison_request")
    assert answer.headers["x-should-retry"] == "false"
    assert "was given up" in answer.json()["error"]["message"]
    assert paced.post(TEXT, ask()).status_code == 200
    assert paced.is_idle_and_conserved()


def test_client_that_goes_away_frees_the_memory(paced: LiveServer) -> None:
    with paced.http.stream("POST", TEXT, json=ask(max_tokens=4000, stream=True)) as response:
        lines = response.iter_lines()
        next(lines)
        assert paced.stats()["pages_held"] > 0
    assert paced.is_idle_and_conserved()
    with pytest.raises(httpx.ReadTimeout):
        paced.post(TEXT, ask(max_tokens=4000), timeout=0.3)
    assert paced.is_idle_and_conserved()
    with pytest.raises(httpx.ReadTimeout):
        paced.post(CHAT, {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}, timeout=0.3)
    assert paced.is_idle_and_conserved()


def test_full_queue_gets_429_with_retry_after(tmp_path: Path) -> None:
    knobs = {"max_running": 1, "max_queue": 1, "keepalive_s": 0.1}
    with live(tmp_path, knobs, step_s=0.01) as server:
        body = ask(max_tokens=8000, stream=True)
        with server.http.stream("POST", TEXT, json=body), server.http.stream("POST", TEXT, json=body):
            for stream in (False, True):
                refused = server.post(TEXT, ask(stream=stream))
                assert refused.status_code == 429
                assert int(refused.headers["retry-after"]) >= 1
                assert refused.json()["error"]["code"] == "queue_full"
        assert server.is_idle_and_conserved()
        never = server.post(TEXT, ask(n=3))
        assert (never.status_code, never.json()["error"]["param"]) == (400, "n")
        assert server.post(TEXT, ask(n=2)).status_code == 200
        assert server.is_idle_and_conserved()


def test_sigterm_drains_then_exits_0(tmp_path: Path) -> None:
    with live(tmp_path, step_s=0.01) as server:
        stream = Background(server, ask(max_tokens=150))
        assert stream.begun.wait(10)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log(" draining ")
        refused = server.post(TEXT, ask())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        health = server.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "draining")
        events = stream.join()
        assert events[-1] == "[DONE]"
        assert [e["choices"][0]["finish_reason"] for e in events if isinstance(e, dict)][-1] == "length"
        assert server.wait() == 0


def test_drain_timeout_ends_what_is_left_with_an_error_and_exits_0(tmp_path: Path) -> None:
    with live(tmp_path, {"drain_timeout_s": 0.3}, step_s=0.01) as server:
        stream = Background(server, ask(max_tokens=8000))
        assert stream.begun.wait(10)
        server.process.send_signal(signal.SIGTERM)
        assert stream.join()[-1]["error"]["code"] == "draining"
        assert server.wait() == 0


def test_second_signal_ends_at_once(tmp_path: Path) -> None:
    with live(tmp_path, step_s=0.01) as server:
        stream = Background(server, ask(max_tokens=8000))
        assert stream.begun.wait(10)
        server.process.send_signal(signal.SIGINT)
        server.wait_for_log(" draining ")
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 0
        assert "Traceback" not in "".join(server.log)


@pytest.mark.parametrize("moment", [" loading ", " engine_ready ", " serving "])
def test_sigterm_at_any_moment_of_the_start_exits_0(tmp_path: Path, moment: str) -> None:
    write_model(tmp_path)
    server = LiveServer(tmp_path)
    server.start()
    try:
        server.wait_for_log(moment, 60)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    finally:
        server.process.kill()
        assert server.process.stderr is not None
        server.process.stderr.close()
    assert server.log[-1].rstrip().endswith("stopped")


def test_loading_is_told_and_malformed_http_is_one_log_line(tmp_path: Path) -> None:
    with live(tmp_path) as server:
        with socket.create_connection((server.http.base_url.host, server.http.base_url.port)) as client:
            client.sendall(b"NONSENSE\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 400 ")
        server.wait_for_log(' WARNING http message="Invalid HTTP request received."')
        assert any(" loaded " in line for line in server.log)


def test_context_is_what_the_kv_memory_holds(tmp_path: Path) -> None:
    with live(tmp_path, num_pages=4) as server:
        assert server.http.get("/v1/models").json()["data"][0]["max_model_len"] == 512
        error = server.post(TEXT, ask([5] * 600)).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "600" in error["message"] and "512" in error["message"] and "--kv-memory" in error["message"]
        server.wait_for_log(" context_limited ")


def test_silence_is_broken_by_comment_lines(tmp_path: Path) -> None:
    with live(tmp_path, {"keepalive_s": 0.1}, step_s=0.35) as server:
        with server.http.stream("POST", TEXT, json=ask(max_tokens=2, stream=True)) as response:
            lines = list(response.iter_lines())
        first_data = next(i for i, line in enumerate(lines) if line.startswith("data: "))
        assert lines[:first_data].count(": keep-alive") >= 2
        assert lines[-2:] == ["data: [DONE]", ""]


def test_corrupt_checkpoint_exits_2_and_names_file_and_tensor(tmp_path: Path) -> None:
    write_model(tmp_path, broken_file="model-00002-of-00003.safetensors")
    code, log = ended(tmp_path)
    assert code == 2
    assert "model-00002-of-00003.safetensors: tensor layers.0.attn.wq_a.weight holds a NaN" in log
    assert "Traceback" not in log


@pytest.mark.parametrize("kind", ["no directory", "no tokenizer", "broken tokenizer"])
def test_directory_that_is_no_checkpoint_exits_2_and_says_so(tmp_path: Path, kind: str) -> None:
    write_model(tmp_path)
    if kind == "no directory":
        code, log = ended(tmp_path / "nothing")
        assert "is not a directory" in log
    elif kind == "no tokenizer":
        (tmp_path / "tokenizer.json").unlink()
        code, log = ended(tmp_path)
        assert "cannot read" in log
    else:
        (tmp_path / "tokenizer.json").write_text("{")
        code, log = ended(tmp_path)
        assert "tokenizer.json is not JSON" in log
    assert code == 2
    assert "Traceback" not in log


def test_tokenizer_of_another_model_exits_2(tmp_path: Path) -> None:
    write_model(tmp_path, vocab_size=500)
    code, log = ended(tmp_path)
    assert code == 2
    assert "tokenizer.json has 512 ids, but the model knows 500" in log
    assert "Traceback" not in log


def test_address_of_another_machine_exits_2_and_names_the_host(tmp_path: Path) -> None:
    write_model(tmp_path)
    code, log = ended(tmp_path, {"host": "192.0.2.1"})
    assert code == 2
    assert "as --host" in log


def test_port_in_use_exits_2_before_anything_loads(tmp_path: Path) -> None:
    write_model(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, log = ended(tmp_path, {"port": taken.getsockname()[1]})
    assert code == 2
    assert "cannot listen on 127.0.0.1 port" in log
    assert "engine_ready" not in log


def ended(directory: Path, knobs: dict[str, Any] | None = None) -> tuple[int, str]:
    """Exit code and stderr of a server that does not start."""
    server = LiveServer(directory, knobs or {})
    server.start()
    try:
        code = server.wait()
    except subprocess.TimeoutExpired:
        server.process.kill()
        raise
    assert server.process.stderr is not None
    server.process.stderr.close()
    return code, "".join(server.log)


def test_engine_that_cannot_be_kept_alive_is_told_with_503_until_the_server_exits_2(tmp_path: Path) -> None:
    poison = write_model(tmp_path).encode_text("~")
    with live(tmp_path, {"max_restarts": 0, "drain_timeout_s": 1.5}, crash_on=poison) as server:
        assert server.http.get("/health").json()["status"] == "ok"
        for prompt in ("~", "hello"):
            refused = server.post(TEXT, ask(prompt))
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_died")
            assert "died without a token, 1 in a row" in refused.json()["error"]["message"]
        health = server.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert health.json()["reason"] == refused.json()["error"]["message"]
        assert server.post("/admin/flush", {}).status_code == 503
        assert server.wait() == 2
        assert any("engine_given_up" in line for line in server.log)


def test_engine_that_dies_of_every_request_is_given_up_after_some(tmp_path: Path) -> None:
    poison = write_model(tmp_path).encode_text("~")
    with live(tmp_path, {"max_restarts": 1, "drain_timeout_s": 0.2}, crash_on=poison) as server:
        codes = [server.post(TEXT, ask("~")).json()["error"]["code"] for _ in range(2)]
        assert codes == ["poison_request", "engine_died"]
        assert server.wait() == 2


def test_slow_reader_gets_everything_and_disturbs_nobody(server: LiveServer) -> None:
    body = ask(max_tokens=3000, logprobs=3, stream=True)
    with server.http.stream("POST", TEXT, json=body) as response:
        pieces = response.iter_raw(1024)
        first = next(pieces)
        started_s = time.monotonic()
        assert server.post(TEXT, ask(max_tokens=10)).status_code == 200
        assert time.monotonic() - started_s < 5
        raw = first + b"".join(pieces)
    assert raw.endswith(b"data: [DONE]\n\n")
    events = [json.loads(line[6:]) for line in raw.decode().split("\n\n") if line.startswith("data: {")]
    whole = server.post(TEXT, {**body, "stream": False}).json()["choices"][0]["text"]
    assert text_of(events) == whole
