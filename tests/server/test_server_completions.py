from typing import Any

import pytest
from standins.live_server import MODEL, LiveServer

TEXT, IDS = "/v1/completions", "/generate"


def ask(prompt: Any, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "seed": 4, **fields}


def ids_of(server: LiveServer, text: str) -> list[int]:
    tokens: list[int] = server.post("/tokenize", {"prompt": text}).json()["tokens"]
    return tokens


def texts(server: LiveServer, body: dict[str, Any]) -> list[str]:
    answer = server.post(TEXT, body)
    assert answer.status_code == 200, answer.text
    return [choice["text"] for choice in answer.json()["choices"]]


def test_text_and_its_token_ids_give_the_same_completion(server: LiveServer) -> None:
    assert texts(server, ask("hello")) == texts(server, ask(ids_of(server, "hello")))
    assert server.post(TEXT, ask("hello")).json()["usage"]["completion_tokens"] == 16


def test_list_of_prompts_gives_choices_in_order(server: LiveServer) -> None:
    both = texts(server, ask(["hello", ids_of(server, "world")], n=2))
    assert both[:2] == texts(server, ask("hello", n=2))
    assert both[2:] == texts(server, ask("world", n=2))
    usage = server.post(TEXT, ask(["hello", "world"], n=2)).json()["usage"]
    assert usage["prompt_tokens"] == len(ids_of(server, "hello")) + len(ids_of(server, "world"))
    assert usage["completion_tokens"] == 64


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 2},
        {"echo": True},
        {"logprobs": 2},
        {"echo": True, "logprobs": 0},
        {"stop": ["e"], "max_tokens": 50},
        {"echo": True, "max_tokens": 0, "logprobs": 1},
    ],
)
def test_stream_adds_up_to_the_whole_completion(server: LiveServer, fields: dict[str, Any]) -> None:
    body = ask(["hello there", "worlds"], **fields)
    whole = server.post(TEXT, body).json()
    events = server.stream(TEXT, {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert events[-1] == "[DONE]"
    assert events[-2]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [e["choices"][0] for e in events[:-2] if e["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts][-1] == choice["finish_reason"]
        assert all(part["finish_reason"] is None for part in parts[:-1])
        if choice["logprobs"] is not None:
            for name, values in choice["logprobs"].items():
                assert sum((part["logprobs"][name] for part in parts), []) == values


def test_echo_with_log_probabilities_covers_prompt_and_completion(server: LiveServer) -> None:
    prompt = ids_of(server, "hello wörld")
    choice = server.post(TEXT, ask("hello wörld", echo=True, logprobs=2, max_tokens=3)).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"].startswith("hello wörld")
    assert [len(values) for values in logprobs.values()] == [len(prompt) + 3] * 4
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    assert logprobs["text_offset"][0] == 0
    for name, top in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert name in top
        assert len(top) in (2, 3)


def test_offsets_follow_the_text_where_special_tokens_are_left_out(server: LiveServer) -> None:
    hidden = 0  # the begin marker
    body = ask("hello", echo=True, logprobs=0, max_tokens=3, logit_bias={str(hidden): 100.0})
    choice = server.post(TEXT, body).json()["choices"][0]
    assert choice["text"] == "hello"
    assert choice["logprobs"]["text_offset"][-3:] == [5, 5, 5]


def test_scoring_asks_for_no_token(server: LiveServer) -> None:
    answer = server.post(TEXT, ask("hello", echo=True, logprobs=0, max_tokens=0)).json()
    choice = answer["choices"][0]
    assert choice["text"] == "hello"
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    assert server.is_idle_and_conserved()


def test_stop_string_split_over_tokens_is_cut_at_its_start(server: LiveServer) -> None:
    (text,) = texts(server, ask("PLAIN", stop=["rld, 你"], max_tokens=60))
    assert text == "Hello wö"


def test_stop_string_counts_before_min_tokens(server: LiveServer) -> None:
    (text,) = texts(server, ask("PLAIN", stop=["rld"], min_tokens=20, max_tokens=60))
    assert text == "Hello wö"


def test_logit_bias_reaches_the_engine(server: LiveServer) -> None:
    (bang,) = ids_of(server, "!")
    assert texts(server, ask("hello", logit_bias={str(bang): 100}, max_tokens=5)) == ["!!!!!"]


@pytest.mark.parametrize("form", [{"type": "json_object"}, {"type": "text"}])
def test_response_format_is_accepted(server: LiveServer, form: dict[str, str]) -> None:
    assert server.post(TEXT, ask("hello", response_format=form, max_tokens=2)).status_code == 200


def test_generate_takes_and_gives_token_ids(server: LiveServer) -> None:
    prompt = ids_of(server, "hello")
    sampling = {"max_tokens": 6, "seed": 4, "logprobs": 2, "prompt_logprobs": 1}
    answer = server.post(IDS, {"prompt_ids": prompt, "sampling": sampling}).json()
    assert len(answer["token_ids"]) == 6
    assert answer["text"] == texts(server, ask("hello", max_tokens=6))[0]
    assert [entry[0] for entry in answer["logprobs"]] == answer["token_ids"]
    assert all(len(entry[2]) == 2 for entry in answer["logprobs"])
    assert answer["prompt_logprobs"][0] is None
    assert [entry[0] for entry in answer["prompt_logprobs"][1:]] == prompt[1:]
    assert answer["weight_version"] == "standin-1"
    assert answer["num_prompt_tokens"] == len(prompt)
    from_text = server.post(IDS, {"prompt": "hello", "sampling": sampling}).json()
    assert from_text["token_ids"] == answer["token_ids"]


def test_generate_stream_adds_up_to_the_whole(server: LiveServer) -> None:
    body = {"prompt": "PLAIN", "sampling": {"max_tokens": 60, "seed": 4, "logprobs": 0, "stop": ["END"]}}
    whole = server.post(IDS, body).json()
    events = server.stream(IDS, {**body, "stream": True})
    assert events.pop() == "[DONE]"
    assert sum((event["token_ids"] for event in events), []) == whole["token_ids"]
    assert "".join(event["text"] for event in events) == whole["text"] == "Hello wörld, 你好 "
    assert sum((event["logprobs"] for event in events), []) == whole["logprobs"]
    assert (events[-1]["finish_reason"], events[-1]["stop_match"]) == ("stop", "END")
    assert whole["stop_match"] == "END"


def test_detokenize_is_the_inverse_of_tokenize(server: LiveServer) -> None:
    tokens = server.post("/tokenize", {"prompt": "Grüße, 世界 🌍"}).json()
    assert tokens["count"] == len(tokens["tokens"])
    back = server.post("/detokenize", {"tokens": tokens["tokens"]}).json()
    assert back == {"prompt": "Grüße, 世界 🌍"}


def test_models_health_fingerprint_and_stats(server: LiveServer) -> None:
    (card,) = server.http.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"]) == (MODEL, 8192)
    assert server.http.get(f"/v1/models/{MODEL}").json() == card
    assert server.http.get("/health").json()["status"] == "ok"
    assert server.http.get("/admin/fingerprint").json()["engine"]["engine"] == "ngram"
    assert server.is_idle_and_conserved()


def test_metrics_count_requests_tokens_and_latencies(server: LiveServer) -> None:
    def value(name: str) -> float:
        lines = server.http.get("/metrics").text.splitlines()
        return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    before = value("bittrue_generated_tokens_total")
    ok = 'bittrue_requests_total{endpoint="/v1/completions",status="200"}'
    texts(server, ask("hello"))
    num_ok = value(ok)
    texts(server, ask("hello", max_tokens=5))
    assert value("bittrue_generated_tokens_total") == before + 21
    assert value(ok) == num_ok + 1
    assert value("bittrue_time_to_first_token_seconds_count") > 0
    assert value("bittrue_inter_token_seconds_count") > 0
    assert value('bittrue_pages{state="total"}') == 200_000
    assert value('bittrue_pages{state="held"}') == 0
    assert value("bittrue_engine_steps_total") > 0
