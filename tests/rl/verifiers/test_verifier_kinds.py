import pytest

from bittrue.errors import VerifierUnavailable
from bittrue.rl.verifiers.code import Call, FunctionTests, ProgramTests, Run, calls_of
from bittrue.rl.verifiers.exact import Choice, Exact
from bittrue.rl.verifiers.json_schema import JsonSchema
from bittrue.rl.verifiers.mathematics import Mathematics
from bittrue.rl.verifiers.pool import Pool
from bittrue.rl.verifiers.task import TaskQuestion
from bittrue.rl.verifiers.tool_calls import ExpectedCall, ToolCalls
from bittrue.rl.verifiers.verifier import Answers, Verdict, Verifier, answer_of, graded
from bittrue.text.messages import ToolCall
from bittrue.text.parser import ParsedAnswer
from bittrue.train.tasks.catalogue import TASK_NAMES, all_tasks
from bittrue.train.tasks.task import seeded


def outcomes(pool: Pool, verifier: Verifier, texts: list[str]) -> list[str]:
    return [v.outcome for v in pool.judge_all([(verifier, answer_of(text)) for text in texts])]


def test_exact_is_one_text(pool: Pool) -> None:
    texts = ["42", " 42\n", "42.", "The answer is 42", ""]
    assert outcomes(pool, Exact("42"), texts) == ["right", "right", "wrong", "wrong", "wrong"]


def test_a_call_of_a_tool_is_no_text(pool: Pool) -> None:
    answers = (ParsedAnswer(None, "42", (ToolCall("c", "f", "{}"),)),)
    assert pool.judge(Exact("42"), answers).outcome == "unparsable"


@pytest.mark.parametrize(
    "text",
    [
        "C",
        "(C)",
        "C.",
        "Answer: C",
        "The answer is (C).",
        "the correct answer is C",
        "so\n\\boxed{C}",
        "C\n\nC",
    ],
)
def test_a_choice_may_be_said_in_many_ways(pool: Pool, text: str) -> None:
    assert outcomes(pool, Choice("C"), [text]) == ["right"]
    assert outcomes(pool, Choice("B"), [text]) == ["wrong"]


@pytest.mark.parametrize(
    "text",
    [
        "0.5",
        "1/2",
        "\\frac12",
        "2^{-1}",
        "$\\frac{2}{4}$",
        "Hence \\boxed{0.50}.",
        "x = \\frac{1}{2}",
        "0{,}5\\boxed{.5}",
    ],
)
def test_mathematics_may_be_written_in_many_ways(pool: Pool, text: str) -> None:
    assert outcomes(pool, Mathematics("\\frac{1}{2}"), [text]) == ["right"]


def test_mathematics_compares_what_it_was_given(pool: Pool) -> None:
    def of(expected: str, text: str) -> str:
        return outcomes(pool, Mathematics(expected), [text])[0]

    assert of("x^2+2x+1", "(x+1)^2") == "right"
    assert of("1000", "1,000") == "right"
    assert of("\\{1, 2\\}", "\\{2, 1\\}") == "right"
    assert of("50\\%", "50\\%") == "right"
    assert of("\\sqrt{2}", "\\sqrt{3}") == "wrong"
    assert of("\\frac{1}{3}", "0.333333") == "wrong"


def test_a_reference_that_is_no_mathematics_is_no_verdict(pool: Pool) -> None:
    with pytest.raises(VerifierUnavailable, match="no mathematical expression"):
        pool.judge(Mathematics("\\frac{"), answer_of("1"))


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "pattern": "^[a-z]+$"},
        "size": {"type": "integer", "minimum": 0, "exclusiveMaximum": 10, "multipleOf": 2},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "uniqueItems": True, "maxItems": 2},
        "kind": {"anyOf": [{"const": 1}, {"enum": ["a", None]}]},
    },
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": ["string", "null"], "not": {"const": "x"}}},
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "a"}', "right"),
        ('{"name": "a", "size": 4, "tags": ["t", null], "kind": null}', "right"),
        ('{"name": "a", "size": 4.0, "kind": 1.0}', "right"),
        ('{"size": 4}', "wrong"),
        ('{"name": ""}', "wrong"),
        ('{"name": "A"}', "wrong"),
        ('{"name": "a", "size": 10}', "wrong"),
        ('{"name": "a", "size": 3}', "wrong"),
        ('{"name": "a", "tags": ["t", "t"]}', "wrong"),
        ('{"name": "a", "tags": ["x"]}', "wrong"),
        ('{"name": "a", "kind": true}', "wrong"),
        ('{"name": "a", "more": 1}', "wrong"),
        ('{"name": "a"} ', "right"),
        ('{"name": "a"} x', "unparsable"),
    ],
)
def test_a_schema_allows_what_it_says(pool: Pool, text: str, expected: str) -> None:
    assert outcomes(pool, JsonSchema(SCHEMA), [text]) == [expected]


def test_a_schema_that_would_not_be_read_whole_is_refused(pool: Pool) -> None:
    schema = {"properties": {"a": {"unevaluatedProperties": False}, "b": {"$ref": "other.json"}}}
    with pytest.raises(VerifierUnavailable, match="other.json, unevaluatedProperties"):
        pool.judge(JsonSchema(schema), answer_of("{}"))


def called(*calls: tuple[str, str]) -> Answers:
    return (ParsedAnswer("why", "", tuple(ToolCall(f"call_{n}", *c) for n, c in enumerate(calls))),)


def test_tool_calls_are_compared_as_values(pool: Pool) -> None:
    two = ToolCalls((ExpectedCall("f", {"x": 1, "y": [2.0]}), ExpectedCall("g", {})))
    f, g = ("f", '{"y":[2], "x":1.0}'), ("g", "{}")
    assert pool.judge(two, called(f, g)).outcome == "right"
    assert pool.judge(two, called(g, f)).outcome == "right"
    ordered = ToolCalls(two.expected, is_ordered=True)
    assert pool.judge(ordered, called(f, g)).outcome == "right"
    assert pool.judge(ordered, called(g, f)).outcome == "wrong"
    verdict = pool.judge(two, called(f, ("g", '{"z":1}')))
    assert (verdict.outcome, verdict.sub_scores) == ("wrong", {"names": 1.0, "calls": 2.0})


ADD = FunctionTests("add", (Call(3, (1, 2)), Call([], ([], [])), Call(5, (2,), {"b": 3})))


def test_a_function_is_right_where_every_call_is(pool: Pool) -> None:
    assert pool.judge(ADD, answer_of("def add(a, b):\n    return a + b")).outcome == "right"
    fenced = "First:\n```python\nx = 1\n```\nThen:\n```python\n"
    fenced += "def add(a, b):\n    print('hi')\n    return a + b\n```\nDone."
    assert pool.judge(ADD, answer_of(fenced)).outcome == "right"
    verdict = pool.judge(ADD, answer_of("def add(a, b):\n    return 3 if a == 1 else 5 if a == 2 else None"))
    assert (verdict.outcome, verdict.score) == ("wrong", 0.0)
    assert verdict.sub_scores["passed"] == pytest.approx(2 / 3)


def test_a_function_that_raises_is_wrong_and_says_why(pool: Pool) -> None:
    verdict = pool.judge(ADD, answer_of("def add(a, b):\n    return a / len(b)"))
    assert (verdict.outcome, verdict.detail[:9]) == ("wrong", "TypeError")


def test_a_program_that_ends_without_results_crashed(pool: Pool) -> None:
    verdict = pool.judge(ADD, answer_of("import os\ndef add(a, b):\n    os._exit(0)"))
    assert verdict.outcome == "crash"


def test_floats_are_equal_within_the_tolerance(pool: Pool) -> None:
    def third(tolerance: float) -> str:
        test = FunctionTests("f", (Call([1 / 3]),), relative_tolerance=tolerance)
        return pool.judge(test, answer_of("def f():\n    return [0.33333]")).outcome

    assert (third(1e-3), third(0.0)) == ("right", "wrong")


def test_a_program_is_judged_by_what_it_prints(pool: Pool) -> None:
    runs = ProgramTests((Run("1 2\n", "3\n"), Run("4 5\n", "9")))
    assert (
        pool.judge(runs, answer_of("a, b = map(int, input().split())\nprint(a + b, ' ')")).outcome == "right"
    )
    verdict = pool.judge(runs, answer_of("input()\nprint(3)"))
    assert (verdict.outcome, dict(verdict.sub_scores)) == ("wrong", {"passed": 0.5})
    assert pool.judge(runs, answer_of("print(3)\nraise SystemExit(2)")).outcome == "crash"
    assert pool.judge(runs, answer_of("if __name__ == '__main__' print")).outcome == "unparsable"


def test_asserts_become_calls() -> None:
    function, calls = calls_of(["assert f((1, 2), k={'a': 1}) == [3]", "assert f(-1) == None"])
    assert function == "f"
    assert calls == (Call([3], ([1, 2],), {"k": {"a": 1}}), Call(None, (-1,)))
    for test in ("assert f(x) == 3", "assert f(1) in (1, 2)", "f(1)", "assert f(1) == f(2)"):
        with pytest.raises(ValueError, match=".+"):
            calls_of([test])


@pytest.mark.parametrize("name", TASK_NAMES)
def test_a_task_accepts_its_reference_and_nothing_else_of_ours(pool: Pool, name: str) -> None:
    question = all_tasks()[name].problem(seeded("verifiers", name)).questions[0]
    said = [message for message in question.reference if message.role == "assistant"]
    answers = tuple(ParsedAnswer(m.reasoning_content, m.content, m.tool_calls) for m in said)
    assert pool.judge(TaskQuestion(question), answers).outcome == "right"
    assert pool.judge(TaskQuestion(question), answer_of("no answer")).outcome == "wrong"


def test_part_of_a_score_counts_only_where_it_is_asked_for() -> None:
    assert graded(0.5, is_strict=True) == Verdict("wrong", 0.0, sub_scores={"value": 0.5})
    assert graded(0.5, is_strict=False) == Verdict("wrong", 0.5, sub_scores={"value": 0.5})
    assert graded(1, is_strict=True).score == 1.0
    assert graded(float("nan"), is_strict=False).outcome == "unparsable"
    with pytest.raises(ValueError, match="a score of 1.0 for crash"):
        Verdict("crash", 1.0)
