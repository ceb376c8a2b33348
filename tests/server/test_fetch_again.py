"""Answers fetched again: by id, after kill -9 of the server, by their owner only, for a time."""

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from standins.live_server import MODEL, LiveServer, write_model

TEXT, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"
CHAT_BODY = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "say CALL"}],
    "seed": 3,
    "max_tokens": 400,
    "logprobs": True,
    "top_logprobs": 2,
    "thinking": {"type": "enabled"},
    "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}],
}
BODIES: dict[str, dict[str, Any]] = {
    TEXT: {
        "model": MODEL,
        "prompt": ["a", "b"],
        "n": 2,
        "seed": 3,
        "max_tokens": 20,
        "logprobs": 1,
        "echo": True,
    },
    CHAT: CHAT_BODY,
    GENERATE: {
        "prompt": "hello",
        "sampling": {"seed": 3, "max_tokens": 20, "logprobs": 1, "prompt_logprobs": 0},
    },
}


def fetch(server: LiveServer, request_id: str, **headers: str) -> httpx.Response:
    return server.http.get(f"/v1/requests/{request_id}", headers=headers)


def without_names(body: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps({k: v for k, v in body.items() if k not in ("id", "created", "request_id")})
    call_ids = {
        call["id"] for c in body.get("choices", []) for call in c.get("message", {}).get("tool_calls", [])
    }
    for call_id in call_ids:
        text = text.replace(call_id, "call")
    plain: dict[str, Any] = json.loads(text)
    return plain


@pytest.mark.parametrize("path", BODIES)
def test_whole_and_streamed_answers_are_fetched_as_one_body(server: LiveServer, path: str) -> None:
    whole = server.post(path, BODIES[path], headers={"x-request-id": f"mine-{path}"})
    assert whole.status_code == 200, whole.text
    for name in (whole.json().get("id") or whole.json()["request_id"], f"mine-{path}"):
        again = fetch(server, name)
        assert (again.status_code, again.content) == (200, whole.content)
    with server.http.stream("POST", path, json={**BODIES[path], "stream": True}) as response:
        name = response.headers["x-request-id"]
        assert list(response.iter_lines())[-2] == "data: [DONE]"
    streamed = fetch(server, name)
    assert streamed.status_code == 200
    assert without_names(streamed.json()) == without_names(whole.json())


def test_ids_that_are_not_known_get_404(server: LiveServer) -> None:
    answer = fetch(server, "chatcmpl-0000")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "request_not_found")
    text = server.http.get("/metrics").text
    assert 'endpoint="/v1/requests/{request_id}"' in text and "chatcmpl-0000" not in text


class Restarted:
    """Servers one after the other over the same model and journal."""

    def __init__(self, directory: Path, *, step_s: float = 0.0, **knobs: Any) -> None:
        model = directory / "model"
        model.mkdir()
        write_model(model, step_s=step_s)
        self.model, self.knobs = model, {"journal_dir": str(directory / "journal"), **knobs}

    def __call__(self) -> LiveServer:
        return LiveServer(self.model, self.knobs)


def kill(server: LiveServer) -> None:
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "hello", "seed": 4, "max_tokens": 30, **fields}


def test_a_killed_server_gives_its_answers_after_a_restart(tmp_path: Path) -> None:
    restarted = Restarted(tmp_path, step_s=0.005)
    with restarted() as first:
        whole = first.post(TEXT, ask(), headers={"x-request-id": "whole"})
        streamed = first.stream(TEXT, ask(stream=True))
        texts: list[str] = []
        begun = threading.Event()

        def read() -> None:
            body = ask(max_tokens=4000, stream=True)
            try:
                with first.http.stream("POST", TEXT, json=body, headers={"x-request-id": "cut"}) as response:
                    for line in response.iter_lines():
                        if line.startswith("data: {"):
                            texts.append(json.loads(line[6:])["choices"][0]["text"])
                            if len(texts) == 10:
                                begun.set()
            except httpx.TransportError:
                return

        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(20)
        running = fetch(first, "cut")
        assert (running.status_code, running.json()["error"]["code"]) == (409, "request_running")
        kill(first)
        reader.join()
    with restarted() as second:
        again = fetch(second, "whole")
        assert (again.status_code, again.content) == (200, whole.content)
        collected = fetch(second, streamed[0]["id"])
        assert collected.status_code == 200
        assert collected.json()["choices"] == whole.json()["choices"]
        cut = fetch(second, "cut")
        assert (cut.status_code, cut.json()["error"]["code"]) == (410, "response_interrupted")
        (choice,) = cut.json()["response"]["choices"]
        told = "".join(texts)
        assert cut.json()["response"]["state"] == "interrupted"
        assert choice["text"].startswith(told) and len(choice["token_ids"]) >= len(texts)
        assert choice["finish_reason"] is None
        assert second.process.poll() is None
        second.process.send_signal(signal.SIGTERM)
        assert second.wait() == 0
    with restarted() as third:  # after an orderly end as well
        assert fetch(third, "whole").content == whole.content
        assert fetch(third, "cut").status_code == 410


def test_a_client_that_went_away_finds_what_there_was(server: LiveServer) -> None:
    with server.http.stream(
        "POST", TEXT, json=ask(max_tokens=8000, stream=True), headers={"x-request-id": "gone"}
    ) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 10
    while (answer := fetch(server, "gone")).status_code == 409 and time.monotonic() < deadline:
        time.sleep(0.02)
    if answer.status_code == 200:  # it was faster than the disconnect
        return
    assert answer.status_code == 410
    assert "client closed the connection" in answer.json()["error"]["message"]
    assert len(answer.json()["response"]["choices"][0]["token_ids"]) >= 1


def test_answers_expire(tmp_path: Path) -> None:
    restarted = Restarted(tmp_path, keep_responses_s=0.6)
    with restarted() as server:
        name = server.post(TEXT, ask()).json()["id"]
        assert fetch(server, name).status_code == 200
        time.sleep(0.7)
        assert fetch(server, name).status_code == 404
    with restarted() as server:
        assert fetch(server, name).status_code == 404


def test_only_the_key_a_request_was_made_with_fetches_it(tmp_path: Path) -> None:
    restarted = Restarted(tmp_path, api_key="alpha, beta", cache_isolation=True)
    keys = {name: {"authorization": f"Bearer {name}"} for name in ("alpha", "beta", "gamma")}
    with restarted() as first:
        for name in ("alpha", "beta"):
            made = first.post(TEXT, ask(prompt=name), headers={**keys[name], "x-request-id": "same"})
            assert made.status_code == 200
        body_of_beta = made.content
        assert first.post(TEXT, ask(), headers=keys["gamma"]).status_code == 401
        assert first.post(TEXT, ask(), headers={"authorization": "Bearer alpha, beta"}).status_code == 401
        kill(first)
    written = b"".join(path.read_bytes() for path in (tmp_path / "journal").iterdir())
    assert b"alpha" not in written and b"beta" not in written
    with restarted() as second:
        assert fetch(second, "same", **keys["beta"]).content == body_of_beta
        assert fetch(second, "same", **keys["alpha"]).content not in (b"", body_of_beta)
        name = json.loads(body_of_beta)["id"]
        assert fetch(second, name, **keys["beta"]).status_code == 200
        assert fetch(second, name, **keys["alpha"]).status_code == 404
        assert fetch(second, name, **keys["gamma"]).status_code == 401
        assert fetch(second, name).status_code == 401


def test_a_journal_that_cannot_be_used_ends_the_start_with_2(tmp_path: Path) -> None:
    restarted = Restarted(tmp_path)
    (tmp_path / "journal").write_text("a file")
    server = restarted()
    server.start()
    assert server.wait() == 2
    assert server.process.stderr is not None
    server.process.stderr.close()
    log = "".join(server.log)
    assert "journal_dir: cannot use" in log and "Traceback" not in log
