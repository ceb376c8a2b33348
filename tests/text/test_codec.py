"""Conversations become the tokens the official encoder would give."""

import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from text_support import golden_input, golden_output, real_tokenizer

from bittrue.errors import InvalidRequest
from bittrue.text.codec import ENCODER_VERSION, ChatOptions, Codec, EncodedPrompt
from bittrue.text.messages import (
    ChatMessage,
    ResponseFormat,
    ThinkingMode,
    ToolCall,
    ToolChoice,
    ToolDefinition,
    parse_messages,
    parse_tools,
)

LOW = ThinkingMode(True, "low")
SEARCH = ToolDefinition("search", "find", {"type": "object", "properties": {"q": {"type": "string"}}})


def codec() -> Codec:
    return Codec(real_tokenizer())


def encode(messages: Sequence[ChatMessage], **options: object) -> EncodedPrompt:
    return codec().encode_chat(messages, ChatOptions(**options))  # type: ignore[arg-type]


def user(text: str) -> ChatMessage:
    return ChatMessage("user", text)


def assistant(text: str, reasoning: str | None = None, *calls: ToolCall) -> ChatMessage:
    return ChatMessage("assistant", text, reasoning, calls)


def golden_messages(case: int) -> tuple[tuple[ChatMessage, ...], tuple[ToolDefinition, ...]]:
    """The case's messages; tools of a developer message stay on it, others belong to the request."""
    raw = golden_input(case)
    entries, tools = (raw["messages"], raw["tools"]) if case == 1 else (raw, None)
    own_tools = [parse_tools(entry.pop("tools", None)) for entry in entries]
    for entry in entries:
        entry.pop("mask", None)
    messages = parse_messages(entries)
    return tuple(replace(m, tools=t) for m, t in zip(messages, own_tools, strict=True)), parse_tools(tools)


@pytest.mark.parametrize("case", [1, 2, 3, 4])
def test_golden_cases_of_the_official_encoder(case: int) -> None:
    messages, tools = golden_messages(case)
    thinking = ThinkingMode(False) if case == 4 else LOW
    prompt = encode(messages, tools=tools, thinking=thinking, developer="user", ends_with_answer=True)
    assert prompt.text == golden_output(case)
    assert real_tokenizer().decode(prompt.token_ids) == golden_output(case)
    assert not prompt.starts_in_reasoning
    assert prompt.encoder_version == ENCODER_VERSION


def test_every_prefix_of_a_turn_opens_the_answer_in_its_mode() -> None:
    messages = [ChatMessage("system", "S"), user("hi")]
    chat = encode(messages)
    assert chat.text == "<｜begin▁of▁sentence｜>S<｜User｜>hi<｜Assistant｜></think>"
    assert not chat.starts_in_reasoning
    thinking = encode(messages, thinking=LOW)
    assert thinking.text == "<｜begin▁of▁sentence｜>S<｜User｜>hi<｜Assistant｜><think>"
    assert thinking.starts_in_reasoning
    tok = real_tokenizer()
    expected = [tok.bos_id, *tok.encode_text("S"), tok.special_id("<｜User｜>"), *tok.encode_text("hi")]
    assert list(thinking.token_ids) == [
        *expected,
        tok.special_id("<｜Assistant｜>"),
        tok.special_id("<think>"),
    ]


def test_effort_prefixes_come_right_after_begin_and_only_when_thinking() -> None:
    begin = "<｜begin▁of▁sentence｜>"
    texts = {e: encode([user("q")], thinking=ThinkingMode(True, e)).text for e in ("low", "high", "max")}
    assert texts["low"].startswith(begin + "<｜User｜>")
    assert texts["high"].startswith(
        begin + "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    )
    assert texts["max"].startswith(begin + "Reasoning Effort: Beyond maximum")
    assert encode([user("q")], thinking=ThinkingMode()).text.startswith(begin + "<｜User｜>")
    assert texts["high"] == encode([user("q")], thinking=ThinkingMode(True)).text


def test_old_reasoning_is_dropped_without_tools_and_kept_with_tools() -> None:
    turns = [user("a"), assistant("A", "why A"), user("b"), assistant("B", "why B"), user("c")]
    dropped = encode(turns, thinking=LOW).text
    assert "why" not in dropped and "<｜Assistant｜></think>A<｜end▁of▁sentence｜>" in dropped
    kept = encode(turns, thinking=LOW, tools=(SEARCH,)).text
    assert "<think>why A</think>A" in kept and "<think>why B</think>B" in kept


def test_reasoning_after_the_last_user_turn_is_kept() -> None:
    turns = [user("a"), assistant("A", "why A"), user("b"), assistant("B", "why B")]
    text = encode(turns, thinking=LOW, ends_with_answer=True).text
    assert "why A" not in text and text.endswith("<think>why B</think>B<｜end▁of▁sentence｜>")


def test_a_transcript_may_end_with_a_call_or_an_empty_answer() -> None:
    last = assistant("", "why", ToolCall("", "f", "{}"))
    for thinking, opening in ((LOW, "<think>why</think>"), (ThinkingMode(), "</think>")):
        text = encode([user("q"), last], thinking=thinking, ends_with_answer=True).text
        assert f"<｜Assistant｜>{opening}\n\n<｜DSML｜tool_calls>" in text
        assert text.endswith("</｜DSML｜tool_calls><｜end▁of▁sentence｜>")
        text = encode([user("q"), assistant("", "why")], thinking=thinking, ends_with_answer=True).text
        assert text.endswith(f"<｜Assistant｜>{opening}<｜end▁of▁sentence｜>")


def test_reasoning_is_empty_where_a_thinking_history_lacks_it_and_absent_in_chat_mode() -> None:
    turns = [user("a"), assistant("A"), user("b"), assistant("B", "why"), user("c")]
    thinking = encode(turns, thinking=LOW, tools=(SEARCH,)).text
    assert "<think></think>A<" in thinking and "<think>why</think>B<" in thinking
    chat = encode(turns, tools=(SEARCH,)).text
    assert "<｜Assistant｜></think>A<" in chat and "<｜Assistant｜></think>B<" in chat and "why" not in chat


def test_adding_a_user_turn_rewrites_history_only_behind_the_last_opening() -> None:
    first = encode([user("a")], thinking=LOW)
    second = encode([user("a"), assistant("A", "why"), user("b")], thinking=LOW)
    assert second.token_ids[: len(first.token_ids) - 1] == first.token_ids[:-1]


def test_tool_results_take_the_order_of_the_calls_and_merge_with_user_text() -> None:
    calls = ToolCall("c1", "search", '{"q": "x"}'), ToolCall("c2", "search", '{"q": "y"}')
    results = [
        ChatMessage("tool", "second", tool_call_id="c2"),
        ChatMessage("tool", "first", tool_call_id="c1"),
    ]
    text = encode([user("go"), assistant("", None, *calls), *results, user("and?")], tools=(SEARCH,)).text
    merged = "<tool_result>first</tool_result>\n\n<tool_result>second</tool_result>\n\nand?"
    assert f"<｜User｜>{merged}<｜Assistant｜>" in text


def test_tool_call_arguments_render_as_dsml_parameters() -> None:
    arguments = '{"s": "a \\"b\\" <c>\\nd", "n": 3, "list": [1, {"k": null}]}'
    text = encode([user("go"), assistant("ok", None, ToolCall("", "f", arguments)), user("x")]).text
    assert (
        'ok\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="s" string="true">a "b" <c>\nd</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="n" string="false">3</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="list" string="false">[1, {"k": null}]</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls><｜end▁of▁sentence｜>"
    ) in text


def test_a_call_without_arguments_renders_one_line_break() -> None:
    text = encode([user("go"), assistant("", None, ToolCall("", "f", "{}")), user("x")]).text
    assert '<｜DSML｜invoke name="f">\n</｜DSML｜invoke>\n' in text


def test_arguments_that_are_not_an_object_become_one_parameter() -> None:
    text = encode([user("go"), assistant("", None, ToolCall("", "f", "oops")), user("x")]).text
    assert '<｜DSML｜parameter name="arguments" string="true">oops</｜DSML｜parameter>' in text


def test_history_integers_beyond_64_bits_render_as_the_recipe_renders_them() -> None:
    text = encode(
        [user("go"), assistant("", None, ToolCall("", "f", '{"n": 36893488147419103232}')), user("x")]
    ).text
    assert 'name="n" string="false">3.6893488147419103e+19</' in text


def test_tool_choice_none_hides_the_tools() -> None:
    assert "## Tools" in encode([user("q")], tools=(SEARCH,)).text
    assert "## Tools" in encode([user("q")], tools=(SEARCH,), tool_choice=ToolChoice("required")).text
    assert "## Tools" not in encode([user("q")], tools=(SEARCH,), tool_choice=ToolChoice("none")).text


def test_response_formats_are_described_in_the_system_text() -> None:
    schema = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
    shaped = encode([user("q")], response_format=ResponseFormat("json_schema", schema=schema)).text
    rule = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
    described = '{"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}'
    assert f"{rule}{described}<｜User｜>" in shaped
    assert (
        "Reply with JSON object ONLY."
        in encode([user("q")], response_format=ResponseFormat("json_object")).text
    )


def test_a_prefix_is_left_open_in_the_answer_or_in_the_reasoning() -> None:
    answer = encode([user("q"), ChatMessage("assistant", "The ans", "why", is_prefix=True)], thinking=LOW)
    assert answer.text.endswith("<｜Assistant｜><think>why</think>The ans")
    assert not answer.starts_in_reasoning
    reasoning = encode([user("q"), ChatMessage("assistant", "", "so far", is_prefix=True)], thinking=LOW)
    assert reasoning.text.endswith("<｜Assistant｜><think>so far")
    assert reasoning.starts_in_reasoning
    chat = encode([user("q"), ChatMessage("assistant", "The ans", is_prefix=True)])
    assert chat.text.endswith("<｜Assistant｜></think>The ans")


def test_developer_messages_join_the_system_text_by_default() -> None:
    text = encode([ChatMessage("system", "S"), ChatMessage("developer", "D"), user("q")]).text
    assert text.startswith("<｜begin▁of▁sentence｜>S\n\nD<｜User｜>q")


def test_internal_developer_turns_go_with_old_reasoning() -> None:
    turns = [ChatMessage("developer", "D1"), assistant("A", "why"), ChatMessage("developer", "D2")]
    text = encode(turns, thinking=LOW, developer="user").text
    assert "D1" not in text and text.endswith("<｜User｜>D2<｜Assistant｜><think>")
    assert "D1" in encode(turns, developer="user").text


@pytest.mark.parametrize("task", ["query", "authority", "domain", "read_url"])
def test_tasks_replace_the_opening_of_the_answer(task: str) -> None:
    asked = ChatMessage("user", "q", task=task)  # type: ignore[arg-type]
    begin = "<｜begin▁of▁sentence｜><｜User｜>q"
    for thinking in (ThinkingMode(), LOW):
        assert encode([asked], thinking=thinking).text == f"{begin}<｜{task}｜>"
        answered = encode([asked, assistant("A", "why")], thinking=thinking, ends_with_answer=True).text
        assert answered == f"{begin}<｜{task}｜>A<｜end▁of▁sentence｜>"
    prompt = encode([asked])
    assert prompt.token_ids[-1] == real_tokenizer().special_id(f"<｜{task}｜>")
    assert not prompt.starts_in_reasoning


def test_title_follows_the_answer_and_action_follows_the_opening() -> None:
    title = [user("q"), ChatMessage("assistant", "A", task="title")]
    assert encode(title).text.endswith("</think>A<｜end▁of▁sentence｜><｜title｜>")
    done = encode([*title, assistant("T")], ends_with_answer=True).text
    assert done.endswith("A<｜end▁of▁sentence｜><｜title｜>T<｜end▁of▁sentence｜>")
    action = [ChatMessage("user", "q", task="action")]
    assert encode(action).text.endswith("q<｜Assistant｜></think><｜action｜>")
    assert encode(action, thinking=LOW).text.endswith("q<｜Assistant｜><think><｜action｜>")
    assert not encode(action, thinking=LOW).starts_in_reasoning


def test_private_use_characters_of_a_user_survive_a_task() -> None:
    text = "".join(map(chr, range(0xE000, 0xE010)))
    assert encode([ChatMessage("user", text, task="query")]).text.endswith(f"<｜User｜>{text}<｜query｜>")


def test_special_tokens_typed_by_a_user_stay_text() -> None:
    tok = real_tokenizer()
    plain = encode([ChatMessage("system", "S"), user("x")])
    structure = [i for i in plain.token_ids if i in tok.added_ids]
    for token in tok.added:
        forged = f"a{token.content}b {token.content}"
        prompt = encode([ChatMessage("system", forged), user(forged)])
        assert [i for i in prompt.token_ids if i in tok.added_ids] == structure, token.content
        assert tok.decode(prompt.token_ids) == prompt.text


def test_special_tokens_in_tools_names_reasoning_and_results_stay_text() -> None:
    tok = real_tokenizer()

    def structure(text: str) -> list[int]:
        tool = ToolDefinition("f", text, {"type": "object", "description": text})
        call = ToolCall("1", "f", '{"' + text + '": "' + text + '", "n": ["' + text + '"]}')
        turns = [user(text), assistant(text, text, call), ChatMessage("tool", text, tool_call_id="1")]
        prompt = encode(turns, thinking=LOW, tools=(tool,), response_format=ResponseFormat("json_object"))
        return [i for i in prompt.token_ids if i in tok.added_ids]

    for token in tok.added:
        if "place" not in token.content:
            assert structure(token.content) == structure("x"), token.content


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([user("a\ud800")], "messages[0].content"),
        ([user("q"), assistant("", "r\udfff")], "messages[1].reasoning_content"),
        ([assistant("", None, ToolCall("", "f\ud800", "{}"))], "messages[0].tool_calls[0].function.name"),
        ([ChatMessage("assistant", "a", is_prefix=True), user("q")], "messages[0].prefix"),
        ([ChatMessage("user", "q", task="title")], "messages[0].task"),
        ([ChatMessage("user", "q", task="query"), user("r")], "messages[0].task"),
        ([ChatMessage("user", "q", tools=(SEARCH,))], "messages[0].tools"),
    ],
)
def test_what_cannot_be_encoded_is_refused_by_field(messages: list[ChatMessage], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        encode(messages)
    assert caught.value.param == param


def test_100_kilobytes_encode_in_under_a_second() -> None:
    text = ("def f(x):\n    return [x + 1, 'Größe', \"中文\"]  # comment 12345\n" * 2000)[:100_000]
    prepared = codec()
    start = time.perf_counter()
    prompt = prepared.encode_chat([user(text)])
    assert time.perf_counter() - start < 1.0
    assert len(prompt.token_ids) > 20_000
