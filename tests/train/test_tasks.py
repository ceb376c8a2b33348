"""Tasks: references are right; checkers accept every right answer and nothing else, whatever the text."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bittrue.errors import ConfigError
from bittrue.text.codec import Codec
from bittrue.text.messages import ChatMessage, ToolCall
from bittrue.text.parser import ParsedAnswer, parse_answer
from bittrue.text.small_tokenizer import small_tokenizer_json
from bittrue.text.tokenizer import Tokenizer
from bittrue.train.tasks.arithmetic import Arithmetic, addition_columns, subtraction_columns
from bittrue.train.tasks.brackets import BracketsQuestion
from bittrue.train.tasks.calc import CalcQuestion, computed
from bittrue.train.tasks.catalogue import TASK_NAMES, all_tasks, check_names, make_tasks
from bittrue.train.tasks.countdown import CountdownQuestion, solutions
from bittrue.train.tasks.expression import MAX_CHARACTERS, Expression, parse_expression
from bittrue.train.tasks.recall import HEAD, RECORD, Recall, recall_problem, shared_file
from bittrue.train.tasks.sort import Sort
from bittrue.train.tasks.task import Problem, Question, problem_in, seeded, split_of

TOKENIZER = Tokenizer(small_tokenizer_json(322).encode(), source="small")
CODEC = Codec(TOKENIZER)
TASKS = all_tasks()


def said(text: str) -> ParsedAnswer:
    return ParsedAnswer(None, text, ())


def called(expr: object, *, name: str = "calc") -> ParsedAnswer:
    return ParsedAnswer(None, "", (ToolCall("call_x", name, json.dumps({"expr": expr})),))


def reference_answers(question: Question) -> list[ParsedAnswer]:
    """The reference as the parser would tell it."""
    return [
        ParsedAnswer(message.reasoning_content, message.content, message.tool_calls)
        for message in question.reference
        if message.role == "assistant"
    ]


def problems(name: str, count: int = 50) -> list[Problem]:
    rng = seeded("tests", name)
    return [TASKS[name].problem(rng) for _ in range(count)]


@pytest.mark.parametrize("name", TASK_NAMES)
def test_references_are_right(name: str) -> None:
    for problem in problems(name):
        for question in problem.questions:
            answers = reference_answers(question)
            assert question.check(answers)
            for count in range(1, len(answers)):
                follow_up = question.follow_up(answers[:count])
                assert follow_up is not None
                expected = question.reference[2 * count - 1]
                assert (follow_up.role, follow_up.content) == ("tool", expected.content)
            assert question.follow_up(answers) is None


@pytest.mark.parametrize("name", TASK_NAMES)
def test_corrupted_references_are_wrong(name: str) -> None:
    rng = random.Random(1)
    for problem in problems(name):
        for question in problem.questions:
            *before, last = reference_answers(question)
            text = last.content
            place = rng.randrange(len(text))
            others = [c for c in "0123456789abcxyz()[]{}<| é\n٣" if c != text[place]]
            corrupted = [
                "", text + "\n", text + text[-1], f"{text} {text}", f"The answer is {text}", text + "\0",
                text[:place] + rng.choice(others) + text[place + 1 :],
            ]  # fmt: skip
            for wrong in corrupted:
                # Another character can make another right expression or completion: those have own tests.
                if wrong != text and name not in ("countdown",):
                    assert not question.check([*before, said(wrong)]), (question, wrong)
            call = ToolCall("call_x", "calc", "{}")
            assert not question.check([*before, ParsedAnswer(None, text, (call,))])
            assert not question.check([*before, last, last])
            assert not question.check(before)


ODD = st.one_of(
    st.text(max_size=200),
    st.text(alphabet="()[]{}", max_size=200),
    st.text(alphabet="0123456789+-* ()", max_size=200),
    st.sampled_from(["9" * 10_000, "(" * 100_000, "9**9**9", "__import__('os')", "1e400", "٣+٤", "-", "+5"]),
)
ONE_OF_EACH = [problems(name, 1)[0].questions[0] for name in TASK_NAMES]


@settings(deadline=None, max_examples=200)
@given(ODD, ODD, st.sampled_from(ONE_OF_EACH))
def test_checkers_take_any_text(content: str, arguments: str, question: Question) -> None:
    calls = ParsedAnswer(content, content, (ToolCall("call_x", "calc", arguments),))
    for answers in ([said(content)], [calls], [calls, said(content)], [called(content), said(content)], []):
        assert isinstance(question.check(answers), bool)
        if answers:
            follow_up = question.follow_up(answers)
            assert follow_up is None or isinstance(follow_up, ChatMessage)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_problems_depend_on_the_source_of_randomness_alone(name: str) -> None:
    first, second = problems(name, 20), problems(name, 20)
    assert first == second
    assert len({problem.canonical for problem in first}) > 10


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        ("sort", "sort: 52 7 91", "7 52 91"),
        ("reverse", "reverse: kqzab", "bazqk"),
        ("add", "48+371=", "419"),
        ("sub", "48-371=", "-323"),
    ],
)
def test_prompts_have_the_documented_shape(name: str, prompt: str, answer: str) -> None:
    """The prompt of a problem, read by an own reading of it, has the reference as its answer."""
    own = {
        "sort": lambda text: " ".join(sorted(text[6:].split(), key=int)),
        "reverse": lambda text: text[9:][::-1],
        "add": lambda text: str(sum(map(int, text[:-1].split("+")))),
        "sub": lambda text: str(int(text[:-1].split("-")[0]) - int(text[:-1].split("-")[1])),
    }[name]
    assert own(prompt) == answer
    for problem in problems(name, 200):
        assert problem.questions[0].reference[0].content == own(problem.questions[0].prompt)


# ---- scratchpads -------------------------------------------------------------------------------------------


def test_addition_columns() -> None:
    assert addition_columns(48, 371) == "8+1+0=9 9\n4+7+0=11 19\n0+3+1=4 419"
    assert addition_columns(99, 1).endswith("9+0+1=10 100")


def test_subtraction_columns() -> None:
    assert subtraction_columns(100, 99) == "10-9-0=1 1\n10-9-1=0 01\n1-0-1=0 001"
    assert subtraction_columns(48, 371) == "-\n11-8-0=3 3\n7-4-1=2 23\n3-0-0=3 323"


@given(st.integers(0, 99999), st.integers(0, 99999))
def test_columns_hold_and_end_in_the_result(a: int, b: int) -> None:
    for text, result in ((addition_columns(a, b), a + b), (subtraction_columns(a, b), a - b)):
        lines = text.split("\n")
        if lines[0] == "-":
            assert result < 0
            result = -result
            del lines[0]
        for line in lines:
            left, right = line.split("=")
            found = parse_expression(left)
            assert found is not None and found.value == int(right.split()[0])
        assert int(lines[-1].split()[-1]) == result


# ---- brackets, countdown, expressions ----------------------------------------------------------------------


def test_any_bounded_completion_of_brackets_is_right() -> None:
    question = BracketsQuestion("close: ([", "])", opened="([")
    for right in ("])", "[]])", "])()", "{}])[]{()}", "])" + "()" * 31):
        assert question.check([said(right)])
    for wrong in ("", "]", ")]", "])(", "]))", "]) ", "])" + "()" * 32, "])]", "x])"):
        assert not question.check([said(wrong)])


def test_any_solution_of_countdown_is_right() -> None:
    question = CountdownQuestion("3 7 5 -> 26", "3*7+5", numbers=(3, 7, 5), target=26)
    for right in ("3*7+5", "5+3*7", "5+7*3", "(7*3)+5", "((5))+3*7", " 5 + 3 * 7 "):
        assert question.check([said(right)])
    for wrong in ("26", "3*7+5+0", "3*7", "3*7+5=26", "21+5", "3*7+5-5+5", "(3*7+5", "5+-3*7", "5--3*7",
                  "3*7+05", "３*7+5", "7+5+7+7", "3*7+5)", "3\n*7+5", "3**7", "37+5"):  # fmt: skip
        assert not question.check([said(wrong)])


def test_solutions_are_complete_and_right() -> None:
    """Against every arrangement evaluated by Python itself."""
    for numbers in ((3, 7, 5), (2, 2, 2), (1, 20, 20), (1, 1, 13)):
        reached: set[int] = set()
        for a, b, c in {(x, y, z) for x in numbers for y in numbers for z in numbers
                        if sorted((x, y, z)) == sorted(numbers)}:  # fmt: skip
            for p in "+-*":
                for q in "+-*":
                    for text in (f"({a}{p}{b}){q}{c}", f"{a}{p}({b}{q}{c})"):
                        reached.add(eval(text))
        found = solutions(numbers)
        assert set(found) == {value for value in reached if 1 <= value <= 99}
        for value, texts in found.items():
            assert len(set(texts)) == len(texts)
            for text in texts:
                assert eval(text) == value
                assert parse_expression(text) == Expression(value, parse_expression(text).numbers)
                assert sorted(parse_expression(text).numbers) == sorted(numbers)


def test_references_of_countdown_vary() -> None:
    rng = random.Random(0)
    answers: dict[str, set[str]] = {}
    for _ in range(3000):
        problem = TASKS["countdown"].problem(rng)
        answers.setdefault(problem.canonical, set()).add(problem.questions[0].reference[0].content)
    assert max(map(len, answers.values())) > 1


@given(st.text(alphabet="0123456789+-*() ", max_size=MAX_CHARACTERS))
def test_expressions_have_pythons_value(text: str) -> None:
    found = parse_expression(text)
    if found is not None:
        assert eval(text.strip()) == found.value


@pytest.mark.parametrize(
    ("text", "value"),
    [("2+3*4", 14), ("(2+3)*4", 20), ("10-3-2", 5), ("10-(3-2)", 9), ("0", 0), ("2*(3)", 6)],
)
def test_expressions(text: str, value: int) -> None:
    found = parse_expression(text)
    assert found is not None and found.value == value


@pytest.mark.parametrize(
    "text", ["", "()", "1+", "+1", "-1", "01", "1 2", "1//2", "2**3", "1.5", "²", "(" * 64]
)
def test_texts_that_are_no_expression(text: str) -> None:
    assert parse_expression(text) is None


# ---- calculator --------------------------------------------------------------------------------------------


def test_the_calculator_computes_what_was_called() -> None:
    question = CalcQuestion("4821*977=", "4821*977", 4710117)
    wrong_call = [called("4821*978")]
    follow_up = question.follow_up(wrong_call)
    assert follow_up is not None
    assert (follow_up.content, follow_up.tool_call_id) == (str(4821 * 978), "call_x")
    broken = question.follow_up([called("4821*")])
    assert broken is not None and broken.content == "error"
    assert question.follow_up([said("4710117")]) is None
    assert question.check([called("4821*977"), said("4710117")])
    assert question.check([called("977 * 4821"), said("4710117")])
    assert not question.check([called("4821*978"), said("4710117")])
    assert not question.check([called("4821*977"), said("4710118")])
    assert not question.check([called("4821*977", name="calculator"), said("4710117")])
    assert not question.check([said("4710117")])
    twice = ParsedAnswer(None, "", called("4821*977").tool_calls * 2)
    assert question.follow_up([twice]) is None
    assert not question.check([twice, said("4710117")])


@pytest.mark.parametrize(
    "arguments",
    ["", "{}", "[]", '"4+4"', '{"expr": 8}', '{"expr": "4+4", "x": 1}', '{"e": "4+4"}', "[" * 99, "NaN"],
)
def test_malformed_arguments_have_no_value(arguments: str) -> None:
    assert computed(ToolCall("call_x", "calc", arguments)) is None


# ---- recall ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "num_questions"), [(32, 1), (256, 12), (4096, 32), (4099, 8), (32768, 1)]
)
def test_recall_has_the_length_asked_for(num_tokens: int, num_questions: int) -> None:
    problem = recall_problem(random.Random(0), num_tokens, num_questions)
    options = problem.options()
    ids = CODEC.encode_chat(problem.messages(), type(options)(ends_with_answer=True)).token_ids
    assert num_tokens - RECORD < len(ids) <= num_tokens
    assert len(problem.questions) == num_questions


def test_records_begin_at_a_multiple_of_four() -> None:
    problem = recall_problem(random.Random(0), 512, 1)
    ids = CODEC.encode_chat(problem.messages()[:1]).token_ids
    text = problem.questions[0].prompt
    start = ids.index(TOKENIZER.encode_text("\n")[0]) + 1
    assert start % 4 == 0
    records = text.removeprefix(HEAD)[: -len("qwzrk")]
    assert len(records) % RECORD == 0
    lines = records.splitlines()
    assert all(len(line) == 7 and line[:5].isalpha() and line[5:].isdigit() for line in lines)
    assert len({line[:5] for line in lines}) == len(lines)


def test_questions_of_recall_name_a_key_of_the_file() -> None:
    for problem in problems("recall", 20):
        first = problem.questions[0].prompt
        records = {line[:5]: line for line in first.removeprefix(HEAD).splitlines()[:-1]}
        keys = [first.splitlines()[-1], *(question.prompt for question in problem.questions[1:])]
        assert [q.reference[0].content for q in problem.questions] == [records[key] for key in keys]


def test_problems_of_one_file_share_their_beginning() -> None:
    found = shared_file(random.Random(3), 900_000, 8)
    prompts = [problem.questions[0].prompt for problem in found]
    assert len({prompt[:-5] for prompt in prompts}) == 1
    assert len({prompt[-5:] for prompt in prompts}) == 8
    assert 900_000 - RECORD < len(prompts[0]) + 12 <= 900_000


# ---- splits, names, the official parser --------------------------------------------------------------------


@pytest.mark.parametrize("name", TASK_NAMES)
def test_a_problem_of_a_split_is_in_it(name: str) -> None:
    rng = random.Random(5)
    for split in ("train", "validation", "test"):
        problem = problem_in(TASKS[name], split, rng)
        assert problem.split == split == split_of(problem.family, problem.canonical)


def test_splits_have_their_shares() -> None:
    found = [split_of("sort", str(i)) for i in range(20_000)]
    assert abs(found.count("test") - 2000) < 200
    assert abs(found.count("validation") - 2000) < 200


def test_the_same_problem_asked_otherwise_is_in_the_same_split() -> None:
    rng, splits, prompts = random.Random(7), {}, {}
    for task in (Arithmetic("add", 1), Arithmetic("add", 1, thinks=True)):
        for _ in range(2000):
            problem = task.problem(rng)
            numbers = "+".join(sorted(problem.questions[0].prompt[:-1].split("+")))
            splits.setdefault(numbers, set()).add(problem.split)
            prompts.setdefault(numbers, set()).add(problem.questions[0].prompt)
    assert max(map(len, prompts.values())) == 2
    assert all(len(found) == 1 for found in splits.values())
    assert len(set.union(*splits.values())) == 3


@pytest.mark.parametrize("name", TASK_NAMES)
def test_rendered_references_parse_back(name: str) -> None:
    """What the model would generate, read by the parser the server uses, is right."""
    problem = problems(name, 1)[0]
    messages: list[ChatMessage] = []
    for question in problem.questions:
        messages.append(ChatMessage("user", question.prompt))
        answers: list[ParsedAnswer] = []
        for place, message in enumerate(question.reference):
            if message.role == "assistant":
                prompt = CODEC.encode_chat(messages, problem.options())
                options = type(problem.options())(
                    tools=problem.tools, thinking=problem.thinking, ends_with_answer=True
                )
                whole = CODEC.encode_chat([*messages, message], options).token_ids
                assert whole[: len(prompt.token_ids)] == prompt.token_ids
                generated = whole[len(prompt.token_ids) : -1]
                answers.append(
                    parse_answer(
                        TOKENIZER, generated, request_id="r", starts_in_reasoning=prompt.starts_in_reasoning
                    )
                )
            messages.append(question.reference[place])
        assert question.check(answers)


def test_tasks_are_found_by_name() -> None:
    assert tuple(all_tasks()) == TASK_NAMES
    check_names(TASK_NAMES)
    made = make_tasks({"recall": 2.0, "sort": 1.0}, {"recall": [64, 128]})
    assert made == {Recall(64, 128): 2.0, Sort(): 1.0}


def test_unknown_names_and_lengths_are_refused() -> None:
    with pytest.raises(ConfigError, match="no task 'sorting'; choose among sort, reverse"):
        check_names(["add", "sorting"])
    for least, most in ((8, 64), (4096, 256), (256, 2**31)):
        with pytest.raises(ConfigError, match=f"cannot be from {least} to {most} tokens"):
            all_tasks(recall_min_tokens=least, recall_max_tokens=most)
        with pytest.raises(ConfigError, match=f"cannot be from {least} to {most} tokens"):
            make_tasks({"recall": 1.0}, {"recall": [least, most]})
    with pytest.raises(ConfigError, match="give the least and the most"):
        make_tasks({"recall": 1.0}, {"recall": [512]})
    with pytest.raises(ConfigError, match="'sort', which has no choice of lengths"):
        make_tasks({"sort": 1.0}, {"sort": [8, 9]})
    with pytest.raises(ConfigError, match="'recall', which is not among the tasks"):
        make_tasks({"sort": 1.0}, {"recall": [256, 512]})
    with pytest.raises(ConfigError, match="no task 'x'"):
        make_tasks({"x": 1.0})
