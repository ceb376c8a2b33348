"""Whatever a grammar lets through has the asked shape, on the real vocabulary."""

import functools
import json
import random
import re
import time
from typing import Any

import numpy as np
import pytest
from text_support import real_tokenizer

from bittrue.errors import CheckpointError, InvalidRequest
from bittrue.text.grammar import DelayedGrammar, GrammarCompiler, GrammarState, ToolGrammar
from bittrue.text.messages import ResponseFormat, ToolDefinition
from bittrue.text.parser import parse_answer
from bittrue.text.tokenizer import DSML, THINK_END

SCHEMA = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colour": {"enum": ["red", "green", "中"]},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "name": {"type": "string", "maxLength": 5},
    },
    "required": ["age", "colour", "name"],
    "additionalProperties": False,
}
WEATHER = ToolDefinition(
    "weather",
    "",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"enum": ["celsius", "fahrenheit"]},
            "days": {"type": ["integer", "null"], "minimum": 0, "maximum": 99},
            "where": {"$ref": "#/$defs/point"},
        },
        "required": ["city", "unit"],
        "$defs": {
            "point": {
                "type": "object",
                "properties": {"x": {"type": "integer", "minimum": -9, "maximum": 9}},
                "required": ["x"],
                "additionalProperties": False,
            }
        },
    },
)
NOW = ToolDefinition("now")


def test_tokenizer_with_more_ids_than_the_model_is_refused() -> None:
    tokenizer = real_tokenizer()
    with pytest.raises(CheckpointError, match="belongs to another model"):
        GrammarCompiler(tokenizer, tokenizer.vocab_size - 1)


def test_a_bad_pattern_is_blamed_on_the_field_it_came_in() -> None:
    with pytest.raises(InvalidRequest, match="guided_regex cannot be enforced") as caught:
        compiler().compile(ResponseFormat("regex", pattern="["), param="guided_regex")
    assert caught.value.param == "guided_regex"


@functools.cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(real_tokenizer())


def walk(grammar: str | None, seed: int, *, limit: int = 600) -> list[int]:
    """A random answer within the masks, which tends to short tokens so that it ends."""
    assert grammar is not None
    tok, state, rng = real_tokenizer(), GrammarState(compiler(), grammar), random.Random(seed)
    closing = [tok.special_id(DSML), *(i for text in ('"', "}", "]", "</") for i in tok.encode_text(text))]
    ids: list[int] = []
    while len(ids) < limit:
        mask = state.allowed_mask()
        assert mask.shape == (129_280,) and mask.dtype == np.bool_
        allowed = np.flatnonzero(mask)
        assert mask[tok.eos_id] == state.is_complete
        if state.is_complete and (len(allowed) == 1 or rng.random() < 0.3):
            return ids
        closers = [i for i in closing if mask[i]]
        token_id = rng.choice(closers) if closers and rng.random() < 0.6 else int(rng.choice(allowed))
        if token_id == tok.eos_id:
            return ids
        state.accept(token_id)
        ids.append(token_id)
    raise AssertionError(f"no end after {limit} tokens: {tok.decode(ids)[:300]!r}")


@pytest.mark.parametrize("seed", range(6))
def test_json_within_the_masks_fits_the_schema(seed: int) -> None:
    ids = walk(compiler().compile(ResponseFormat("json_schema", schema=SCHEMA)), seed)
    value = json.loads(real_tokenizer().decode(ids))
    assert 0 <= value["age"] <= 120 and isinstance(value["age"], int)
    assert value["colour"] in ("red", "green", "中") and len(value["name"]) <= 5
    assert set(value) <= {"age", "colour", "flags", "name"}
    assert all(isinstance(flag, bool) for flag in value.get("flags", []))
    assert not real_tokenizer().added_ids.intersection(ids)


def test_any_json_object_may_follow_json_object() -> None:
    grammar = compiler().compile(ResponseFormat("json_object"))
    assert isinstance(json.loads(real_tokenizer().decode(walk(grammar, 3))), dict)
    written = json.dumps({"a": [1, {"b": None}], "ü": '</think> "q"'}, ensure_ascii=False)
    state = GrammarState(compiler(), grammar or "")
    ids = real_tokenizer().encode_text(written)
    assert state.try_accept(ids) == len(ids) and state.is_complete


def test_a_regular_expression_is_followed() -> None:
    for seed in range(4):
        ids = walk(compiler().compile(ResponseFormat("regex", pattern="[0-9]{3}-(a|bc){1,4}")), seed)
        assert re.fullmatch("[0-9]{3}-(a|bc){1,4}", real_tokenizer().decode(ids))


def test_a_lark_grammar_is_followed() -> None:
    grammar = compiler().compile(ResponseFormat("lark", pattern='start: "yes" | "no"'))
    assert real_tokenizer().decode(walk(grammar, 0)) in ("yes", "no")


def test_plain_text_needs_no_grammar() -> None:
    assert compiler().compile(ResponseFormat()) is None


def arguments_fit(arguments: dict[str, Any]) -> bool:
    days, where = arguments.get("days"), arguments.get("where", {"x": 0})
    return (
        isinstance(arguments["city"], str)
        and arguments["unit"] in ("celsius", "fahrenheit")
        and (days is None or 0 <= days <= 99)
        and set(where) == {"x"} and -9 <= where["x"] <= 9
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_forced_calls_parse_into_valid_arguments(seed: int) -> None:
    ids = walk(compiler().compile(ToolGrammar((WEATHER, NOW), "required")), seed)
    answer = parse_answer(real_tokenizer(), ids, request_id="r", starts_in_reasoning=False)
    assert answer.content == "" and answer.tool_calls
    for call in answer.tool_calls:
        arguments = json.loads(call.arguments)
        assert arguments == {} if call.name == "now" else arguments_fit(arguments)


@pytest.mark.parametrize("seed", range(3))
def test_a_named_tool_is_called_exactly_once(seed: int) -> None:
    ids = walk(compiler().compile(ToolGrammar((WEATHER,), "named")), seed)
    answer = parse_answer(real_tokenizer(), ids, request_id="r", starts_in_reasoning=False)
    assert [call.name for call in answer.tool_calls] == ["weather"] and answer.content == ""
    assert arguments_fit(json.loads(answer.tool_calls[0].arguments))


def dsml(text: str) -> list[int]:
    tok = real_tokenizer()
    ids: list[int] = []
    for index, part in enumerate(text.split(DSML)):
        ids += [tok.special_id(DSML)] if index else []
        ids += tok.encode_text(part)
    return ids


def accepts(grammar: str | None, text: str) -> bool:
    assert grammar is not None
    state, ids = GrammarState(compiler(), grammar), dsml(text)
    return state.try_accept(ids) == len(ids) and state.is_complete


def weather(*parameters: str) -> str:
    body = "".join(f"<{DSML}parameter {p}</{DSML}parameter>\n" for p in parameters)
    call = f'<{DSML}invoke name="weather">\n{body}</{DSML}invoke>\n'
    return f"\n\n<{DSML}tool_calls>\n{call}</{DSML}tool_calls>"


CITY, UNIT = 'name="city" string="true">{}', 'name="unit" string="true">celsius'


def test_a_string_value_may_hold_anything_but_the_marker() -> None:
    grammar = compiler().compile(ToolGrammar((WEATHER,), "required"))
    for value in ("", "Rio", "a\nb", "</div><", "<<</", "1 < 2 </x>", "</", '"{}', "中😀"):
        assert accepts(grammar, weather(CITY.format(value), UNIT)), value
    assert not accepts(grammar, weather(CITY.format("Rio")))
    assert not accepts(grammar, weather(CITY.format("Rio"), 'name="unit" string="true">kelvin'))
    assert not accepts(grammar, weather(CITY.format("Rio"), UNIT, 'name="days" string="false">"2"'))
    assert accepts(grammar, weather(CITY.format("Rio"), UNIT, 'name="days" string="false">2'))


def test_free_text_may_end_in_a_well_formed_call_only() -> None:
    grammar = compiler().compile(ToolGrammar((WEATHER,), "auto"))
    assert accepts(grammar, "Just 1 < 2 text.\n\n")
    assert accepts(grammar, "Let me look." + weather(CITY.format("Rio"), UNIT))
    assert not accepts(grammar, "Let me look." + weather(UNIT))
    assert not accepts(grammar, weather(CITY.format("Rio"), UNIT) + "more")


def test_a_value_of_unknown_type_may_be_text_or_json() -> None:
    tool = ToolDefinition(
        "weather", "", {"properties": {"v": {}, "u": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}
    )
    grammar = compiler().compile(ToolGrammar((tool,), "named"))
    for value in ('string="true">text', 'string="false">[1, 2]', 'string="false">null', 'string="false">1.5'):
        assert accepts(grammar, weather('name="v" ' + value)), value
    assert accepts(grammar, weather('name="u" string="false">null'))
    assert accepts(grammar, weather('name="u" string="true">x'))
    assert not accepts(grammar, weather('name="u" string="false">3'))


@pytest.mark.parametrize(
    ("spec", "param"),
    [
        (ResponseFormat("json_schema", schema={"type": "gizmo"}), "response_format"),
        (ResponseFormat("json_schema", schema={"$ref": "#/nowhere"}), "response_format"),
        (ResponseFormat("json_schema", schema={"$ref": "http://x/y"}), "response_format"),
        (ResponseFormat("regex", pattern="(unclosed"), "response_format"),
        (ResponseFormat("lark", pattern="start: missing"), "response_format"),
        (ToolGrammar((), "required"), "tools"),
        (ToolGrammar((ToolDefinition("f", "", {"anyOf": []}),), "required"), "tools[0].function.parameters"),
        (ToolGrammar((ToolDefinition("f", "", {"properties": {'a"': {}}}),), "named"),
         "tools[0].function.parameters"),
        (ToolGrammar((ToolDefinition("f", "", {"properties": {"a": {"enum": []}}}),), "named"),
         "tools[0].function.parameters"),
        (ToolGrammar((ToolDefinition("f", "", {"properties": {"a": {"type": "gizmo"}}}),), "named"), "tools"),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_refused(spec: ResponseFormat | ToolGrammar, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        compiler().compile(spec)
    assert caught.value.param == param


def test_a_bad_grammar_text_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        GrammarState(compiler(), "start: (")
    with pytest.raises(InvalidRequest):
        compiler().check("start: (")


def test_a_forbidden_token_is_refused_and_replay_stops_before_it() -> None:
    tok = real_tokenizer()
    grammar = compiler().compile(ResponseFormat("regex", pattern="ab*")) or ""
    a, b, c = (tok.encode_text(letter)[0] for letter in "abc")
    with pytest.raises(InvalidRequest):
        GrammarState(compiler(), grammar).accept(c)
    assert GrammarState(compiler(), grammar).try_accept([a, b, b, c, b]) == 3


def test_a_grammar_that_grows_too_complex_ends_its_own_answer_only() -> None:
    tok = real_tokenizer()
    grammar = compiler().compile(ResponseFormat("regex", pattern="(.*a.{0,300}){0,300}")) or ""
    state = DelayedGrammar(GrammarState(compiler(), grammar))
    assert state.error is None
    for token_id in tok.encode_text("a b c aaa foo bar " * 30):
        if not state.allowed_mask()[token_id]:
            break
        state.accept(token_id)
    assert state.error is not None and "grammar" in state.error
    assert np.flatnonzero(state.allowed_mask()).tolist() == [tok.eos_id]


def test_a_clone_goes_its_own_way() -> None:
    tok = real_tokenizer()
    state = GrammarState(compiler(), compiler().compile(ResponseFormat("regex", pattern="ab|cd")) or "")
    twin = state.clone()
    twin.accept(tok.encode_text("a")[0])
    assert state.allowed_mask()[tok.encode_text("c")[0]]
    assert not twin.allowed_mask()[tok.encode_text("c")[0]]


def test_the_end_is_allowed_exactly_when_the_answer_is_complete() -> None:
    tok = real_tokenizer()
    state = GrammarState(compiler(), compiler().compile(ResponseFormat("regex", pattern="ab")) or "")
    for letter in "ab":
        assert not state.allowed_mask()[tok.eos_id]
        state.accept(tok.encode_text(letter)[0])
    assert np.flatnonzero(state.allowed_mask()).tolist() == [tok.eos_id]
    state.accept(tok.eos_id)
    assert state.try_accept([tok.eos_id]) == 0


def test_a_delayed_grammar_begins_after_its_tokens() -> None:
    tok = real_tokenizer()
    end = tok.special_id(THINK_END)
    grammar = compiler().compile(ResponseFormat("regex", pattern="yes")) or ""
    delayed = DelayedGrammar(GrammarState(compiler(), grammar), (end,))
    for token_id in tok.encode_text("no idea {"):
        mask = delayed.allowed_mask()
        assert mask.sum() == 129_279 and not mask[tok.eos_id]
        delayed.accept(token_id)
    assert delayed.is_waiting and not delayed.is_complete
    twin = delayed.clone()
    assert twin.try_accept([end, *tok.encode_text("yes"), *tok.encode_text("no")]) == 2
    assert twin.is_complete and delayed.is_waiting
    delayed.accept(end)
    assert not delayed.is_waiting and delayed.allowed_mask().sum() < 10


def test_a_delay_of_several_tokens_needs_them_in_a_row() -> None:
    grammar = compiler().compile(ResponseFormat("regex", pattern="yes")) or ""
    delayed = DelayedGrammar(GrammarState(compiler(), grammar), (7, 7, 8))
    for token_id in (7, 8, 7, 7, 7):
        delayed.accept(token_id)
        assert delayed.is_waiting
    delayed.accept(8)
    assert not delayed.is_waiting


def test_without_a_delay_the_grammar_begins_at_once() -> None:
    grammar = compiler().compile(ResponseFormat("regex", pattern="yes")) or ""
    for after in (None, ()):
        assert not DelayedGrammar(GrammarState(compiler(), grammar), after).is_waiting


def test_a_model_with_more_rows_than_ids_gets_longer_masks() -> None:
    wide = GrammarCompiler(real_tokenizer(), vocab_size=129_300)
    mask = GrammarState(wide, wide.compile(ResponseFormat("regex", pattern=".*")) or "").allowed_mask()
    assert mask.shape == (129_300,) and not mask[129_280:].any()


def test_masks_are_fast_enough() -> None:
    """A bound far above the 0.1 ms a mask takes: only a broken cache of the grammar engine fails it."""
    state = GrammarState(compiler(), compiler().compile(ResponseFormat("json_schema", schema=SCHEMA)) or "")
    ids = real_tokenizer().encode_text('{"age": 12, "colour": "red", "name": "abc"}')
    start = time.perf_counter()
    for token_id in ids:
        state.allowed_mask()
        state.accept(token_id)
    assert (time.perf_counter() - start) / len(ids) < 0.05
