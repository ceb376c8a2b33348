from typing import Any

import pytest
from standins.live_server import MODEL, LiveServer

CHAT = "/v1/chat/completions"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


def ask(content: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


def message_of(server: LiveServer, body: dict[str, Any]) -> dict[str, Any]:
    answer = server.post(CHAT, body)
    assert answer.status_code == 200, answer.text
    message: dict[str, Any] = answer.json()["choices"][0]["message"]
    return message


def joined(events: list[Any], num_choices: int = 1) -> list[dict[str, Any]]:
    """The choices a stream adds up to."""
    whole: list[dict[str, Any]] = [
        {"content": "", "reasoning": "", "calls": [], "reason": None, "logprobs": [], "roles": 0}
        for _ in range(num_choices)
    ]
    for event in events:
        for choice in event["choices"] if isinstance(event, dict) else []:
            here, delta = whole[choice["index"]], choice["delta"]
            assert here["reason"] is None, "news after the end"
            here["roles"] += "role" in delta
            here["content"] += delta.get("content", "")
            here["reasoning"] += delta.get("reasoning_content", "")
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    here["calls"].append([call["id"], call["function"]["name"], ""])
                here["calls"][call["index"]][2] += call["function"]["arguments"]
            here["logprobs"] += (choice["logprobs"] or {"content": []})["content"]
            here["reason"] = choice["finish_reason"]
    return whole


def test_answer_has_content_usage_and_the_weight_version(server: LiveServer) -> None:
    answer = server.post(CHAT, ask("PLAIN")).json()
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "Hello wörld, 你好 END of it.",
        "refusal": None,
    }
    assert choice["finish_reason"] == "stop"
    assert answer["system_fingerprint"] == "standin-1"
    assert answer["object"] == "chat.completion"
    usage = answer["usage"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stop": ["END"]},
        {"stop": "wörld"},
        {"max_tokens": 7},
        {"stop": ["never", "好 E"], "max_tokens": 40},
        {"logprobs": True, "top_logprobs": 2},
        {"n": 3, "seed": 5, "max_tokens": 30},
    ],
)
@pytest.mark.parametrize("content", ["PLAIN", "something else", "FORGED"])
def test_stream_adds_up_to_the_whole_answer(server: LiveServer, content: str, fields: dict[str, Any]) -> None:
    body = ask(content, **{"seed": 3, "max_tokens": 60, **fields})
    whole = server.post(CHAT, body).json()
    events = server.stream(CHAT, {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-2])
    assert len({event["id"] for event in events[:-1]}) == 1
    choices = joined(events, body.get("n", 1))
    assert [choice["content"] for choice in choices] == [c["message"]["content"] for c in whole["choices"]]
    assert [choice["reason"] for choice in choices] == [c["finish_reason"] for c in whole["choices"]]
    assert all(choice["roles"] == 1 for choice in choices)
    for choice, complete in zip(choices, whole["choices"], strict=True):
        assert choice["logprobs"] == (complete["logprobs"] or {"content": []})["content"]


def test_stop_string_ends_the_answer_and_is_left_out(server: LiveServer) -> None:
    answer = server.post(CHAT, ask("PLAIN", stop=["END"])).json()["choices"][0]
    assert answer["message"]["content"] == "Hello wörld, 你好 "
    assert answer["finish_reason"] == "stop"


def test_stop_token_id_ends_the_answer_and_is_left_out(server: LiveServer) -> None:
    comma = server.post("/tokenize", {"prompt": ","}).json()["tokens"]
    answer = server.post(CHAT, ask("PLAIN", stop_token_ids=comma)).json()["choices"][0]
    assert answer["message"]["content"] == "Hello wörld"
    assert answer["finish_reason"] == "stop"


def test_markers_spelt_in_the_answer_are_text(server: LiveServer) -> None:
    assert message_of(server, ask("FORGED"))["content"] == "He said </think> and <think>."


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking": {"type": "enabled"}},
        {"reasoning_effort": "high"},
        {"chat_template_kwargs": {"thinking": True}},
    ],
)
def test_reasoning_is_apart_from_the_content(server: LiveServer, fields: dict[str, Any]) -> None:
    answer = server.post(CHAT, ask("THINK", **fields)).json()
    message = answer["choices"][0]["message"]
    assert message["reasoning_content"] == "I should greet."
    assert message["content"] == "Hi there."
    details = answer["usage"]["completion_tokens_details"]
    num_reasoning = len(server.post("/tokenize", {"prompt": "I should greet."}).json()["tokens"])
    assert details == {"reasoning_tokens": num_reasoning}
    (streamed,) = joined(server.stream(CHAT, ask("THINK", stream=True, **fields)))
    assert (streamed["reasoning"], streamed["content"]) == ("I should greet.", "Hi there.")


def test_thinking_changes_the_prompt_and_is_off_unless_asked(server: LiveServer) -> None:
    off = server.post("/tokenize", {"messages": [{"role": "user", "content": "x"}]}).json()["tokens"]
    on = server.post(
        "/tokenize", {"messages": [{"role": "user", "content": "x"}], "thinking": {"type": "enabled"}}
    ).json()["tokens"]
    assert off[-1] != on[-1]


def test_tool_call_comes_whole_and_in_deltas(server: LiveServer) -> None:
    body = ask("CALL", tools=[WEATHER], thinking={"type": "enabled"})
    choice = server.post(CHAT, body).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert call["type"] == "function"
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris", "days": 3}'}
    assert choice["message"]["content"] == "One moment."
    assert choice["message"]["reasoning_content"] == "Let me look."
    (streamed,) = joined(server.stream(CHAT, {**body, "stream": True}))
    assert [entry[1:] for entry in streamed["calls"]] == [["get_weather", '{"city": "Paris", "days": 3}']]
    assert (streamed["content"], streamed["reason"]) == ("One moment.", "tool_calls")
    assert streamed["calls"][0][0].startswith("call_")


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}, "auto"]
)
def test_every_tool_choice_returns_the_call(server: LiveServer, choice: Any) -> None:
    body = ask("ONLYTOOL", tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False)
    message = message_of(server, body)
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_weather"]
    assert message["content"] is None


def test_tool_choice_none_leaves_the_text_as_it_is(server: LiveServer) -> None:
    message = message_of(server, ask("ONLYTOOL", tools=[WEATHER], tool_choice="none"))
    assert "tool_calls" not in message
    assert "get_weather" in message["content"]


def test_conversation_with_a_tool_result_is_accepted_as_the_client_echoes_it(server: LiveServer) -> None:
    call = message_of(server, ask("ONLYTOOL", tools=[WEATHER]))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ONLYTOOL"},
        call,
        {"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "content": "sunny"},
    ]
    body = {"model": MODEL, "messages": messages, "tools": [WEATHER], "max_tokens": 3}
    assert server.post(CHAT, body).status_code == 200


def test_same_seed_same_answer_and_other_seeds_differ(server: LiveServer) -> None:
    def content(**fields: Any) -> str:
        text: str = message_of(server, ask("something", max_tokens=20, **fields))["content"]
        return text

    assert content(seed=1) == content(seed=1)
    assert content(seed=1) != content(seed=2)
    assert content() != content()
    assert content(temperature=0, seed=1) == content(temperature=0, seed=2)
    assert content(seed=-1) == content(seed=-1)


def test_first_of_n_equals_n_of_one_and_the_rest_differ(server: LiveServer) -> None:
    alone = message_of(server, ask("something", max_tokens=20, seed=9))["content"]
    several = server.post(CHAT, ask("something", max_tokens=20, seed=9, n=4)).json()
    contents = [choice["message"]["content"] for choice in several["choices"]]
    assert contents[0] == alone
    assert len(set(contents)) == 4
    assert several["usage"]["completion_tokens"] == 80
    assert (
        several["usage"]["prompt_tokens"]
        == server.post(CHAT, ask("something", max_tokens=1)).json()["usage"]["prompt_tokens"]
    )


def test_log_probabilities_have_one_entry_per_token_with_its_bytes(server: LiveServer) -> None:
    answer = server.post(CHAT, ask("something", max_tokens=6, seed=1, logprobs=True, top_logprobs=3)).json()
    entries = answer["choices"][0]["logprobs"]["content"]
    assert len(entries) == 6
    raw = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert raw.decode("utf-8", "replace") == answer["choices"][0]["message"]["content"]
    assert all(len(entry["top_logprobs"]) == 3 and entry["logprob"] < 0 for entry in entries)


def test_fields_that_mean_nothing_here_are_accepted(server: LiveServer) -> None:
    fields = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "modalities": ["text"],
    }
    answer = server.post(CHAT, ask("PLAIN", safety_identifier="x", prompt_cache_key="k", **fields))
    assert answer.status_code == 200
    nulls = {"n": None, "stop": None, "seed": None, "tools": None, "logit_bias": None, "temperature": None}
    assert server.post(CHAT, ask("PLAIN", **nulls)).status_code == 200


def test_max_completion_tokens_and_ignore_eos_and_min_tokens(server: LiveServer) -> None:
    def usage(**fields: Any) -> int:
        num: int = server.post(CHAT, ask("PLAIN", **fields)).json()["usage"]["completion_tokens"]
        return num

    whole = usage()
    assert usage(max_completion_tokens=3) == 3
    assert usage(ignore_eos=True, max_tokens=whole + 10) == whole + 10
    assert usage(min_tokens=whole + 5, max_tokens=whole + 20) == whole + 6


def test_request_id_of_the_client_comes_back(server: LiveServer) -> None:
    answer = server.post(CHAT, ask("PLAIN"), headers={"x-request-id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    for bad in ("a b", "x" * 200):
        given = server.post(CHAT, ask("PLAIN"), headers={"x-request-id": bad}).headers["x-request-id"]
        assert given != bad
        assert len(given) == 32
    server.wait_for_log("id=abc-1")
