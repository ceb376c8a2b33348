"""Files of prompts: every mistake names its line, and no prompt is on both sides of a split."""

import json
from pathlib import Path
from typing import Any

import pytest

from bittrue.errors import ConfigError, UsageError
from bittrue.rl.prompt_file import PromptFiles, PromptReader, Row, digest_of, read_files
from bittrue.rl.verifiers.code import Call, FunctionTests
from bittrue.rl.verifiers.exact import Exact
from bittrue.rl.verifiers.mathematics import Mathematics
from bittrue.rl.verifiers.reward_function import RewardFunction
from bittrue.rl.verifiers.tool_calls import ExpectedCall, ToolCalls
from bittrue.text.codec import ChatOptions, Codec
from bittrue.text.messages import ChatMessage, ThinkingMode, parse_tools
from bittrue.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
MINI = ROOT / "models" / "mini"
MATH = {"kind": "math", "expected": {"column": "answer"}}
TOOL = {"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer((MINI / "tokenizer.json").read_bytes(), source="tokenizer.json")


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def reader_of(tokenizer: Tokenizer, **options: Any) -> PromptReader:
    return PromptReader(tokenizer, **{"thinking": "off", "verifier": MATH, "max_tokens": 4096, **options})


def read(tokenizer: Tokenizer, path: Path, *rows: Any, **options: Any) -> list[Row]:
    return reader_of(tokenizer, **options).read(written(path, *rows))


def test_a_prompt_is_a_message_of_the_user_and_takes_the_default_verifier(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = read(
        tokenizer,
        tmp_path / "rows.jsonl",
        {"prompt": "1+1=", "answer": "2"},
        {"messages": [{"role": "user", "content": "1+1="}], "answer": "3", "id": 7, "task": "add"},
    )
    encoded = Codec(tokenizer).encode_chat([ChatMessage("user", "1+1=")])
    assert [row.token_ids for row in rows] == [encoded.token_ids] * 2
    assert [row.verifier for row in rows] == [Mathematics("2"), Mathematics("3")]
    assert [(row.id, row.task) for row in rows] == [("1", "prompts"), ("7", "add")]
    assert rows[0].canonical == rows[1].canonical
    assert not rows[0].starts_in_reasoning


def test_rows_are_rendered_with_their_tools_and_in_the_mode_of_the_run(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Get 3."}]
    verifier = {"kind": "tool_calls", "expected": [{"name": "get", "arguments": {"n": 3}}]}
    row = {"messages": messages, "tools": [TOOL], "verifier": verifier}
    (found,) = read(tokenizer, tmp_path / "rows.jsonl", row, thinking="max")
    options = ChatOptions(tools=parse_tools([TOOL]), thinking=ThinkingMode(True, "max"))
    said = [ChatMessage("system", "Be short."), ChatMessage("user", "Get 3.")]
    assert found.token_ids == Codec(tokenizer).encode_chat(said, options).token_ids
    assert found.starts_in_reasoning and found.has_tools
    assert found.verifier == ToolCalls((ExpectedCall("get", {"n": 3}),))


def test_a_row_has_a_verifier_of_its_own_of_any_kind(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tests = {"kind": "function_tests", "function": "f", "calls": [{"args": [1], "expected": 2}]}
    rows = read(
        tokenizer,
        tmp_path / "rows.jsonl",
        {"prompt": "a", "verifier": {"kind": "exact", "expected": "b"}},
        {"prompt": "f", "verifier": tests},
        verifier={},
    )
    assert [row.verifier for row in rows] == [Exact("b"), FunctionTests("f", (Call(2, (1,)),))]


def test_a_reward_function_gets_the_prompt_and_every_column(tokenizer: Tokenizer, tmp_path: Path) -> None:
    functions = tmp_path / "rewards.py"
    functions.write_text("def f(prompts, completions, **columns):\n    return [1.0]\n")
    table = {"kind": "reward_function", "function": f"{functions}:f", "is_strict": False}
    chat = [{"role": "user", "content": "b"}]
    rows = read(
        tokenizer,
        tmp_path / "rows.jsonl",
        {"prompt": "a", "wanted": 3, "level": "easy"},
        {"messages": chat, "id": "second"},
        verifier=table,
    )
    first, second = (row.verifier for row in rows)
    assert isinstance(first, RewardFunction) and isinstance(second, RewardFunction)
    assert (first.prompt, first.columns, first.is_strict) == ("a", {"wanted": 3, "level": "easy"}, False)
    assert (second.prompt, second.columns, second.path) == (chat, {}, str(functions))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ("", "not a JSON object"),
        ({"answer": "1"}, "a prompt, or messages"),
        ({"prompt": "a", "messages": [], "answer": "1"}, "a prompt, or messages"),
        ({"prompt": " ", "answer": "1"}, "prompt is empty"),
        ({"prompt": 3, "answer": "1"}, "prompt must be a string"),
        ({"messages": [], "answer": "1"}, "messages is empty"),
        ({"messages": [{"role": "user", "contents": "a"}]}, r"unknown field messages\[0\].contents"),
        (
            {
                "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "answer": "1",
            },
            "an answer already",
        ),
        ({"prompt": "a", "tools": [{}], "answer": "1"}, "tools"),
        ({"prompt": "a"}, "expected takes the column 'answer', and the row has no columns"),
        ({"prompt": "a", "reply": "1"}, "and the row has reply"),
        ({"prompt": "a", "answer": 1}, "verifier 'math': Expected `str`, got `int`"),
        ({"prompt": "a", "verifier": "math"}, "no verifier"),
        ({"prompt": "a", "verifier": {"kind": "maths"}}, "'maths' is no kind of verifier; choose one of ch"),
        ({"prompt": "a", "verifier": {"expected": "3"}}, "a verifier has a kind"),
        ({"prompt": "a", "verifier": {"kind": "exact", "expects": "3"}}, "'exact': Object"),
        (
            {"prompt": "a", "verifier": {"kind": "reward_function", "function": "no.py:f"}},
            "no reward function",
        ),
        ({"prompt": "a", "verifier": {"kind": "reward_function", "path": "a"}}, "unknown field 'path'"),
        ({"prompt": "a", "id": 1.5, "answer": "1"}, "id is 1.5"),
        ({"prompt": "a", "id": "", "answer": "1"}, "id is ''"),
        ({"prompt": "a", "task": "a b", "answer": "1"}, "task is 'a b'"),
        ({"prompt": "a" * 99, "answer": "1"}, "the prompt has 103 tokens, 50 fit beside an answer"),
        ({"prompt": "b", "id": "first", "answer": "1"}, r"the id 'first' is that of .*rows.jsonl:1 too"),
    ],
)
def test_a_mistake_names_its_line(tokenizer: Tokenizer, tmp_path: Path, row: Any, message: str) -> None:
    first = {"prompt": "right", "id": "first", "answer": "1"}
    with pytest.raises(UsageError, match=rf"rows\.jsonl:2: .*{message}"):
        read(tokenizer, tmp_path / "rows.jsonl", first, row, max_tokens=50)


def test_a_file_that_cannot_be_read_and_a_verifier_that_is_none_are_refused(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="cannot read .*missing.jsonl"):
        reader_of(tokenizer).read(tmp_path / "missing.jsonl")
    with pytest.raises(UsageError, match="holds no prompt"):
        read(tokenizer, tmp_path / "empty.jsonl")
    with pytest.raises(ConfigError, match="'maths' is no kind"):
        reader_of(tokenizer, verifier={"kind": "maths"})


def numbered(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(count)]


def split(tokenizer: Tokenizer, path: Path, *rows: Any) -> PromptFiles:
    return read_files(reader_of(tokenizer), written(path, *rows), None)


def test_a_tenth_is_held_out_by_what_is_asked_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = numbered(400)
    files = split(tokenizer, tmp_path / "rows.jsonl", *rows)
    assert 20 <= len(files.held_out) <= 60 and len(files.train) + len(files.held_out) == 400
    # Order, ids, answers and spacing change nothing.
    others = [
        {"prompt": f" {row['prompt'].replace('+', ' + ')}\n", "answer": "0", "id": f"r{n}"}
        for n, row in enumerate(reversed(rows))
    ]
    spaced = [{**row, "prompt": row["prompt"].replace("+", "  +\t")} for row in others]
    sides = [split(tokenizer, tmp_path / "others.jsonl", *each) for each in (others, spaced)]
    assert {row.canonical for row in sides[0].held_out} == {row.canonical for row in sides[1].held_out}
    same = split(
        tokenizer, tmp_path / "same.jsonl", *[{**row, "prompt": f"{row['prompt']} "} for row in rows]
    )
    assert {row.canonical for row in same.held_out} == {row.canonical for row in files.held_out}
    assert not {row.canonical for row in files.train} & {row.canonical for row in files.held_out}


def test_a_prompt_in_both_files_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    train, kept = written(tmp_path / "train.jsonl", *numbered(5)), tmp_path / "kept.jsonl"
    files = read_files(reader_of(tokenizer), train, written(kept, {"prompt": "9+9=", "answer": "18"}))
    assert (len(files.train), len(files.held_out)) == (5, 1)
    written(kept, {"prompt": "9+9=", "answer": "18"}, {"prompt": "3+3= ", "answer": "6", "task": "other"})
    with pytest.raises(UsageError, match=r"kept.jsonl:2 asks what .*train.jsonl:4 asks, '3\+3=', which"):
        read_files(reader_of(tokenizer), train, kept)


def test_a_file_of_which_all_is_held_out_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    held_out = split(tokenizer, tmp_path / "rows.jsonl", *numbered(400)).held_out
    number = held_out[0].id
    row = numbered(400)[int(number) - 1]
    with pytest.raises(ConfigError, match="every prompt of .*one.jsonl is held out"):
        split(tokenizer, tmp_path / "one.jsonl", row)


def test_the_digest_is_of_what_is_asked_and_who_judges(tokenizer: Tokenizer, tmp_path: Path) -> None:
    row = {"prompt": "1+1=", "answer": "2", "task": "add", "id": "a"}
    path = tmp_path / "rows.jsonl"
    first = digest_of(read(tokenizer, path, row))
    assert first == digest_of(read(tokenizer, path, dict(reversed(row.items()))))
    changes = ({"prompt": "1+2="}, {"answer": "3"}, {"task": "sum"}, {"id": "b"}, {"tools": [TOOL]})
    digests = {digest_of(read(tokenizer, path, {**row, **change})) for change in changes}
    digests.add(digest_of(read(tokenizer, path, row, thinking="low")))
    assert len(digests | {first}) == 7


def test_the_bundled_file_holds_out_some_of_each_task(tokenizer: Tokenizer) -> None:
    files = read_files(reader_of(tokenizer), ROOT / "configs" / "rl-math.jsonl", None)
    assert {row.task for row in files.held_out} == {row.task for row in files.train} == {"add", "sub"}
