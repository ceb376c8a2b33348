"""The cache as clients and operators see it: salts, usage, flush, numbers, and streams over a restart."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from standins.live_server import MODEL, LiveServer, write_model

TEXT, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": [5, 6, 7, 8, 9], "seed": 4, "max_tokens": 6, **fields}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 6, **fields}


def given(directory: Path) -> list[tuple[str, int, str]]:
    """(endpoint's prefix, priority, salt) of every request the engine was given."""
    rows = (directory / "given.txt").read_text().splitlines()
    return [(row.split("-")[0], int(row.split(" ")[1]), row.split(" ", 2)[2]) for row in rows]


def send_three(server: LiveServer, salt: str, key: str = "") -> None:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    for path, body in (
        (TEXT, ask(cache_salt=salt, priority=-3)),
        (CHAT, chat(cache_salt=salt, priority=-3)),
        (GENERATE, {"prompt_ids": [5, 6], "cache_salt": salt, "priority": -3}),
    ):
        answer = server.post(path, body, headers=headers)
        assert answer.status_code == 200, answer.text


def test_salt_and_priority_reach_the_engine_from_every_endpoint(tmp_path: Path) -> None:
    write_model(tmp_path)
    with LiveServer(tmp_path, {"api_key": "k1,k2"}) as server:
        send_three(server, "tenant", "k1")
        send_three(server, "tenant", "k2")
        assert given(tmp_path) == [(name, -3, "tenant") for name in ("cmpl", "chatcmpl", "gen")] * 2
        long = server.post(TEXT, ask(cache_salt="x" * 257), headers={"authorization": "Bearer k1"})
        assert (long.status_code, long.json()["error"]["param"]) == (400, "cache_salt")


def test_isolation_mixes_the_key_into_the_salt(tmp_path: Path) -> None:
    write_model(tmp_path)
    with LiveServer(tmp_path, {"api_key": "k1,k2", "cache_isolation": True}) as server:
        for salt, key in (("", "k1"), ("", "k2"), ("s", "k1"), ("s", "k2"), ("", "k1")):
            send_three(server, salt, key)
    salts = [salt for _, _, salt in given(tmp_path)]
    by_request = [salts[i : i + 3] for i in range(0, 15, 3)]
    assert all(len(set(three)) == 1 for three in by_request)  # one tenant shares across endpoints
    first, *others, last = [three[0] for three in by_request]
    assert first == last
    assert len({first, *others}) == 4
    assert all(re.fullmatch("[0-9a-f]{32}", salt) for salt in salts)


def test_usage_tells_cached_and_prediction_tokens(tmp_path: Path) -> None:
    write_model(tmp_path, num_cached=3, num_drafted=4)
    with LiveServer(tmp_path, {"speculation": "ngram"}) as server:
        usage = server.post(TEXT, ask(n=2, ignore_eos=True)).json()["usage"]
        assert usage["prompt_tokens"] == 5
        assert usage["prompt_tokens_details"] == {"cached_tokens": 3}  # the prompt of n counts once
        assert usage["completion_tokens"] == 12
        details = usage["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] == 12
        assert details["rejected_prediction_tokens"] == 36
        two = server.post(TEXT, ask(prompt=[[5, 6], [5, 6, 7, 8, 9]])).json()["usage"]
        assert two["prompt_tokens_details"] == {"cached_tokens": 1 + 3}
        body = {**chat(), "stream": True, "stream_options": {"include_usage": True}}
        streamed = server.stream(CHAT, body)[-2]["usage"]
        assert streamed["prompt_tokens_details"] == {"cached_tokens": 3}
        assert streamed["completion_tokens_details"]["accepted_prediction_tokens"] >= 1
        one = server.post(GENERATE, {"prompt_ids": [5, 6, 7, 8], "sampling": {"max_tokens": 2}}).json()
        assert (one["num_cached_tokens"], one["num_drafted"], one["num_accepted"]) == (3, 8, 2)


def test_without_speculation_usage_has_no_prediction_tokens(server: LiveServer) -> None:
    details = server.post(TEXT, ask()).json()["usage"]["completion_tokens_details"]
    assert details == {"reasoning_tokens": 0}


def test_flush_says_what_it_dropped(server: LiveServer) -> None:
    answer = server.http.post("/admin/flush")
    assert (answer.status_code, answer.json()) == (
        200,
        {"dropped": {"pages": 3, "snapshots": 1, "host": 4, "disk": 5}},
    )
    assert server.http.get("/admin/flush").status_code == 405


def test_flush_that_left_something_says_so_with_500(tmp_path: Path) -> None:
    write_model(tmp_path, flush_error="2 files could not be removed")
    with LiveServer(tmp_path) as server:
        answer = server.http.post("/admin/flush")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "not_flushed")
        assert "2 files" in answer.json()["error"]["message"]


def test_admin_endpoints_want_the_key(tmp_path: Path) -> None:
    write_model(tmp_path)
    with LiveServer(tmp_path, {"api_key": "k1,k2"}) as server:
        for method, path in (
            ("POST", "/admin/flush"),
            ("GET", "/admin/cache"),
            ("GET", "/admin/stats"),
            ("GET", "/admin/fingerprint"),
            ("GET", "/v1/requests/x"),
            ("GET", "/metrics"),
        ):
            assert server.http.request(method, path).status_code == 401, path
            for key in ("k1", "k2"):
                answer = server.http.request(method, path, headers={"authorization": f"Bearer {key}"})
                assert answer.status_code in (200, 404), path


def test_cache_numbers_are_in_admin_and_metrics_and_go_on_over_a_restart(tmp_path: Path) -> None:
    write_model(tmp_path, num_cached=3, num_drafted=2)
    with LiveServer(tmp_path) as server:
        assert server.post(TEXT, ask(ignore_eos=True)).status_code == 200
        shown = server.http.get("/admin/cache").json()
        assert shown["cache"]["lookup_tokens"] == 5
        assert shown["cache"]["hit_tokens"] == {"device": 3}
        assert shown["drafts"] == {"drafted_at": [6, 6], "accepted_at": [6, 0]}
        assert shown["pages"] == shown["snapshots"] == 0
        assert metric(server, 'bittrue_cache_hit_tokens_total{tier="device"}') == 3
        server.kill_engine()
        server.wait_for_log(" engine_restarted ")
        assert server.post(TEXT, ask(ignore_eos=True)).status_code == 200
        server.http.get("/admin/cache")
        assert metric(server, 'bittrue_cache_hit_tokens_total{tier="device"}') == 6
        assert metric(server, "bittrue_cache_lookup_tokens_total") == 10
        assert metric(server, 'bittrue_cache_tier_bytes{tier="disk"}') == 6000
        assert metric(server, 'bittrue_cache_tier_events_total{event="hit",tier="disk"}') == 4
        assert metric(server, 'bittrue_drafted_total{place="2"}') == 12
        assert metric(server, 'bittrue_draft_accepted_total{place="2"}') == 0
        assert metric(server, "bittrue_canary_faults_total") == 0
        assert metric(server, "bittrue_engine_up") == 1


def metric(server: LiveServer, name: str) -> float:
    text = server.http.get("/metrics").text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found is not None, (name, text)
    return float(found[1])


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_a_restart_is_one_comment_line_in_every_open_stream(tmp_path: Path, path: str) -> None:
    write_model(tmp_path, step_s=0.01)
    with LiveServer(tmp_path) as server:
        body = {
            **(ask() if path == TEXT else chat()),
            "max_tokens": 80,
            "stream": True,
            "ignore_eos": True,
            "seed": 2,
        }
        undisturbed = server.stream(path, body)
        lines, num_events = [], 0
        with server.http.stream("POST", path, json=body) as response:
            for line in response.iter_lines():
                lines.append(line)
                if line.startswith("data: "):
                    num_events += 1
                    if num_events == 5:
                        server.kill_engine()
        assert [line for line in lines if line.startswith(":")] == [": engine restarted"]
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert [event["choices"] for event in events] == [event["choices"] for event in undisturbed[:-1]]


def test_an_admin_key_is_the_only_one_that_opens_admin_and_opens_nothing_else(tmp_path: Path) -> None:
    write_model(tmp_path)
    with LiveServer(tmp_path, {"api_key": "k1", "admin_key": "s3cret"}) as server:

        def status(method: str, path: str, key: str) -> int:
            return server.http.request(method, path, headers={"authorization": f"Bearer {key}"}).status_code

        assert status("POST", "/admin/flush", "s3cret") == 200
        assert status("POST", "/admin/flush", "k1") == status("GET", "/admin/cache", "other") == 401
        assert status("GET", "/v1/models", "k1") == 200
        assert status("GET", "/v1/models", "s3cret") == 401
        assert not any("s3cret" in line for line in server.log)
