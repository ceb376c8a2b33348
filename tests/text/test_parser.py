"""Answers are parsed the same however the stream is cut, and faulty tool calls come back as text."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_support import byte_ids, golden_input, golden_output, real_tokenizer

from bittrue.text.codec import ChatOptions, Codec
from bittrue.text.messages import ChatMessage, ThinkingMode, ToolCall
from bittrue.text.parser import (
    Content,
    Event,
    OutputParser,
    ParsedAnswer,
    Reasoning,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    collect,
    parse_answer,
    tool_call_id,
)
from bittrue.text.tokenizer import DSML, EOS, THINK_END, THINK_START

OPEN, CLOSE = f"<{DSML}tool_calls>", f"</{DSML}tool_calls>"
F_OPEN, F_CLOSE = f'<{DSML}invoke name="f">', f"</{DSML}invoke>"


def parameter(name: str, value: str, *, is_string: bool = True) -> str:
    kind = "true" if is_string else "false"
    return f'<{DSML}parameter name="{name}" string="{kind}">{value}</{DSML}parameter>'


def call(*parameters: str) -> str:
    return "\n".join([F_OPEN, *parameters, F_CLOSE, ""])


def block(*calls: str) -> str:
    return f"\n\n{OPEN}\n{''.join(calls)}{CLOSE}"


GOOD = block(
    call(parameter("s", 'a "b" </x> \\n\n中😀'), parameter("n", "[1, 2.50]", is_string=False)), call()
)


def tokens(text: str) -> list[int]:
    """Ids of text in which the spellings of the control tokens stand for the tokens."""
    tok = real_tokenizer()
    ids: list[int] = []
    rest = text
    while rest:
        found = [(rest.find(m), m) for m in (DSML, THINK_END, THINK_START, EOS) if m in rest]
        at, marker = min(found) if found else (len(rest), "")
        ids += tok.encode_text(rest[:at])
        if marker:
            ids.append(tok.special_id(marker))
        rest = rest[at + len(marker) :]
    return ids


def parse(ids: list[int], **options: object) -> ParsedAnswer:
    settings = {"request_id": "r", "starts_in_reasoning": False, **options}
    return parse_answer(real_tokenizer(), ids, **settings)  # type: ignore[arg-type]


def stream(ids: list[int], cuts: list[int], **options: object) -> list[Event]:
    settings = {"request_id": "r", "starts_in_reasoning": False, **options}
    parser = OutputParser(real_tokenizer(), **settings)  # type: ignore[arg-type]
    events: list[Event] = []
    edges = [0, *sorted(cuts), len(ids)]
    for start, end in zip(edges, edges[1:], strict=False):
        events += parser.feed(ids[start:end])
    return events + parser.finish()


def one_by_one(text: str) -> list[int]:
    """Text as one token per byte, the finest stream there can be; control tokens stay whole."""
    tok = real_tokenizer()
    of_byte = byte_ids()
    ids: list[int] = []
    for token_id in tokens(text):
        whole = token_id in tok.added_ids
        ids += [token_id] if whole else [of_byte[b] for b in tok.token_bytes(token_id)]
    return ids


def test_reasoning_content_and_calls_are_told_apart() -> None:
    answer = parse(tokens(f"I think{THINK_END}Sure.{GOOD}{EOS}"), starts_in_reasoning=True)
    assert answer.reasoning == "I think"
    assert answer.content == "Sure."
    first, second = answer.tool_calls
    assert json.loads(first.arguments) == {"s": 'a "b" </x> \\n\n中😀', "n": [1, 2.5]}
    assert first.arguments.endswith('"n": [1, 2.50]}')
    assert (second.name, second.arguments) == ("f", "{}")


def test_the_turns_of_the_golden_case_are_parsed_back() -> None:
    wanted = [m for m in golden_input(1)["messages"] if m["role"] == "assistant"]
    turns = golden_output(1).split("<｜Assistant｜><think>")[1:]
    for message, turn in zip(wanted, turns, strict=True):
        answer = parse(tokens(turn.split("<｜User｜>")[0]), starts_in_reasoning=True)
        assert answer.reasoning == message["reasoning_content"]
        assert answer.content == message.get("content", "")
        calls = [c["function"] for c in message.get("tool_calls", [])]
        assert [{"name": c.name, "arguments": c.arguments} for c in answer.tool_calls] == calls


def test_without_reasoning_all_is_content() -> None:
    assert parse(tokens(f"Hello\n\nworld{EOS}")) == ParsedAnswer(None, "Hello\n\nworld", ())


def test_reasoning_that_never_ends_stays_reasoning() -> None:
    answer = parse(tokens(f"a {OPEN} b"), starts_in_reasoning=True)
    assert answer == ParsedAnswer(f"a {OPEN} b", "", ())


def test_a_model_that_opens_its_reasoning_itself_is_understood() -> None:
    assert parse(tokens(f"{THINK_START}why{THINK_END}A")) == ParsedAnswer("why", "A", ())
    assert parse(tokens(f"A{THINK_START}b{THINK_END}c")).content == f"A{THINK_START}b{THINK_END}c"


def test_markers_typed_as_text_do_nothing() -> None:
    plain = real_tokenizer().encode_text(f"x{THINK_END}{GOOD}")
    assert parse(plain).content == f"x{THINK_END}{GOOD}"
    assert parse(plain, starts_in_reasoning=True).reasoning == f"x{THINK_END}{GOOD}"


def test_tools_are_not_sought_where_none_were_declared() -> None:
    assert parse(tokens(f"x{GOOD}"), parse_tools=False).content == f"x{GOOD}"


def test_white_space_around_tags_is_free() -> None:
    loose = f"{OPEN} {F_OPEN}\n\n\t{parameter('a', 'v')}{F_CLOSE}\r\n {CLOSE}"
    assert [c.arguments for c in parse(tokens(f"text{loose}")).tool_calls] == ['{"a": "v"}']
    assert parse(tokens(f"text{loose}")).content == "text"


def test_only_the_blank_line_before_a_block_belongs_to_it() -> None:
    assert parse(tokens("a\n\n" + GOOD)).content == "a\n\n"
    assert parse(tokens("a" + GOOD[1:])).content == "a"


def test_text_after_a_block_and_a_second_block_are_kept() -> None:
    answer = parse(tokens(f"a{GOOD}b{GOOD}c"))
    assert answer.content == "abc"
    assert len(answer.tool_calls) == 4
    assert len({c.id for c in answer.tool_calls}) == 4


def test_json_values_that_are_not_json_become_strings() -> None:
    bad = ("{'a': 1}", "NaN", "", "1 2", "[" * 5000)
    for value in bad:
        text = block(call(parameter("v", value, is_string=False)))
        assert json.loads(parse(tokens(text)).tool_calls[0].arguments) == {"v": value}


def test_a_value_may_hold_markers_that_do_not_close_it() -> None:
    value = f"see <{DSML}invoke and {THINK_END} </{DSML}x>"
    assert json.loads(parse(tokens(block(call(parameter("v", value))))).tool_calls[0].arguments) == {
        "v": value
    }


FAULTY = [
    block(),
    f"\n\n{OPEN}\nstray\n{call()}{CLOSE}",
    f'\n\n{OPEN}\n<{DSML}invoke title="f">\n{F_CLOSE}\n{CLOSE}',
    f"\n\n{OPEN}\n<{DSML}invoke name={'x' * 2000}",
    block(call(parameter("a", "1"), parameter("a", "2"))),
    block(call("stray")),
    block(call(f'<{DSML}parameter name="a" string="maybe">x</{DSML}parameter>')),
    f"\n\n{OPEN}\n{F_OPEN}\n{parameter('a', 'v')}\n{CLOSE}",
    f"a {DSML} b <{DSML} c <{DSML}tool_ d",
    f"\n\n{OPEN}",
    f"\n\n{OPEN}\n{F_OPEN}\n{parameter('a', 'v')[:-3]}",
    "\n\n<",
    "a\n\n\n",
]


@pytest.mark.parametrize("text", FAULTY)
def test_faulty_calls_come_back_as_text(text: str) -> None:
    assert parse(tokens(f"before{text}")) == ParsedAnswer(None, f"before{text}", ())


def test_calls_before_a_fault_stay_and_the_rest_is_text() -> None:
    broken = f"\n{F_OPEN}\nstray {F_CLOSE}\n{CLOSE}"
    answer = parse(tokens(f"a\n\n{OPEN}\n{call(parameter('k', 'v')).rstrip()}{broken} end"))
    assert [c.arguments for c in answer.tool_calls] == ['{"k": "v"}']
    assert answer.content == f"a{broken} end"


def test_a_call_after_a_faulty_block_is_found_and_takes_the_next_index() -> None:
    answer = parse(tokens(f"{FAULTY[4]}{GOOD}"))
    assert len(answer.tool_calls) == 2
    assert answer.tool_calls[0].id == tool_call_id("r", 0)
    assert answer.content == FAULTY[4]


def test_a_closing_tag_cut_short_after_calls_is_dropped() -> None:
    ids, num_closing = one_by_one(block(call())), len(one_by_one(CLOSE))
    for size in range(1, num_closing + 2):
        answer = parse(ids[:-size])
        assert len(answer.tool_calls) == 1 and answer.content == ""


def test_call_ids_depend_on_request_and_index_only() -> None:
    first, second = parse(tokens(GOOD)).tool_calls
    assert (first.id, second.id) == (tool_call_id("r", 0), tool_call_id("r", 1))
    assert parse(tokens(GOOD), request_id="other").tool_calls[0].id != first.id


def test_incremental_arguments_tell_a_call_as_it_comes() -> None:
    ids = one_by_one(GOOD)
    events = stream(ids, list(range(len(ids))), incremental_arguments=True)
    assert collect(events) == parse(ids)
    pieces = [e for e in events if isinstance(e, ToolCallArguments) and e.index == 0]
    assert len(pieces) > 10
    assert sum(isinstance(e, ToolCallEnd) for e in events) == 2


def test_incremental_arguments_leave_a_faulty_call_open() -> None:
    ids = tokens(f"{OPEN}\n{F_OPEN}\n{parameter('a', 'v')}\nstray{F_CLOSE}")
    events = stream(ids, [], incremental_arguments=True)
    assert not any(isinstance(e, ToolCallEnd) for e in events)
    assert collect(events).content == f"\nstray{F_CLOSE}"
    assert collect(events).tool_calls[0].arguments == '{"a": "v"'


def test_events_come_in_order() -> None:
    events = stream(tokens(f"r{THINK_END}c{block(call(parameter('a', 'b')))}"), [], starts_in_reasoning=True)
    kinds = [type(e) for e in events]
    assert kinds == [Reasoning, Content, ToolCallStart, ToolCallArguments, ToolCallEnd]


def test_reasoning_tokens_are_counted_up_to_the_closing_marker() -> None:
    tok = real_tokenizer()
    ids = tokens(f"one two three{THINK_END}four{THINK_END}")
    for cuts in ([], list(range(len(ids)))):
        parser = OutputParser(tok, request_id="r", starts_in_reasoning=True)
        for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
            parser.feed(ids[start:end])
        assert parser.num_reasoning_tokens == len(tok.encode_text("one two three"))


SAMPLES = [f"why\n\n{THINK_END}\n\nSure.{GOOD}{EOS}", f"{THINK_END}a{GOOD}b\n\n{GOOD}", *FAULTY]


@pytest.mark.parametrize("text", SAMPLES)
@pytest.mark.parametrize("starts_in_reasoning", [False, True])
def test_every_byte_boundary_gives_the_same_answer(text: str, starts_in_reasoning: bool) -> None:
    ids = one_by_one(text)
    whole = parse(ids, starts_in_reasoning=starts_in_reasoning)
    assert whole == parse(tokens(text), starts_in_reasoning=starts_in_reasoning)
    boundaries = range(len(ids)) if len(ids) < 800 else random.Random(0).sample(range(len(ids)), 200)
    for boundary in boundaries:
        events = stream(ids, [boundary], starts_in_reasoning=starts_in_reasoning)
        assert collect(events) == whole, boundary
    every = stream(ids, list(range(len(ids))), starts_in_reasoning=starts_in_reasoning)
    assert collect(every) == whole


FRAGMENTS = st.sampled_from(
    ["a", "\n", "\n\n", "<", "</", ">", " ", '"', "😀", "中", DSML, THINK_END, THINK_START, EOS,
     "tool_calls>", 'invoke name="f">', "invoke>", "parameter>", 'parameter name="a" string="true">',
     'parameter name="b" string="false">', OPEN, CLOSE, F_OPEN, F_CLOSE, parameter("a", "x"),
     parameter("b", "1", is_string=False), call(), GOOD]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(FRAGMENTS, max_size=25), st.booleans(), st.randoms(use_true_random=False), st.booleans())
def test_random_answers_parse_the_same_for_random_splits(
    fragments: list[str], starts_in_reasoning: bool, rng: random.Random, is_incremental: bool
) -> None:
    ids = one_by_one("".join(fragments))
    options = {"starts_in_reasoning": starts_in_reasoning, "incremental_arguments": is_incremental}
    whole = collect(stream(ids, [], **options))
    cuts = sorted(rng.sample(range(len(ids) + 1), min(len(ids), rng.randint(0, 12))))
    assert collect(stream(ids, cuts, **options)) == whole
    for made in whole.tool_calls if not is_incremental else ():
        assert isinstance(json.loads(made.arguments), dict)


@settings(max_examples=200, deadline=None)
@given(st.lists(FRAGMENTS, max_size=20))
def test_nothing_is_lost_where_no_call_is_complete(fragments: list[str]) -> None:
    text = "".join(f for f in fragments if f != EOS)
    answer = parse(one_by_one(text))
    if not answer.tool_calls and answer.reasoning is None and not text.startswith(THINK_START):
        assert answer.content == text


# The recipe reads integers beyond 64 bits in a history's arguments as floats; test_codec pins that.
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters='"<>\r\n'), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=4), st.text(max_size=20))
def test_what_the_codec_renders_the_parser_reads_back(arguments: dict[str, object], content: str) -> None:
    """The answer part of a rendered turn gives the reasoning, content and call that were rendered."""
    tok = real_tokenizer()
    made = ToolCall("id", "f", json.dumps(arguments, ensure_ascii=False))
    turns = [ChatMessage("user", "q"), ChatMessage("assistant", content, "why", (made,))]
    options = ChatOptions(thinking=ThinkingMode(True, "low"), ends_with_answer=True)
    prompt = Codec(tok).encode_chat([*turns], options)
    start = prompt.token_ids.index(tok.special_id("<｜Assistant｜>")) + 2
    answer = parse(list(prompt.token_ids[start:]), starts_in_reasoning=True)
    assert (answer.reasoning, answer.content) == ("why", content)
    assert json.loads(answer.tool_calls[0].arguments) == arguments


def test_stop_strings_end_the_answer_for_every_split() -> None:
    text = f"why{THINK_END}one STOP two"
    ids = one_by_one(text)
    for cut in range(len(ids)):
        parsed = collect(stream(ids, [cut], starts_in_reasoning=True, stop=["STOP"]))
        assert parsed == ParsedAnswer("why", "one ", ())


def test_a_stop_string_may_touch_a_marker() -> None:
    ids = one_by_one(f"why{THINK_END}one>x")
    expected = {
        "nk>o": ParsedAnswer("why</thi", "", ()),
        ">x": ParsedAnswer("why", "one", ()),
        ">y": ParsedAnswer("why", "one>x", ()),
        THINK_END: ParsedAnswer("why", "", ()),
    }
    for stop, answer in expected.items():
        for cut in range(len(ids)):
            assert collect(stream(ids, [cut], starts_in_reasoning=True, stop=[stop])) == answer


def test_the_matched_stop_string_is_told() -> None:
    parser = OutputParser(real_tokenizer(), request_id="r", starts_in_reasoning=False, stop=["b", "cd"])
    parser.feed(tokens("xyz"))
    assert parser.matched_stop is None
    parser.feed(tokens("cdb"))
    assert parser.matched_stop == "cd"
    assert parser.feed(tokens("more")) == [] and parser.finish() == []
