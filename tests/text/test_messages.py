"""Requests in OpenAI's JSON become messages, or an error that names the field."""

from collections.abc import Callable
from typing import Any

import pytest

from bittrue.errors import InvalidRequest
from bittrue.text.messages import (
    ChatMessage,
    ResponseFormat,
    ThinkingMode,
    ToolCall,
    ToolChoice,
    ToolDefinition,
    parse_messages,
    parse_response_format,
    parse_task,
    parse_thinking,
    parse_tool_choice,
    parse_tools,
)

TOOLS = parse_tools([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}])


def user(content: object, **fields: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": content, **fields}]


def call(**function: object) -> list[dict[str, object]]:
    return [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}]


def test_every_role_is_read() -> None:
    raw = [
        {"role": "system", "content": "s"},
        {"role": "developer", "content": "d"},
        {"role": "latest_reminder", "content": "today"},
        *user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], name="n"),
        {"role": "assistant", "content": None, "reasoning_content": "r", "refusal": None, "annotations": [],
         "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "result"},
        {"role": "assistant", "content": "go", "reasoning": "also accepted", "prefix": True},
    ]  # fmt: skip
    assert parse_messages(raw) == (
        ChatMessage("system", "s"),
        ChatMessage("developer", "d"),
        ChatMessage("latest_reminder", "today"),
        ChatMessage("user", "a\n\nb", name="n"),
        ChatMessage("assistant", "", "r", (ToolCall("1", "f", "{}"),)),
        ChatMessage("tool", "result", tool_call_id="1"),
        ChatMessage("assistant", "go", "also accepted", is_prefix=True),
    )


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hi", "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        (user(None), "messages[0].content"),
        (user(7), "messages[0].content"),
        (user("a\ud800"), "messages[0].content"),
        (user(["x"]), "messages[0].content[0]"),
        (user([{"type": "text", "text": 1}]), "messages[0].content[0].text"),
        (user([{"type": "image_url", "image_url": {"url": "data:"}}]), "messages[0].content[0]"),
        (user([{"type": "audio"}]), "messages[0].content[0].type"),
        (user("x", mood="good"), "messages[0].mood"),
        (user("x", function_call={"name": "f"}), "messages[0].function_call"),
        (user("x", prefix=True), "messages[0].prefix"),
        (user("x", task="sing"), "messages[0].task"),
        (user("x", tool_calls=call(name="f", arguments="{}")[0]["tool_calls"]), "messages[0].tool_calls"),
        (call(name="f"), "messages[0].tool_calls[0].function.arguments"),
        (call(name="f", arguments={}), "messages[0].tool_calls[0].function.arguments"),
        (call(name=None, arguments="{}"), "messages[0].tool_calls[0].function.name"),
    ],
)
def test_a_bad_message_names_its_field(raw: object, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_messages(raw)
    assert caught.value.param == param


def test_an_image_part_gets_its_own_code() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_messages(user([{"type": "image_url", "image_url": {"url": "http://x"}}]))
    assert caught.value.code == "image_unsupported"


def test_tools_are_read() -> None:
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
    assert parse_tools([{"type": "function", "function": function}]) == (
        ToolDefinition("f", "d", {"type": "object"}, True),
    )
    assert parse_tools(None) == () and parse_tools([]) == ()


@pytest.mark.parametrize(
    ("function", "param"),
    [
        ({}, "tools[0].function.name"),
        ({"name": ""}, "tools[0].function.name"),
        ({"name": 'a"b'}, "tools[0].function.name"),
        ({"name": "f", "parameters": []}, "tools[0].function.parameters"),
        ({"name": "f", "parameters": {"d": "\ud800"}}, "tools[0].function.parameters"),
        ({"name": "f", "strict": 1}, "tools[0].function.strict"),
        ({"name": "f", "returns": 1}, "tools[0].function.returns"),
    ],
)
def test_a_bad_tool_names_its_field(function: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_tools([{"type": "function", "function": function}])
    assert caught.value.param == param


def test_tool_names_are_unique() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(InvalidRequest) as caught:
        parse_tools([tool, tool])
    assert caught.value.param == "tools[1].function.name"


def test_tool_choices_are_read() -> None:
    assert parse_tool_choice(None, ()) == ToolChoice()
    assert parse_tool_choice("required", TOOLS) == ToolChoice("required")
    named = {"type": "function", "function": {"name": "f"}}
    assert parse_tool_choice(named, TOOLS) == ToolChoice("named", "f")


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        ("always", "tool_choice"),
        (1, "tool_choice"),
        ({"type": "tool"}, "tool_choice.type"),
        ({"type": "function", "function": {"name": "g"}}, "tool_choice.function.name"),
    ],
)
def test_a_bad_tool_choice_names_its_field(raw: object, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_tool_choice(raw, TOOLS)
    assert caught.value.param == param


def test_a_required_call_needs_tools() -> None:
    with pytest.raises(InvalidRequest):
        parse_tool_choice("required", ())


def test_response_formats_are_read() -> None:
    schema = {"type": "object"}
    shaped = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    assert parse_response_format(None) == parse_response_format({"type": "text"}) == ResponseFormat()
    assert parse_response_format({"type": "json_object"}) == ResponseFormat("json_object")
    assert parse_response_format(shaped) == ResponseFormat("json_schema", schema=schema)
    assert parse_response_format({"type": "regex", "pattern": "a+"}) == ResponseFormat("regex", pattern="a+")


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        ("json", "response_format"),
        ({"type": "xml"}, "response_format.type"),
        ({"type": "json_object", "schema": {}}, "response_format.schema"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, "response_format.json_schema.schema"),
        ({"type": "regex"}, "response_format.pattern"),
    ],
)
def test_a_bad_response_format_names_its_field(raw: object, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_response_format(raw)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ThinkingMode(False)),
        ({"reasoning_effort": "none"}, ThinkingMode(False)),
        ({"reasoning_effort": "minimal"}, ThinkingMode(True, "low")),
        ({"reasoning_effort": "low"}, ThinkingMode(True, "low")),
        ({"reasoning_effort": "medium"}, ThinkingMode(True, "high")),
        ({"reasoning_effort": "high"}, ThinkingMode(True, "high")),
        ({"reasoning_effort": "xhigh"}, ThinkingMode(True, "high")),
        ({"reasoning_effort": "max"}, ThinkingMode(True, "max")),
        ({"thinking": {"type": "enabled"}}, ThinkingMode(True, "high")),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "max"}, ThinkingMode(False, "max")),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "low"}, ThinkingMode(True, "low")),
        ({"chat_template_kwargs": {"thinking": True}}, ThinkingMode(True, "high")),
        (
            {"chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": "max"}},
            ThinkingMode(True, "max"),
        ),
        ({"chat_template_kwargs": {"thinking": False}}, ThinkingMode(False)),
    ],
)
def test_thinking_is_off_unless_asked_for(fields: dict[str, Any], expected: ThinkingMode) -> None:
    assert parse_thinking(**fields) == expected


@pytest.mark.parametrize(
    ("ask", "param"),
    [
        (lambda: parse_thinking(reasoning_effort="huge"), "reasoning_effort"),
        (lambda: parse_thinking(reasoning_effort=3), "reasoning_effort"),
        (lambda: parse_thinking(thinking={"type": "maybe"}), "thinking.type"),
        (lambda: parse_thinking(thinking="yes"), "thinking"),
        (lambda: parse_thinking(chat_template_kwargs={"depth": 1}), "chat_template_kwargs.depth"),
        (lambda: parse_thinking(chat_template_kwargs={"reasoning_effort": "?"}),
         "chat_template_kwargs.reasoning_effort"),
        (lambda: parse_task("sing"), "task"),
    ],
)  # fmt: skip
def test_bad_modes_name_their_field(ask: Callable[[], object], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask()
    assert caught.value.param == param
